"""One entry of the prefix cache as a file: whole and checked, or not there.

    magic, version, bytes of table and data, number of tokens, checksum of all this, table and tokens   64 bytes
    table: owner, model, facts of each layer, name, type and shape of each plane, checksum of the data  JSON
    tokens                                                                                big-endian int32
    data: the planes, one after another

Who looks for a prefix reads the head and the tokens; the data are read, and checked, once they are wanted. Knows bytes
and files, neither models nor caches; whether a file is needed, and where, is `prefix_disk.py`'s.
"""

import fcntl
import hashlib
import json
import math
import os
import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_edge.engine.prefix.index import TOKEN_BYTES
from mlx_edge.weights import TensorEntry
from mlx_edge.weights.dtypes import ELEMENT_TYPES
from mlx_edge.weights.writer import sync_folder

MAGIC = b"MLXEPREF"
VERSION = 1
SUFFIX = ".prefix"
TEMPORARY_SUFFIX = ".prefix.part"

_START = struct.Struct("<8sIIQQ")
_HEAD_BYTES = 64
_MAX_TABLE_BYTES = 1 << 26
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class BrokenPrefixError(Exception):
    """The bytes are no whole entry; the text says why. Never leaves this package."""


class OtherVersionError(Exception):
    """A file of another version of this format."""


@dataclass(frozen=True)
class PrefixRecord:
    """An entry as plain bytes. `facts` are JSON values, one per layer; planes are told by name, type and shape."""

    owner: str  # of the model and the options of its caches, as a hash
    model: str  # of the model alone
    tokens: bytes
    facts: Sequence[Any]
    planes: Sequence[tuple[str, str, tuple[int, ...]]]
    data: Sequence[bytes]  # of each plane

    @property
    def num_bytes(self) -> int:
        """Size of its file, at most."""
        table = 512 + 256 * len(self.planes)  # names, types and shapes, and the facts of each layer
        return _HEAD_BYTES + table + len(self.tokens) + sum(map(len, self.data))


@dataclass(frozen=True)
class PrefixHead:
    """What a file tells before its data are read."""

    table: Mapping[str, Any]
    tokens: bytes
    data_begin: int

    @property
    def owner(self) -> str:
        """As in the record."""
        return str(self.table["owner"])

    @property
    def model(self) -> str:
        """As in the record."""
        return str(self.table["model"])

    @property
    def facts(self) -> list[Any]:
        """As in the record; its items are not checked."""
        return list(self.table["facts"])


class PrefixPlanes:
    """The planes of a file that was read and checked, as `restore_caches` takes them."""

    def __init__(self, head: PrefixHead, data: bytes) -> None:
        """Raises: BrokenPrefixError when the table tells of other planes than the data have room for."""
        self._data = data
        self.tensors: dict[str, TensorEntry] = {}
        begin = 0
        for name, dtype, shape in head.table["planes"]:
            end = begin + math.prod(shape) * ELEMENT_TYPES[dtype].size
            self.tensors[name] = TensorEntry(name, dtype, tuple(shape), begin, end)
            begin = end
        if begin != len(data):
            raise BrokenPrefixError("its planes do not fill its data")

    def read(self, name: str) -> mx.array:
        """One plane, copied."""
        entry = self.tensors[name]
        element = ELEMENT_TYPES[entry.dtype]
        words = np.frombuffer(
            self._data, _WORDS[element.size], math.prod(entry.shape), offset=entry.begin
        )
        return mx.array(words).view(element.mlx).reshape(entry.shape)


def write_record(path: Path, record: PrefixRecord, used_s: float) -> None:
    """Write a record under a temporary name, which then becomes `path`; `used_s` is the time it was last used.

    Raises: OSError if the disk refuses; nothing is left behind then.
    """
    table = _format_table(record)
    num_bytes = sum(map(len, record.data))
    start = _START.pack(MAGIC, VERSION, len(table), num_bytes, len(record.tokens) // TOKEN_BYTES)
    head = start + _digest(start, table, record.tokens)
    descriptor, temporary = _create_locked(path)
    try:
        with os.fdopen(descriptor, "wb") as file:
            for part in (head, table, record.tokens, *record.data):
                file.write(part)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the name on unwritten bytes
            os.utime(temporary, (used_s, used_s))
            temporary.replace(path)  # while the lock is held: nobody takes it for abandoned
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def read_head(path: Path) -> PrefixHead:
    """The checked head and tokens of a file.

    Raises: BrokenPrefixError for one that is not whole, OtherVersionError, OSError if it cannot be read.
    """
    with _opened(path) as descriptor:
        return _read_head(descriptor)[0]


def read_planes(path: Path) -> tuple[PrefixHead, PrefixPlanes]:
    """All of a file, checked.

    Raises: BrokenPrefixError, OtherVersionError, OSError as `read_head` does.
    """
    with _opened(path) as descriptor:
        head, num_bytes = _read_head(descriptor)
        data = _read(descriptor, head.data_begin, num_bytes)
    if hashlib.blake2b(data, digest_size=32).hexdigest() != head.table["data"]:
        raise BrokenPrefixError("its data do not match their checksum")
    try:
        return head, PrefixPlanes(head, data)
    except (ValueError, TypeError, LookupError, ArithmeticError) as error:
        raise BrokenPrefixError("its table tells of no planes") from error


def remove_abandoned(path: Path) -> None:
    """Remove a temporary file unless its writer lives, in whatever process or container."""
    with suppress(OSError), _opened(path) as descriptor:  # gone meanwhile, or not ours to remove
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused: its writer lives
        path.unlink()


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A file's descriptor; a link is not followed, a pipe not waited for."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _format_table(record: PrefixRecord) -> bytes:
    digest = hashlib.blake2b(digest_size=32)
    for part in record.data:
        digest.update(part)
    table = {
        "owner": record.owner,
        "model": record.model,
        "facts": record.facts,
        "planes": record.planes,
        "data": digest.hexdigest(),
    }
    return json.dumps(table, separators=(",", ":")).encode()


def _read_head(descriptor: int) -> tuple[PrefixHead, int]:
    """The head, and the bytes of the data behind it."""
    info = os.fstat(descriptor)
    if not stat.S_ISREG(info.st_mode) or info.st_size < _HEAD_BYTES:
        raise BrokenPrefixError("it is no file, or too short for one")
    raw = _read(descriptor, 0, _HEAD_BYTES)
    magic, version, table_bytes, data_bytes, num_tokens = _START.unpack_from(raw)
    if magic != MAGIC:
        raise BrokenPrefixError("it does not begin as an entry does")
    if version != VERSION:
        raise OtherVersionError
    data_begin = _HEAD_BYTES + table_bytes + num_tokens * TOKEN_BYTES
    if data_begin + data_bytes != info.st_size or table_bytes > _MAX_TABLE_BYTES:
        raise BrokenPrefixError(f"its head does not tell of {info.st_size} bytes")
    rest = _read(descriptor, _HEAD_BYTES, data_begin - _HEAD_BYTES)
    table, tokens = rest[:table_bytes], rest[table_bytes:]
    if _digest(raw[: _START.size], table, tokens) != raw[_START.size :]:
        raise BrokenPrefixError("its head does not match its checksum")
    try:
        parsed = json.loads(table)
    except (ValueError, RecursionError) as error:
        raise BrokenPrefixError("its table is not JSON") from error
    if not isinstance(parsed, dict) or _TABLE_KEYS - set(parsed):
        raise BrokenPrefixError("its table lacks what it should tell")
    return PrefixHead(parsed, tokens, data_begin), data_bytes


_TABLE_KEYS = {"owner", "model", "facts", "planes", "data"}


def _read(descriptor: int, begin: int, count: int) -> bytes:
    parts = []
    while count:
        part = os.pread(descriptor, min(count, 1 << 30), begin)
        if not part:
            raise BrokenPrefixError("it became shorter while it was read")
        parts.append(part)
        begin, count = begin + len(part), count - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _digest(start: bytes, table: bytes, tokens: bytes) -> bytes:
    size = _HEAD_BYTES - _START.size
    return hashlib.blake2b(start + table + tokens, digest_size=size).digest()


def _create_locked(path: Path) -> tuple[int, Path]:
    while True:
        temporary = path.with_name(f"{path.stem}.{os.urandom(4).hex()}{TEMPORARY_SUFFIX}")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        descriptor = os.open(temporary, flags, 0o600)
        with suppress(OSError):  # no locks on this file system
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor, temporary
        os.close(descriptor)  # taken for abandoned between the two calls
