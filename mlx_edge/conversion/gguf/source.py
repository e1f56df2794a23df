"""A model in a GGUF file as a conversion reads it: our names, floats, the rows of queries and keys in our order.

llama.cpp turns the pairs (0, 1), (2, 3), ... of a llama head, Hugging Face's layout the pairs (0, D/2), (1, D/2 + 1),
...; its converter moves the rows of q and k accordingly, which is undone here. What a quantized tensor stands for is
said by the `gguf` package. Knows nothing of what is written.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_edge.conversion.gguf.config import TURNED, make_config
from mlx_edge.conversion.gguf.names import ROPE_FACTORS, Place, find_places
from mlx_edge.conversion.gguf.repack import PACKINGS, repack
from mlx_edge.conversion.gguf.tokenizer import make_tokenizer_files
from mlx_edge.errors import ModelFormatError, UnsupportedModelError
from mlx_edge.models.config import ModelConfig
from mlx_edge.ops.types import Quantized
from mlx_edge.quant import Packing
from mlx_edge.weights.gguf import GGUFFile
from mlx_edge.weights.header import show
from mlx_edge.weights.writer import disk_errors

if TYPE_CHECKING:
    from numpy.typing import NDArray


class GGUFSource:
    """A GGUF file of a llama, qwen2 or qwen3 model. Use it as a context manager.

    `config["torch_dtype"]` is the float type to store the model in where nothing else is asked for: the file's own
    norms are always float32.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        """Raises: ModelFormatError for a broken file, UnsupportedModelError for another model, InvalidRequestError
        without the `gguf` package."""
        self.path = path
        self.name = name or path.name
        self._file = GGUFFile(path)
        tensors = self._file.tensors
        factors = self._file.read(ROPE_FACTORS) if ROPE_FACTORS in tensors else None
        config = make_config(str(path), self._file.metadata, tensors, factors)
        self.config: dict[str, Any] = config
        model = ModelConfig.from_hf(self.config, str(path))
        self._places = find_places(model, turns_rows=model.model_type in TURNED)
        self._check_tensors()

    def fingerprint(self) -> str:
        """A text that is another one when the file is."""
        return self._file.fingerprint()

    def names(self) -> list[str]:
        """The names of all tensors, in the order of their use."""
        return list(self._places)

    def dtype(self, name: str) -> mx.Dtype:
        """The float type that a tensor is stored in; float32 for a quantized one."""
        return self._file.dtype(self._place(name).name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._place(name).shape

    def read(self, name: str) -> mx.array:
        """A tensor as a new array: what `gguf.quants.dequantize` returns, to the last bit, rows in our order."""
        place, order = self._place(name), _row_order(self._place(name))
        if order is not None and len(place.shape) == 1:  # a bias: its values are what moves
            return self._file.read(place.name)[mx.array(order)]
        return self._file.read(place.name, order)

    def quantized(self, layer: str) -> Packing | None:
        """None: whatever the file holds is read as floats."""
        return None

    def stored(
        self, layer: str, packing: Packing, dtype: mx.Dtype = mx.float16
    ) -> Quantized | None:
        """The weight of a layer in this packing as the file has it, no value rounded again.

        None where the file has it otherwise, or has scales that `dtype` does not hold exactly (see `repack.py`).
        """
        place = self._place(f"{layer}.weight")
        kind = self._file.tensors[place.name].type.name
        if PACKINGS.get(kind) != packing:
            return None
        return repack(kind, self._file.read_rows(place.name, _row_order(place)), dtype)

    def copy_text_files(self, folder: Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and generation_config.json, made from the metadata.

        Raises: ModelFormatError or UnsupportedModelError for a vocabulary that is broken or of another kind,
        InvalidRequestError if the disk refuses.
        """
        vocab_size = self.config["vocab_size"]
        files = make_tokenizer_files(str(self.path), self._file.metadata, vocab_size)
        for name, text in files.items():
            with disk_errors(folder / name):
                (folder / name).write_text(text, encoding="utf-8")

    def close(self) -> None:
        """Ends reading."""
        self._file.close()

    def __enter__(self) -> "GGUFSource":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _place(self, name: str) -> Place:
        place = self._places.get(name)
        if place is None:
            raise ModelFormatError(
                f"{self.path}: found no tensor {show(name)} among {len(self._places)}; "
                "check that the names belong to this model"
            )
        return place

    def _check_tensors(self) -> None:
        """Every tensor of the model is there in its shape, and no other."""
        tensors = self._file.tensors
        for place in self._places.values():
            tensor = tensors.get(place.name)
            if tensor is None:
                raise ModelFormatError(
                    f"{self.path}: tensor {place.name} is missing; take a whole model's file"
                )
            if tensor.shape != place.shape:
                raise ModelFormatError(
                    f"{self.path}: tensor {place.name} is {list(tensor.shape)}, expected {list(place.shape)} "
                    "from the metadata; convert the model again"
                )
        known = {place.name for place in self._places.values()} | {ROPE_FACTORS}
        left = sorted(set(tensors) - known)
        if left:
            raise UnsupportedModelError(
                f"{self.path}: {len(left)} tensors that a {self.config['model_type']} model does not use, the first "
                f"is {show(left[0])}; convert the model's own float weights instead"
            )


def _row_order(place: Place) -> "NDArray[Any] | None":
    """For each row here its row in the file, or None where they are the same."""
    if not place.turned_heads:
        return None
    import numpy as np

    rows = np.arange(place.shape[0]).reshape(place.turned_heads, -1, 2)
    return rows.swapaxes(1, 2).reshape(-1)
