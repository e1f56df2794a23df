"""The head of a pack cache file: which parts lie where, for which key, and how to tell that they are whole.

    magic, version, length of the table, length of the file, checksum of all this      64 bytes
    table: key, and for each part its name, begin, length, checksums of its two ends   JSON
    parts, each on a multiple of 64, the first on a page

Pure: bytes in, verdict out. Knows neither files nor what a part holds. The checksums cover the head and the first and
last 4 KiB of every part: enough against a file that was cut, left half written or mixed up. A bit that flips in the
middle of a large part is not seen; reading everything would cost what the cache is there to save.
"""

import hashlib
import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

MAGIC = b"MLXEPACK"
VERSION = 1  # of this head; the layout inside the parts is the caller's, and belongs into its key
PART_ALIGNMENT = 64
PAGE_BYTES = 4096

_START = struct.Struct("<8sIIQ")
_HEAD_BYTES = 64
_MAX_TABLE_BYTES = 2**28
_DIGITS = 20  # of the longest number in the table

Ends = tuple[int, int]


class BrokenPackError(Exception):
    """The bytes are no whole pack file for this key; the text says why. Never leaves this package."""


@dataclass(frozen=True)
class Part:
    """A piece of packed weights as its caller knows it: a name, and a size in bytes."""

    name: str
    num_bytes: int


@dataclass(frozen=True)
class PackLayout:
    """Where the parts of one key lie in their file; a function of key and parts alone."""

    key: str
    parts: tuple[Part, ...]
    begins: tuple[int, ...]
    file_bytes: int

    @classmethod
    def plan(cls, key: str, parts: Sequence[Part]) -> "PackLayout":
        """Returns the only layout that these parts have."""
        assert len({part.name for part in parts}) == len(parts), "two parts of one name"
        num_numbers = 4 * len(parts)
        names = sum(len(json.dumps(part.name)) for part in parts) + len(json.dumps(key))
        reached = _round_up(_HEAD_BYTES + 64 + names + num_numbers * (_DIGITS + 4), PAGE_BYTES)
        begins = []
        for part in parts:
            begins.append(reached)
            reached = _round_up(reached + part.num_bytes, PART_ALIGNMENT)
        return cls(key, tuple(parts), tuple(begins), reached)

    def format_head(self, ends: Sequence[Ends]) -> bytes:
        """Returns the bytes in front of the parts; `ends` are the checksums of each part."""
        rows = [
            [part.name, begin, part.num_bytes, *pair]
            for part, begin, pair in zip(self.parts, self.begins, ends, strict=True)
        ]
        table = json.dumps({"key": self.key, "parts": rows}, separators=(",", ":")).encode()
        start = _START.pack(MAGIC, VERSION, len(table), self.file_bytes)
        return (start + _digest(start, table)).ljust(_HEAD_BYTES, b"\0") + table

    def cut(self, data: memoryview) -> dict[str, memoryview]:
        """Returns the parts of a file of this layout, by name."""
        return {
            part.name: data[begin : begin + part.num_bytes]
            for part, begin in zip(self.parts, self.begins, strict=True)
        }

    def verify(self, data: memoryview) -> None:
        """Raises BrokenPackError unless `data` is a whole file of exactly this layout."""
        key = read_key(data)
        if key != self.key:
            raise BrokenPackError("it was packed for other weights or for another layout")
        if len(data) != self.file_bytes:
            raise BrokenPackError("it holds parts of other sizes")
        # The head is made again from what is there: nothing in the file is trusted to be well formed.
        head = self.format_head([check_ends(view) for view in self.cut(data).values()])
        if data[: len(head)] != head:
            raise BrokenPackError("its parts are not those that were written")


def read_key(data: memoryview) -> str:
    """Returns the key that a pack file was made for; raises BrokenPackError if its head is not whole."""
    if len(data) < _HEAD_BYTES:
        raise BrokenPackError(f"{len(data)} bytes are no pack file")
    magic, version, table_bytes, file_bytes = _START.unpack_from(data)
    if magic != MAGIC or version != VERSION:
        raise BrokenPackError("it is no pack file of this version")
    if len(data) != file_bytes:
        raise BrokenPackError(f"{len(data)} bytes are left of {file_bytes}")
    table = bytes(data[_HEAD_BYTES : _HEAD_BYTES + min(table_bytes, _MAX_TABLE_BYTES)])
    digest = _digest(bytes(data[: _START.size]), table)
    if data[_START.size : _START.size + len(digest)] != digest:
        raise BrokenPackError("its head does not match its checksum")
    try:
        return str(json.loads(table)["key"])
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise BrokenPackError("its head is no table") from error


def check_ends(part: memoryview) -> Ends:
    """Returns checksums of the first and the last 4 KiB of a part."""
    return zlib.crc32(part[:PAGE_BYTES]), zlib.crc32(part[-PAGE_BYTES:])


def _digest(start: bytes, table: bytes) -> bytes:
    return hashlib.blake2b(start + table, digest_size=32).digest()


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step
