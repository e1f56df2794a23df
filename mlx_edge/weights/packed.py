"""Weights repacked once, kept in a file, mapped on every later start and shared between processes.

Knows names, sizes and a key; what is packed, and how, is its caller's. The files lie in $MLX_EDGE_CACHE, or else in
$XDG_CACHE_HOME/mlx_edge/packed, or else in ~/.cache/mlx_edge/packed, one for each key. They are a cache: whatever is
wrong with a file or its folder costs one line of warning, and the parts are packed again, into a new file or into
memory.

What cannot be caught is somebody else who shortens a file in place while it is mapped: the process that touches a
missing page ends by SIGBUS. Removing or replacing a file is always safe.
"""

import hashlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from mlx_edge.errors import MemoryBudgetError
from mlx_edge.weights.locking import lock_pages
from mlx_edge.weights.pack_file import (
    SUFFIX,
    CannotKeepError,
    anonymous_pages,
    find_key,
    map_pack,
    remove_abandoned,
    write_pack,
)
from mlx_edge.weights.pack_header import BrokenPackError, PackLayout, Part
from mlx_edge.weights.report import PackReport, format_bytes

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "MLX_EDGE_CACHE"

Fill = Callable[[Part, memoryview], None]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PackedFile:
    """Packed parts in memory, not to be written; made by `open_packed`.

    `parts` are read-only views by name, each on a multiple of 64 bytes. The memory lives as long as this object or
    any of the views: whoever keeps only an address must keep this object. It may be used from any thread and after a
    fork, and the file may be removed meanwhile. `report` says where the parts are and how they came there; `pages` is
    all of the memory.
    """

    parts: Mapping[str, memoryview]
    report: PackReport
    pages: memoryview

    def address(self, name: str) -> tuple[int, int]:
        """Returns where a part lies in this process, and its size in bytes."""
        view = self.parts[name]
        return _address_of(view) if view else 0, view.nbytes

    def lock_memory(self) -> int:
        """Reads all pages in and keeps them in memory as long as they are mapped; returns their bytes.

        Raises MemoryBudgetError if the system does not allow it.
        """
        return lock_pages(_address_of(self.pages), len(self.pages), self.report.place)


@dataclass(frozen=True)
class PackEntry:
    """A file in the cache folder: its size in bytes, when it was written in s since the epoch, and for which key.

    `key` is None if the file is broken.
    """

    path: Path
    key: str | None
    num_bytes: int
    written_s: float


def open_packed(
    key: str,
    parts: Sequence[Part],
    fill: Fill,
    *,
    folder: Path | None = None,
    use_file: bool = True,
    populate: bool = False,
    on_progress: Progress | None = None,
) -> PackedFile:
    """Returns the parts as they were packed for `key`, packing them if nobody has.

    `key` names all that the bytes depend on: `Checkpoint.fingerprint()`, the version of the layout, its parameters.
    `fill(part, view)` writes the bytes of one part into `view`, which begins on a page and holds zeros; it may be
    called twice for a part, when the disk fails half way, and must not keep the view. What it raises passes through.
    `folder` is by default the one that `default_folder` returns; without `use_file` everything stays in memory.
    `populate` maps all pages now, not at their first use. `on_progress(done, total)` is called in bytes while
    packing, never when a file is reused. Raises MemoryBudgetError if there is no memory to pack in.
    """
    started = time.perf_counter()
    layout = PackLayout.plan(key, parts)
    packing = _Packing(layout, fill, on_progress)
    place, how, data = "memory", "packed", None
    if use_file:
        try:
            path = (folder or default_folder()) / _file_name(key)
            data, how = _open_file(path, packing, populate=populate)
            place = str(path)
        except (CannotKeepError, BrokenPackError) as error:
            logger.warning(
                "packed weights are not kept, each start packs them again (%s): free %s or set %s to another folder",
                error,
                format_bytes(layout.file_bytes),
                CACHE_VARIABLE,
            )
    if data is None:
        data = packing.into_memory()
    report = PackReport(layout.file_bytes, place, how, time.perf_counter() - started)
    return PackedFile(MappingProxyType(layout.cut(data)), report, data)


def default_folder() -> Path:
    """Returns the folder of the cache; it need not exist."""
    own, caches = os.environ.get(CACHE_VARIABLE), os.environ.get("XDG_CACHE_HOME", "")
    if own:
        return Path(own).expanduser()
    if Path(caches).is_absolute():  # a relative one is to be ignored, says its specification
        return Path(caches) / "mlx_edge" / "packed"
    try:
        return Path.home() / ".cache" / "mlx_edge" / "packed"
    except RuntimeError as error:
        raise CannotKeepError("there is no home folder") from error


def list_packed(folder: Path | None = None) -> list[PackEntry]:
    """Returns the packed files of the cache, the newest first; an empty list if there is no such folder."""
    entries = [_describe(path) for path in (folder or default_folder()).glob(f"*{SUFFIX}")]
    return sorted((entry for entry in entries if entry), key=lambda entry: -entry.written_s)


def remove_packed(folder: Path | None = None, *, key: str | None = None) -> int:
    """Removes the packed file of `key`, or all of them and what dead writers left; returns the bytes freed.

    Processes that have a file mapped keep it, and its space is free when the last of them ends. Raises OSError if a
    file cannot be removed.
    """
    folder = folder or default_folder()
    freed = remove_abandoned(folder) if key is None else 0
    for entry in list_packed(folder):
        if key is None or entry.path.name == _file_name(key):
            entry.path.unlink(missing_ok=True)
            freed += entry.num_bytes
    return freed


@dataclass(frozen=True)
class _Packing:
    """The work of packing one layout, wherever its bytes go."""

    layout: PackLayout
    fill: Fill
    on_progress: Progress | None

    def into_file(self, path: Path) -> None:
        """Raises as `write_pack` does."""
        done = 0

        def fill(part: Part, view: memoryview) -> None:
            nonlocal done
            self._fill_part(part, view)
            done += part.num_bytes
            self._tell(done)

        self._tell(0)
        write_pack(path, self.layout, fill)

    def into_memory(self) -> memoryview:
        """Returns read-only memory with the same layout as the file, its head left out."""
        try:
            data = memoryview(anonymous_pages(self.layout.file_bytes))
        except OSError as error:
            raise MemoryBudgetError(
                f"the packed weights need {format_bytes(self.layout.file_bytes)} of memory, which the system refuses "
                f"({error.strerror}); free memory or take a smaller model"
            ) from error
        views = self.layout.cut(data)
        done = 0
        self._tell(0)
        for part in self.layout.parts:
            self._fill_part(part, views[part.name])
            done += part.num_bytes
            self._tell(done)
        return data.toreadonly()

    def _fill_part(self, part: Part, view: memoryview) -> None:
        if part.num_bytes:
            self.fill(part, view)

    def _tell(self, done: int) -> None:
        if self.on_progress:
            self.on_progress(done, sum(part.num_bytes for part in self.layout.parts))


def _open_file(path: Path, packing: _Packing, *, populate: bool) -> tuple[memoryview, str]:
    """The mapped file, and how it came: "reused" or "built"."""
    try:
        data = map_pack(path, packing.layout, populate=populate)
        if data is not None:
            return data, "reused"
    except BrokenPackError as error:
        logger.warning("%s is not usable, it is packed again: %s", path, error)
    packing.into_file(path)
    data = map_pack(path, packing.layout, populate=populate)
    if data is None:
        raise CannotKeepError(f"{path} was removed as soon as it was written")
    return data, "built"


def _address_of(view: memoryview) -> int:
    import numpy as np  # slow to import, and seldom needed: ctypes gives no address of read-only bytes

    return int(np.frombuffer(view, np.uint8).ctypes.data)


def _file_name(key: str) -> str:
    return hashlib.blake2b(key.encode(), digest_size=16).hexdigest() + SUFFIX


def _describe(path: Path) -> PackEntry | None:
    try:
        info = path.stat()
        return PackEntry(path, find_key(path), info.st_size, info.st_mtime)
    except OSError:  # removed meanwhile
        return None
