"""A pack cache file on the disk: written whole or not at all, mapped and checked, cleaned up after dead writers.

Knows bytes, names of files and what a disk may refuse; not what a part holds, nor when a file is wanted.

Nothing is ever written into a file that has its final name. Two processes that pack the same weights at once each
write a temporary file of their own, and the later name wins; the earlier file stays mapped where it is in use. The
disk is asked for all bytes before the first is made, and parts are written with `write`, not through a mapping: a full
disk is an error, never a signal. A writer holds a lock on its temporary file, so that a file without one is known to be
of a dead writer, whatever container or machine it ran on.
"""

import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mlx_edge.weights.pack_header import (
    BrokenPackError,
    Ends,
    PackLayout,
    Part,
    check_ends,
    read_key,
)
from mlx_edge.weights.writer import sync_folder

SUFFIX = ".pack"
TEMPORARY_SUFFIX = ".tmp"

_MAPPED_NOW = getattr(mmap, "MAP_POPULATE", 0)  # Linux only
_NOT_SUPPORTED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


class CannotKeepError(Exception):
    """The disk or its folder refuses; the text says why. Never leaves this package."""


def map_pack(path: Path, layout: PackLayout, *, populate: bool) -> memoryview | None:
    """Returns the checked, read-only pages of a pack file, or None if there is none.

    Raises BrokenPackError for a file that is not whole or of another layout, CannotKeepError if it cannot be read.
    """
    with _disk_errors(path):
        try:
            data = _map_pages(path, mmap.MAP_SHARED | (_MAPPED_NOW if populate else 0))
        except FileNotFoundError:
            return None
    layout.verify(data)
    return data


def find_key(path: Path) -> str | None:
    """Returns the key that a pack file was made for, or None if it is broken; OSError if it cannot be read."""
    try:
        return read_key(_map_pages(path, mmap.MAP_SHARED))
    except BrokenPackError:
        return None


def write_pack(path: Path, layout: PackLayout, fill: Callable[[Part, memoryview], None]) -> None:
    """Writes the parts, one after the other, to a new file that then takes the place of `path`.

    Needs memory for the largest part. Raises CannotKeepError if the disk refuses, and what `fill` raises; either way
    nothing is left behind.
    """
    with _temporary(path) as (descriptor, temporary):
        with _disk_errors(path):
            _reserve(descriptor, layout.file_bytes)
        scratch = memoryview(anonymous_pages(max((p.num_bytes for p in layout.parts), default=1)))
        ends: list[Ends] = []
        for part, begin in zip(layout.parts, layout.begins, strict=True):
            view = scratch[: part.num_bytes]
            if ends:
                _clear(view)
            fill(part, view)
            with _disk_errors(path):
                _write_at(descriptor, view, begin)
            ends.append(check_ends(view))
        with _disk_errors(path):
            _write_at(descriptor, memoryview(layout.format_head(ends)), 0)
            os.ftruncate(descriptor, layout.file_bytes)
            os.fsync(descriptor)  # or a power cut could leave the name on unwritten bytes
            temporary.replace(path)
            sync_folder(path.parent)


def remove_abandoned(folder: Path) -> int:
    """Removes what writers left that ended before they were done; returns the bytes freed."""
    freed = 0
    for path in folder.glob(f"*{TEMPORARY_SUFFIX}"):
        with suppress(OSError):  # gone meanwhile, or not ours to remove
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused: its writer lives
                num_bytes = os.fstat(descriptor).st_size
                path.unlink()
                freed += num_bytes
            finally:
                os.close(descriptor)
    return freed


def anonymous_pages(num_bytes: int) -> mmap.mmap:
    """Returns private memory of zeros on a page, in huge pages where the system has them; OSError if there is none."""
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def _map_pages(path: Path, flags: int) -> memoryview:
    """The whole file; the mapping lives as long as any part of what is returned."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode) or info.st_size == 0:
            raise BrokenPackError("it is no file, or an empty one")
        return memoryview(mmap.mmap(descriptor, info.st_size, flags=flags, prot=mmap.PROT_READ))
    finally:
        os.close(descriptor)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CannotKeepError(f"{path.parent}: {error.strerror or error}") from error


@contextmanager
def _temporary(path: Path) -> Iterator[tuple[int, Path]]:
    """A new, locked file beside `path`; whatever still has its name at the end is removed."""
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path.parent)
        descriptor, temporary = _create_locked(path)
    try:
        yield descriptor, temporary
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        os.close(descriptor)


def _create_locked(path: Path) -> tuple[int, Path]:
    while True:
        temporary = path.with_name(f"{path.stem}.{os.urandom(4).hex()}{TEMPORARY_SUFFIX}")
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        with suppress(OSError):  # no locks on this file system: then nobody removes it, either
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor, temporary
        os.close(descriptor)  # taken for abandoned between the two calls


def _reserve(descriptor: int, num_bytes: int) -> None:
    """Makes a full disk known before any work is done."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def _clear(view: memoryview) -> None:
    step = 2**20
    zeros = bytes(step)
    for begin in range(0, len(view), step):
        part = view[begin : begin + step]
        part[:] = zeros[: len(part)]
