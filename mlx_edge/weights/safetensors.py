"""One safetensors file, mapped: its table of tensors, and each as an array when asked for.

Where MLX can adopt mapped pages a tensor is a view of the file; elsewhere, and where its address is
not aligned, it is copied once and counted. Knows no folder, no shard index and no model.

A mapping shows the file as it is, not as it was: whoever shortens a file in place while it is
mapped takes pages away, and the operating system ends a process that touches one (SIGBUS). The size
is checked when the file is opened and again before each read, and by `check_unchanged` whenever it
is called, which catches all but a race. With `use_mmap=False` every tensor is read, not mapped, and
what happens to the file afterwards does not matter. Replacing a file under its name, as our writer
does, is always safe.
"""

import mmap
import os
import stat
import time
import weakref
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NoReturn

import mlx.core as mx

from mlx_edge.errors import InvalidRequestError
from mlx_edge.weights.adoption import NOT_ASKED_FOR, Adopt, find_adoption
from mlx_edge.weights.dtypes import ELEMENT_TYPES
from mlx_edge.weights.header import GET_AGAIN, TensorEntry, fail, parse_header, show
from mlx_edge.weights.identity import FileIdentity, fingerprint_file
from mlx_edge.weights.locking import find_address, lock_pages
from mlx_edge.weights.mapping import UNALIGNED, SharedRuns
from mlx_edge.weights.report import LoadReport


class SafetensorsFile:
    """An open safetensors file. Use it as a context manager, or call `close`.

    Opening checks the whole header and touches no tensor. A broken file raises ModelFormatError and
    nothing else. Keep the object as long as its arrays, also when closed (`mapping.py` says why).
    Not thread-safe.
    """

    def __init__(self, path: Path, *, use_mmap: bool = True) -> None:
        """`use_mmap=False` has every tensor copied."""
        self.path = path
        started = time.perf_counter()
        self._descriptor, self._identity = _open_file(path)
        self._close_descriptor = weakref.finalize(self, os.close, self._descriptor)
        self._mapping: mmap.mmap | None = _map_file(path, self._descriptor, self._identity)
        self._map_s = time.perf_counter() - started
        started = time.perf_counter()
        self._header = parse_header(str(path), self._mapping)
        self._parse_s = time.perf_counter() - started
        self._use_mmap = use_mmap
        adopt = find_adoption() if use_mmap else NOT_ASKED_FOR
        self._runs = adopt if isinstance(adopt, str) else self._plan_runs(adopt)
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

    def check_unchanged(self) -> None:
        """Raises ModelFormatError if pages are shared with a file that was replaced, changed or removed since."""
        if self._shared_names:
            self._identity.check_unchanged(self.path)

    def lock_memory(self) -> int:
        """Keeps all pages that are shared with the file in memory, reading them now; returns their bytes.

        Raises MemoryBudgetError if the system does not allow it. Ends with the last array on the pages.
        """
        bases = [] if isinstance(self._runs, str) else self._runs.bases
        return sum(lock_pages(find_address(base), base.nbytes, str(self.path)) for base in bases)

    def fingerprint(self) -> bytes:
        """Returns 16 bytes that tell this file from others, see `fingerprint_file`; the file must be open."""
        mapping = self._open_mapping()
        header_bytes = 8 + int.from_bytes(mapping[:8], "little")
        self._identity.check_unchanged(self.path)
        # Through a mapping that is gone afterwards: each page that is touched may bring megabytes around it along.
        with (
            self.path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as samples,
        ):
            return fingerprint_file(self._identity, samples, header_bytes=header_bytes)

    def read(self, name: str) -> mx.array:
        """Returns one tensor in the shape and type of the file.

        Each call makes a new array; nothing is kept here. Raises ModelFormatError if the file has
        no such tensor or became shorter since it was opened, InvalidRequestError if it is closed.
        """
        mapping = self._open_mapping()
        entry = self._find(name)
        started = time.perf_counter()
        array = self._materialise(mapping, entry)
        self._materialise_s += time.perf_counter() - started
        return array

    def read_bytes(self, name: str) -> memoryview:
        """Returns a tensor's bytes as they lie in the file: a view of the mapping, aligned to its elements, or a copy.

        A view is counted as shared and keeps the mapping. Raises as `read` does.
        """
        mapping = self._open_mapping()
        entry = self._find(name)
        if not self._use_mmap:
            data = self._read_bytes(entry)
        else:
            data = _cut_bytes(mapping, entry)
            if entry.begin % ELEMENT_TYPES[entry.dtype].size == 0:  # a mapping begins on a page
                self._shared_names.add(name)
                return data
            self._reasons[UNALIGNED] = None
            data = memoryview(bytes(data))
        self._copied_bytes += entry.num_bytes
        return data

    def close(self) -> None:
        """Ends reading. Arrays stay valid: pages are unmapped when the last one on them is gone."""
        self._mapping = None
        self._close_descriptor()

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _find(self, name: str) -> TensorEntry:
        entry = self.tensors.get(name)
        if entry is None:
            found = f"no tensor {show(name)} among {len(self.tensors)}"
            fail(
                str(self.path), found, "it to be there", "check that file and model belong together"
            )
        return entry

    def _open_mapping(self) -> mmap.mmap:
        """The mapping, with all its bytes behind it."""
        if self._mapping is None:
            raise InvalidRequestError(
                f"{self.path}: the file is closed; read its tensors before closing it"
            )
        if self._mapping.size() < self._identity.num_bytes:
            found = f"{self._mapping.size()} bytes, fewer than when it was opened"
            fail(str(self.path), found, "an unchanged file", GET_AGAIN)
        return self._mapping

    def _plan_runs(self, adopt: Adopt) -> SharedRuns:
        assert self._mapping is not None
        bound = partial(adopt, self._mapping, self._descriptor)
        return SharedRuns(self.tensors.values(), bound)

    def _materialise(self, mapping: mmap.mmap, entry: TensorEntry) -> mx.array:
        if entry.num_bytes == 0:
            return mx.zeros(entry.shape, dtype=ELEMENT_TYPES[entry.dtype].mlx)
        shared = self._runs if isinstance(self._runs, str) else self._runs.view(entry)
        if isinstance(shared, mx.array):
            self._shared_names.add(entry.name)
            return shared
        self._reasons[shared] = None
        self._copied_bytes += entry.num_bytes
        data = _cut_bytes(mapping, entry) if self._use_mmap else self._read_bytes(entry)
        return _copy_tensor(data, entry)

    def _read_bytes(self, entry: TensorEntry) -> memoryview:
        data = memoryview(bytearray(entry.num_bytes))
        done = 0
        while done < entry.num_bytes:
            try:
                count = os.preadv(self._descriptor, [data[done:]], entry.begin + done)
            except OSError as error:
                found = f"that it cannot be read ({error.strerror})"
                fail(str(self.path), found, "a readable file", "check the disk")
            if count == 0:
                fail(str(self.path), "that it became shorter", "an unchanged file", GET_AGAIN)
            done += count
        return data


def _open_file(path: Path) -> tuple[int, FileIdentity]:
    """The descriptor of a regular file that has bytes, and what it is now."""
    try:
        # Asked before opening: to open a pipe is to wait for its writer, maybe forever.
        if not stat.S_ISREG(path.stat().st_mode):
            fail(str(path), "something that is not a file", "a safetensors file", "check the path")
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        identity = FileIdentity.of(os.fstat(descriptor))
    except (OSError, ValueError) as error:
        _fail_to_open(path, error)
    return descriptor, identity


def _map_file(path: Path, descriptor: int, identity: FileIdentity) -> mmap.mmap:
    """The whole file, read-only; as copy-on-write, a GPU that wires pages might copy them all."""
    if identity.num_bytes == 0:  # an empty file cannot be mapped
        fail(str(path), "an empty file", "a safetensors file", GET_AGAIN)
    try:
        return mmap.mmap(descriptor, identity.num_bytes, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        _fail_to_open(path, error)


def _fail_to_open(path: Path, error: OSError | ValueError) -> NoReturn:
    reason = getattr(error, "strerror", None) or str(error)
    fail(str(path), f"that it cannot be opened ({reason})", "a readable file", "check the path")


def _cut_bytes(mapping: mmap.mmap, entry: TensorEntry) -> memoryview:
    return memoryview(mapping)[entry.begin : entry.end]


def _copy_tensor(data: memoryview, entry: TensorEntry) -> mx.array:
    """The tensor with these bytes in MLX's own memory: one copy, aligned or not."""
    element = ELEMENT_TYPES[entry.dtype]
    # As words of its size: MLX counts in int32, and as bytes a large tensor would be too many.
    words: Any = data.cast(_WORDS[element.size])
    copied = mx.array(words)
    if entry.dtype == "BOOL":  # a byte other than 0 and 1 is mended: it is neither true nor false
        return (copied != 0).reshape(entry.shape)
    # Metal has no float64; nothing is computed here.
    return copied.view(element.mlx, stream=mx.cpu).reshape(entry.shape, stream=mx.cpu)


_WORDS: Mapping[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}
