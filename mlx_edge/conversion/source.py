"""What a conversion reads: a model's configuration, its tensors one at a time, and the texts beside them.

`Source` is the shape that every kind of model file is given; `FolderSource` is a folder of safetensors. Knows nothing
of what is written.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

from mlx_edge.models.config import read_json_object
from mlx_edge.models.families import FAMILIES, Family
from mlx_edge.models.fields import Fields
from mlx_edge.models.quantization import Quantization
from mlx_edge.ops.types import Quantized
from mlx_edge.quant import Packing
from mlx_edge.weights import Checkpoint
from mlx_edge.weights.dtypes import ELEMENT_TYPES
from mlx_edge.weights.writer import disk_errors

QUANTIZATION_KEYS = ("quantization", "quantization_config")
PACKED_PARTS = ("scales", "biases")  # beside the `weight` of a quantized layer

MEASURES = ("quality.json", "sensitivity.json")

# Tokenizer, templates, generation defaults, licence. No code: nothing here would run it.
_TEXTS = re.compile(
    r"(?!config\.json$|.*\.safetensors\.index\.json$|quality\.json$|sensitivity\.json$|\.)"
    r".*\.(json|jinja|model|txt|tiktoken)|(LICENSE|NOTICE|USE_POLICY).*|README\.md"
)


class Source(Protocol):
    """A model as a conversion reads it."""

    @property
    def name(self) -> str:
        """What messages and the model card call it."""

    @property
    def config(self) -> dict[str, Any]:
        """The content of `config.json` in Hugging Face's spelling."""

    def fingerprint(self) -> str:
        """A text that is another one when the model's files are others."""

    def names(self) -> list[str]:
        """The names of all tensors, in the order of their use."""

    def dtype(self, name: str) -> mx.Dtype:
        """The type of a tensor."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""

    def read(self, name: str) -> mx.array:
        """A tensor as a new array."""

    def quantized(self, layer: str) -> Packing | None:
        """How this source stores the weight of a layer, or None when it is float."""

    def stored(self, layer: str, packing: Packing, dtype: mx.Dtype) -> Quantized | None:
        """The weight of a float layer in this packing, where the source has it just so and nothing is rounded again."""

    def copy_text_files(self, folder: Path) -> None:
        """Puts tokenizer and what else a model folder holds into `folder`, but weights and `config.json`."""


class FolderSource:
    """A folder of safetensors, float or quantized by MLX. Use it as a context manager.

    Tensors are copied, never mapped: what is read once and dropped shall not stay in memory.
    """

    def __init__(self, folder: Path, name: str | None = None) -> None:
        """Raises: ModelFormatError for a broken folder, UnsupportedModelError for a foreign quantization."""
        self.folder = folder
        self.name = name or folder.name
        self.config = read_json_object(folder / "config.json")
        fields = Fields(self.config, str(folder / "config.json"))
        self._quantization = Quantization.read(fields)
        self._checkpoint = Checkpoint.open(folder, use_mmap=False)
        self._names = self._checkpoint.names()

    def fingerprint(self) -> str:
        """Of `config.json`, and of each file of weights: its name, size, time of change and header."""
        digest = hashlib.blake2b((self.folder / "config.json").read_bytes(), digest_size=16)
        for path in sorted(self.folder.glob("*.safetensors")):
            with path.open("rb") as file:  # not mapped: that would count as memory in use
                info = os.fstat(file.fileno())
                digest.update(f"{path.name} {info.st_size} {info.st_mtime_ns}\0".encode())
                digest.update(file.read(int.from_bytes(file.read(8), "little")))
        return digest.hexdigest()

    def names(self) -> list[str]:
        """By name, with layer 2 before layer 10."""
        return sorted(self._names, key=_by_number)

    def dtype(self, name: str) -> mx.Dtype:
        """The type of a tensor."""
        return ELEMENT_TYPES[self._checkpoint.entry(name).dtype].mlx

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._checkpoint.entry(name).shape

    def read(self, name: str) -> mx.array:
        """A tensor as a new array; ModelFormatError when the file broke off."""
        return self._checkpoint.read(name)

    def quantized(self, layer: str) -> Packing | None:
        """The packing that `config.json` gives a layer which has scales."""
        has_scales = f"{layer}.scales" in self._names
        return self._quantization.packing(layer) if has_scales else None

    def stored(self, layer: str, packing: Packing, dtype: mx.Dtype) -> Quantized | None:
        """None: a layer is float here, or it is `quantized`."""
        return None

    def copy_text_files(self, folder: Path) -> None:
        """Tokenizer, templates, generation defaults, licence and model card."""
        self._copy(folder, [p.name for p in self.folder.iterdir() if _TEXTS.fullmatch(p.name)])

    def copy_measures(self, folder: Path) -> None:
        """Puts what was measured on just these weights into `folder`."""
        self._copy(folder, MEASURES)

    def _copy(self, folder: Path, names: Iterable[str]) -> None:
        for name in names:
            if (self.folder / name).is_file():
                with disk_errors(folder / name):
                    shutil.copyfile(self.folder / name, folder / name)

    def close(self) -> None:
        """Ends reading."""
        self._checkpoint.close()

    def __enter__(self) -> "FolderSource":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _by_number(name: str) -> list[tuple[int, str]]:
    """A key that sorts the numbers in a name as numbers."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def find_family(source: Source) -> Family | None:
    """The family that the source's configuration names, where it is defined here."""
    return FAMILIES.get(str(source.config.get("model_type")))


def is_quantized(source: Source) -> bool:
    """Whether some layer of the source is packed."""
    names = source.names()
    return any(name.endswith(".scales") and source.quantized(name[:-7]) for name in names)


def count_bytes(source: Source) -> int:
    """The size of the source: of its file, where it is one, else of its tensors."""
    path = getattr(source, "path", None)
    if isinstance(path, Path):
        return path.stat().st_size
    return sum(prod(source.shape(name)) * source.dtype(name).size for name in source.names())
