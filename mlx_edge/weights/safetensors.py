"""One safetensors file, mapped: its table of tensors, and each as an array when asked for.

Where MLX can adopt mapped pages a tensor is a view of the file; elsewhere, and where its address is
not aligned, it is copied once, straight out of the mapping, and counted. Knows no folder, no shard
index and no model.

A mapping shows the file as it is, not as it was: whoever shortens a file in place while it is
mapped takes pages away, and the operating system ends a process that touches one (SIGBUS). The size
is checked when the file is opened and again before each read, which catches all but a race.
Replacing a file under its name, as our writer does, is always safe.
"""

import mmap
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import DTypeLike, NDArray

from mlx_edge.errors import InvalidRequestError
from mlx_edge.weights.dtypes import ELEMENT_TYPES
from mlx_edge.weights.header import GET_AGAIN, TensorEntry, fail, parse_header, show
from mlx_edge.weights.mapping import NOT_ON_THIS_PLATFORM, SharedRuns, platform_can_share
from mlx_edge.weights.report import LoadReport


class SafetensorsFile:
    """An open safetensors file. Use it as a context manager, or call `close`.

    Opening checks the whole header and touches no tensor. A broken file raises ModelFormatError and
    nothing else. On Metal keep the object as long as its arrays, also when closed (`mapping.py`
    says why). Not thread-safe.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        started = time.perf_counter()
        self._mapping: mmap.mmap | None = _map_file(path)
        self._map_s = time.perf_counter() - started
        started = time.perf_counter()
        self._header = parse_header(str(path), self._mapping)
        self._parse_s = time.perf_counter() - started
        self._runs = (
            SharedRuns(self._mapping, self.tensors.values()) if platform_can_share() else None
        )
        self._shared_names: set[str] = set()
        self._copied_bytes = 0
        self._reasons: dict[str, None] = {}  # a set that keeps its order
        self._materialise_s = 0.0

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """What the file holds, in the order of its bytes."""
        return self._header.tensors

    @property
    def metadata(self) -> Mapping[str, str]:
        """The free-form strings that the file's writer left; empty if none."""
        return self._header.metadata

    @property
    def report(self) -> LoadReport:
        """What opening and reading did so far."""
        return LoadReport(
            num_tensors=len(self.tensors),
            total_bytes=sum(entry.num_bytes for entry in self.tensors.values()),
            shared_bytes=sum(self.tensors[name].num_bytes for name in self._shared_names),
            copied_bytes=self._copied_bytes,
            map_s=self._map_s,
            parse_s=self._parse_s,
            materialise_s=self._materialise_s,
            reasons=tuple(self._reasons),
        )

    def read(self, name: str) -> mx.array:
        """Returns one tensor in the shape and type of the file.

        Each call makes a new array; nothing is kept here. Raises ModelFormatError if the file has
        no such tensor or became shorter since it was opened, InvalidRequestError if it is closed.
        """
        if self._mapping is None:
            raise InvalidRequestError(
                f"{self.path}: the file is closed; read its tensors before closing it"
            )
        entry = self.tensors.get(name)
        if entry is None:
            found = f"no tensor {show(name)} among {len(self.tensors)}"
            fail(
                str(self.path), found, "it to be there", "check that file and model belong together"
            )
        if self._mapping.size() < entry.end:
            found = f"{self._mapping.size()} bytes, fewer than when it was opened"
            fail(str(self.path), found, "an unchanged file", GET_AGAIN)
        started = time.perf_counter()
        array = self._materialise(self._mapping, entry)
        self._materialise_s += time.perf_counter() - started
        return array

    def close(self) -> None:
        """Ends reading. Arrays stay valid: pages are unmapped when the last one on them is gone."""
        self._mapping = None

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _materialise(self, mapping: mmap.mmap, entry: TensorEntry) -> mx.array:
        if entry.num_bytes == 0:
            return mx.zeros(entry.shape, dtype=ELEMENT_TYPES[entry.dtype].mlx)
        shared = NOT_ON_THIS_PLATFORM if self._runs is None else self._runs.view(entry)
        if isinstance(shared, mx.array):
            self._shared_names.add(entry.name)
            return shared
        self._reasons[shared] = None
        self._copied_bytes += entry.num_bytes
        return _copy_tensor(mapping, entry)


def _map_file(path: Path) -> mmap.mmap:
    """The whole file, read-only; as copy-on-write, a GPU that wires pages might copy them all."""
    try:
        # Asked before opening: to open a pipe is to wait for its writer, maybe forever.
        if not stat.S_ISREG(path.stat().st_mode):
            fail(str(path), "something that is not a file", "a safetensors file", "check the path")
        with path.open("rb") as file:
            if file.seek(0, 2) == 0:  # an empty file cannot be mapped
                fail(str(path), "an empty file", "a safetensors file", GET_AGAIN)
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        fail(str(path), f"that it cannot be opened ({reason})", "a readable file", "check the path")


def _copy_tensor(mapping: mmap.mmap, entry: TensorEntry) -> mx.array:
    """The tensor in MLX's own memory: one copy, straight from the mapping, aligned or not."""
    if entry.dtype == "BOOL":  # a byte other than 0 and 1 is mended: it is neither true nor false
        return mx.array(_look_at(mapping, entry, np.uint8) != 0)
    element = ELEMENT_TYPES[entry.dtype]
    seen = _look_at(mapping, entry, element.numpy)
    if entry.dtype == "BF16":
        return mx.array(seen).view(element.mlx)
    return mx.array(seen, dtype=element.mlx)


def _look_at(mapping: mmap.mmap, entry: TensorEntry, dtype: DTypeLike) -> NDArray[Any]:
    """A read-only numpy view of a tensor's bytes in the mapping; it may be unaligned."""
    count = entry.num_bytes // np.dtype(dtype).itemsize
    return np.frombuffer(mapping, dtype=dtype, count=count, offset=entry.begin).reshape(entry.shape)
