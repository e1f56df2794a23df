"""The tensors of a model folder, whether they lie in one safetensors file or in many.

Finds the files, checks that index and files agree, and reads tensors by name. Knows no model: which
names there should be is for the floors above. No code from a model folder is ever executed, and no
pickle (.bin, .pt) is ever opened.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import NoReturn

import mlx.core as mx

from mlx_edge.weights.header import (
    GET_AGAIN,
    MAX_HEADER_BYTES,
    TensorEntry,
    fail,
    parse_json_object,
    show,
)
from mlx_edge.weights.report import LoadReport
from mlx_edge.weights.safetensors import SafetensorsFile

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_FOREIGN_SUFFIXES = (".bin", ".pt", ".pth", ".gguf", ".ckpt", ".npz")
_SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")


class Checkpoint:
    """All tensors of a model folder under one roof; made by `Checkpoint.open`.

    Use it as a context manager. Keep the object as long as its arrays, also when closed
    (`mapping.py` says why). Not thread-safe, but for `check_unchanged`.
    """

    def __init__(self, folder: Path, files: Mapping[str, SafetensorsFile]) -> None:
        self.folder = folder
        self._files = MappingProxyType(dict(files))
        self._file_of = MappingProxyType(_place_tensors(folder, self._files))

    @classmethod
    def open(cls, folder: Path, *, use_mmap: bool = True) -> "Checkpoint":
        """Opens the safetensors files of the model in `folder` and checks their headers.

        These are the files that `model.safetensors.index.json` names; without one
        `model.safetensors`; without that `model*.safetensors`, or else `*.safetensors`. With
        `use_mmap=False` all tensors are copied. Raises ModelFormatError if there is no file or they
        contradict.
        """
        if not folder.is_dir():
            fail(str(folder), "no folder of this name", "a model folder", "check the path")
        weight_map = _read_index(folder) if (folder / INDEX_NAME).exists() else None
        names = sorted(set(weight_map.values())) if weight_map is not None else _find_files(folder)
        files = {name: SafetensorsFile(folder / name, use_mmap=use_mmap) for name in names}
        checkpoint = cls(folder, files)
        if weight_map is not None:
            checkpoint._check_index(weight_map)
        return checkpoint

    def names(self) -> frozenset[str]:
        """Returns the names of all tensors."""
        return frozenset(self._file_of)

    def entry(self, name: str) -> TensorEntry:
        """Returns dtype, shape and place of a tensor, unread; ModelFormatError if there is none."""
        return self._find(name).tensors[name]

    def read(self, name: str) -> mx.array:
        """Returns a tensor as a new array; raises as `SafetensorsFile.read` does."""
        return self._find(name).read(name)

    def read_bytes(self, name: str) -> memoryview:
        """Returns a tensor's bytes; as `SafetensorsFile.read_bytes`."""
        return self._find(name).read_bytes(name)

    def check_unchanged(self) -> None:
        """Raises ModelFormatError if pages are shared with a file that was replaced, changed or removed since.

        One system call a file, so that a server can ask at each request, closed or not. Files whose tensors were all
        copied are not asked. What happens in the middle of a step is not found: whoever shortens a mapped file in
        place ends the process (SIGBUS).
        """
        for file in self._files.values():
            file.check_unchanged()

    def lock_memory(self) -> int:
        """Keeps all pages that are shared with the files so far in memory; returns their bytes.

        They are read now, and stay until the last array on them is gone. Copies are not locked. Raises
        MemoryBudgetError if the system does not allow it.
        """
        return sum(file.lock_memory() for file in self._files.values())

    def fingerprint(self) -> str:
        """Returns 32 hex digits that tell these weights from others, without reading them.

        They cover each file's name, size, time of change, header and 32 samples of 4 KiB: an edit in place that keeps
        size and time and misses all samples goes unseen. Raises InvalidRequestError if the checkpoint is closed.
        """
        digest = hashlib.blake2b(digest_size=16)
        for name, file in sorted(self._files.items()):
            digest.update(name.encode() + b"\0" + file.fingerprint())
        return digest.hexdigest()

    @property
    def metadata(self) -> Mapping[str, str]:
        """The free-form strings that every file of the checkpoint states alike."""
        first, *others = (file.metadata for file in self._files.values())
        return {
            key: value
            for key, value in first.items()
            if all(other.get(key) == value for other in others)
        }

    @property
    def report(self) -> LoadReport:
        """What opening and reading did so far, over all files."""
        return LoadReport.combine(file.report for file in self._files.values())

    def close(self) -> None:
        """Ends reading. Arrays stay valid."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _find(self, name: str) -> SafetensorsFile:
        file = self._file_of.get(name)
        if file is None:
            found = f"no tensor {show(name)} among {len(self._file_of)}"
            fail(
                str(self.folder),
                found,
                "it to be there",
                "check that weights and config.json belong together",
            )
        return file

    def _check_index(self, weight_map: Mapping[str, str]) -> None:
        """Every tensor that the index names must be in the file it names.

        A tensor that only its shard knows is kept: whoever loads the model sees its name and
        judges.
        """
        for name, shard in weight_map.items():
            if name not in self._files[shard].tensors:
                found = f"tensor {show(name)} mapped to {show(shard)}, which lacks it"
                fail(str(self.folder / INDEX_NAME), found, "index and shards to agree", GET_AGAIN)


def _place_tensors(
    folder: Path, files: Mapping[str, SafetensorsFile]
) -> dict[str, SafetensorsFile]:
    file_of: dict[str, SafetensorsFile] = {}
    for shard, file in files.items():
        for name in file.tensors:
            if name in file_of:
                found = f"tensor {show(name)} in both {file_of[name].path.name} and {shard}"
                fail(str(folder), found, "each tensor once", "remove files of another checkpoint")
            file_of[name] = file
    return file_of


def _read_index(folder: Path) -> dict[str, str]:
    """The checked `weight_map` of the index: tensor name -> plain name of an existing file.

    The rest of the index is `metadata`, chiefly a total size that is often wrong in the wild; the
    headers know better.
    """
    path = folder / INDEX_NAME
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_HEADER_BYTES + 1)
    except OSError as error:
        fail(str(path), f"that it cannot be read ({error.strerror})", "a readable file", GET_AGAIN)
    if len(raw) > MAX_HEADER_BYTES:
        fail(str(path), "an index without end", f"at most {MAX_HEADER_BYTES} bytes", GET_AGAIN)
    weight_map = parse_json_object(str(path), raw).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        fail(
            str(path),
            f"weight_map {show(weight_map)}",
            "a table: tensor name -> file name",
            GET_AGAIN,
        )
    for name, shard in weight_map.items():
        if not _is_plain_name(shard):
            found = f"tensor {show(name)} mapped to {show(shard)}"
            fail(str(path), found, "the plain name of a .safetensors file beside it", GET_AGAIN)
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            fail(
                str(path),
                f"{show(shard)} named but not in the folder",
                "every shard",
                "download the rest",
            )
    return weight_map


def _is_plain_name(name: object) -> bool:
    """True for the name of a safetensors file: no path, nothing hidden, nothing unprintable.

    Only the name is judged. That the file may be a link is meant: the hub's cache links to its
    blobs.
    """
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and not name.startswith(".")
        and name.isprintable()
        and not set(name) & set("/\\:")
    )


def _find_files(folder: Path) -> list[str]:
    """The weight files of a folder without an index."""
    try:
        present = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        fail(
            str(folder),
            f"that it cannot be read ({error.strerror})",
            "a readable folder",
            "check it",
        )
    if SINGLE_NAME in present:
        return [SINGLE_NAME]
    weights = [name for name in present if name.endswith(".safetensors")]
    names = [name for name in weights if name.startswith("model")] or weights
    if not names:
        _refuse_foreign(folder, present)
    _check_complete(folder, names)
    return names


def _refuse_foreign(folder: Path, present: list[str]) -> NoReturn:
    foreign = next((name for name in present if name.endswith(_FOREIGN_SUFFIXES)), None)
    if foreign is None:
        fail(
            str(folder), "no weights", "model.safetensors", "check the path, or download the model"
        )
    fail(str(folder), foreign, "model.safetensors", "only safetensors are read, convert it first")


def _check_complete(folder: Path, names: list[str]) -> None:
    """Without an index the shards' own names say how many there must be."""
    for match in filter(None, map(_SHARD_NAME.fullmatch, names)):
        count = int(match["count"])
        for number in range(1, count + 1):
            wanted = f"{match['stem']}-{number:05d}-of-{match['count']}.safetensors"
            if wanted not in names:
                fail(
                    str(folder),
                    f"{match[0]} but not {wanted}",
                    f"all {count} shards",
                    "download the rest",
                )
