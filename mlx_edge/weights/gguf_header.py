"""The header of a GGUF file: bytes in, checked metadata and table of tensors out.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (magic, version, two counts, key-value pairs, tensor
infos, padding, data). Pure: it looks only at the bytes it is given. The `gguf` package's own reader trusts what it
reads, and needs half a minute for a vocabulary of 128,000 tokens; so only its dequantization is used, elsewhere.

No count and no length is believed before the bytes that it asks for are known to be there. Knows neither arrays nor
what a key or a tensor means.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from mmap import mmap
from types import MappingProxyType

from mlx_edge.weights.header import GET_AGAIN, MAX_DIM, fail, show

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 1 << 26  # the largest vocabularies take 16 MB
MAX_NAME_BYTES = {"key": 65535, "tensor name": 64}  # the format's own limits
MAX_NUM_DIMS = 4
DEFAULT_ALIGNMENT = 32

Value = int | float | bool | str | list[int] | list[float] | list[str]


@dataclass(frozen=True)
class BlockType:
    """How values are stored: `num_values` of them in a block of `num_bytes`."""

    name: str
    num_values: int
    num_bytes: int


# By the number that stands in files. Those that the gguf package turns into floats.
BLOCK_TYPES: Mapping[int, BlockType] = {
    number: BlockType(name, num_values, num_bytes)
    for number, name, num_values, num_bytes in (
        (0, "F32", 1, 4),
        (1, "F16", 1, 2),
        (2, "Q4_0", 32, 18),
        (3, "Q4_1", 32, 20),
        (6, "Q5_0", 32, 22),
        (7, "Q5_1", 32, 24),
        (8, "Q8_0", 32, 34),
        (10, "Q2_K", 256, 84),
        (11, "Q3_K", 256, 110),
        (12, "Q4_K", 256, 144),
        (13, "Q5_K", 256, 176),
        (14, "Q6_K", 256, 210),
        (16, "IQ2_XXS", 256, 66),
        (17, "IQ2_XS", 256, 74),
        (18, "IQ3_XXS", 256, 98),
        (19, "IQ1_S", 256, 50),
        (20, "IQ4_NL", 32, 18),
        (21, "IQ3_S", 256, 110),
        (22, "IQ2_S", 256, 82),
        (23, "IQ4_XS", 256, 136),
        (29, "IQ1_M", 256, 56),
        (30, "BF16", 1, 2),
        (34, "TQ1_0", 256, 54),
        (35, "TQ2_0", 256, 66),
        (39, "MXFP4", 32, 17),
    )
}
_OTHER_TYPES = {
    **{9: "Q8_1", 15: "Q8_K", 40: "NVFP4", 41: "Q1_0"},
    **{24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64"},
}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?"}
_SCALARS |= {10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_MIN_PAIR_BYTES, _MIN_TENSOR_BYTES = 14, 33


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies and what it is; `begin` and `end` in bytes from the start of the file."""

    name: str
    type: BlockType
    shape: tuple[int, ...]  # rows first, as numpy and MLX count; files say it the other way round
    begin: int
    end: int

    @property
    def num_rows(self) -> int:
        """Rows of the tensor seen as a matrix."""
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.shape[-1] // self.type.num_values * self.type.num_bytes


@dataclass(frozen=True)
class GGUFHeader:
    """A checked header: metadata by key, tensors by name in the order of the file, and where data begins."""

    metadata: Mapping[str, Value]
    tensors: Mapping[str, GGUFTensor]
    data_begin: int


def parse_gguf_header(source: str, data: bytes | mmap) -> GGUFHeader:
    """Checks and returns the header of the GGUF file whose whole content is `data`.

    `source` names the file in messages. Raises ModelFormatError, and nothing else, for whatever the bytes are; memory
    is bounded by a few times MAX_HEADER_BYTES.
    """
    cursor = _Cursor(source, data)
    _check_start(cursor)
    num_tensors, num_pairs = cursor.number("Q"), cursor.number("Q")
    cursor.check_count(num_pairs, _MIN_PAIR_BYTES, "metadata pairs")
    cursor.check_count(num_tensors, _MIN_TENSOR_BYTES, "tensors")
    metadata: dict[str, Value] = {}
    for _ in range(num_pairs):
        key = cursor.name("key")
        if key in metadata:
            fail(source, f"the key {show(key)} twice", "each key once", GET_AGAIN)
        metadata[key] = _read_value(cursor, key)
    alignment = _check_alignment(source, metadata.get("general.alignment", DEFAULT_ALIGNMENT))
    tensors: dict[str, GGUFTensor] = {}
    for _ in range(num_tensors):
        tensor = _read_tensor(cursor, alignment)
        if tensor.name in tensors:
            fail(source, f"the tensor {show(tensor.name)} twice", "each tensor once", GET_AGAIN)
        tensors[tensor.name] = tensor
    data_begin = -(-cursor.position // alignment) * alignment
    placed = {name: _place(tensor, data_begin) for name, tensor in tensors.items()}
    _check_layout(source, placed, len(data))
    return GGUFHeader(MappingProxyType(metadata), MappingProxyType(placed), data_begin)


class _Cursor:
    """A place in the header that moves on as values are read, never past the end."""

    def __init__(self, source: str, data: bytes | mmap) -> None:
        self.source = source
        self.position = 0
        self._data = data
        self._end = min(len(data), MAX_HEADER_BYTES)

    def take(self, num_bytes: int, what: str) -> bytes:
        """The next bytes; `what` says in messages what they are."""
        end = self.position + num_bytes
        if end > self._end:
            self._fail_short(num_bytes, what)
        taken = self._data[self.position : end]
        self.position = end
        return taken

    def number(self, code: str, what: str = "a number") -> int:
        """The next whole number, by its letter in `struct`."""
        value: int = struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]
        return value

    def text(self, what: str) -> str:
        """The next string: its length, then UTF-8."""
        raw = self.take(self.number("Q", what), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            fail(self.source, f"{what} {show(raw)}", "a text in UTF-8", GET_AGAIN)

    def name(self, what: str) -> str:
        """The next string, of a key or a tensor, not longer than the format allows."""
        begin, limit = self.position, MAX_NAME_BYTES[what]
        length = self.number("Q", what)
        if not 0 < length <= limit:
            fail(self.source, f"a {what} of {length} bytes", f"1 to {limit}", GET_AGAIN)
        self.position = begin
        return self.text(what)

    def check_count(self, count: int, least_bytes: int, what: str) -> None:
        """Refuses a count of things that the rest of the header has no room for."""
        if count * least_bytes > self._end - self.position:
            found = f"{count} {what} announced {self._end - self.position} bytes before the end"
            fail(self.source, found, "a header that holds them", GET_AGAIN)

    def _fail_short(self, num_bytes: int, what: str) -> None:
        found = f"{what} of {num_bytes} bytes at byte {self.position}"
        if len(self._data) > self._end:
            expected = f"a header of at most {MAX_HEADER_BYTES} bytes"
        else:
            expected = f"it to end within the file's {len(self._data)} bytes"
        fail(self.source, found, expected, f"the file is broken or truncated: {GET_AGAIN}")


def _check_start(cursor: _Cursor) -> None:
    magic = cursor.take(4, "the magic number")
    if magic != MAGIC:
        fail(cursor.source, f"a file that starts with {show(magic)}", "GGUF", "check the path")
    version = cursor.number("I", "the version")
    if version & 0xFFFF == 0 and version:
        fail(cursor.source, "a big-endian file", "little-endian", "convert it on this machine")
    if version not in VERSIONS:
        known = " or ".join(map(str, VERSIONS))
        fail(cursor.source, f"GGUF version {version}", known, "convert it again with llama.cpp")


def _read_value(cursor: _Cursor, key: str) -> Value:
    what = f"the value of {show(key)}"
    kind = cursor.number("I", what)
    if kind == _STRING:
        return cursor.text(what)
    if kind != _ARRAY:
        return _read_numbers(cursor, kind, 1, what)[0]
    kind, count = cursor.number("I", what), cursor.number("Q", what)
    if kind == _STRING:
        cursor.check_count(count, 8, f"texts of {show(key)}")
        return [cursor.text(what) for _ in range(count)]
    return _read_numbers(cursor, kind, count, what)


def _read_numbers(cursor: _Cursor, kind: int, count: int, what: str) -> list[int] | list[float]:
    code = _SCALARS.get(kind)
    if code is None:
        known = "a scalar, a text or a list of them (types 0 to 12, lists not nested)"
        fail(cursor.source, f"{what} of type {kind}", known, GET_AGAIN)
    size = struct.calcsize("<" + code)
    cursor.check_count(count, size, f"numbers as {what}")
    raw = cursor.take(count * size, what)
    if kind == _BOOL and max(raw, default=0) > 1:
        fail(cursor.source, f"{what} of the byte {max(raw)}", "0 or 1 for a truth value", GET_AGAIN)
    return list(struct.unpack(f"<{count}{code}", raw))


def _check_alignment(source: str, value: Value) -> int:
    is_power = type(value) is int and 0 < value <= 1 << 20 and value & (value - 1) == 0
    if not is_power:
        fail(source, f"general.alignment = {show(value)}", "a power of two", GET_AGAIN)
    assert isinstance(value, int)
    return value


def _read_tensor(cursor: _Cursor, alignment: int) -> GGUFTensor:
    """A tensor with `begin` and `end` counted from the first byte of data."""
    name = cursor.name("tensor name")
    where = f"{cursor.source}: tensor {show(name)}"
    num_dims = cursor.number("I", "dimensions")
    if not 0 < num_dims <= MAX_NUM_DIMS:
        fail(where, f"{num_dims} dimensions", f"1 to {MAX_NUM_DIMS}", GET_AGAIN)
    shape = tuple(cursor.number("Q", "a size") for _ in range(num_dims))[::-1]
    kind = _find_type(where, cursor.number("I", "a type"))
    begin = cursor.number("Q", "an offset")
    if not all(0 < size <= MAX_DIM for size in shape):
        fail(where, f"shape {show(list(shape))}", f"sizes of 1 to {MAX_DIM}", GET_AGAIN)
    if shape[-1] % kind.num_values:
        expected = f"a multiple of {kind.num_values}, the block of {kind.name}"
        fail(where, f"{shape[-1]} columns", expected, GET_AGAIN)
    if begin % alignment:
        fail(where, f"offset {begin}", f"a multiple of the alignment {alignment}", GET_AGAIN)
    num_bytes = math.prod(shape) // kind.num_values * kind.num_bytes
    return GGUFTensor(name, kind, shape, begin, begin + num_bytes)


def _find_type(where: str, number: int) -> BlockType:
    kind = BLOCK_TYPES.get(number)
    if kind is None:
        name = _OTHER_TYPES.get(number, "not known")
        known = ", ".join(kind.name for kind in BLOCK_TYPES.values())
        fail(where, f"type {number} ({name})", f"one of {known}", "take another file of the model")
    return kind


def _place(tensor: GGUFTensor, data_begin: int) -> GGUFTensor:
    begin, end = data_begin + tensor.begin, data_begin + tensor.end
    return GGUFTensor(tensor.name, tensor.type, tensor.shape, begin, end)


def _check_layout(source: str, tensors: Mapping[str, GGUFTensor], file_bytes: int) -> None:
    """Refuses tensors that overlap or reach past the end of the file; holes are padding."""
    reached = 0
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.begin):
        where = f"{source}: tensor {show(tensor.name)}"
        if tensor.begin < reached:
            fail(where, f"a begin at byte {tensor.begin}", f"{reached} or later", GET_AGAIN)
        if tensor.end > file_bytes:
            found = f"an end at byte {tensor.end}"
            fail(where, found, f"at most {file_bytes}, the file's size", f"truncated: {GET_AGAIN}")
        reached = tensor.end
