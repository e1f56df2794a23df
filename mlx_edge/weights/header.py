"""The header of a safetensors file: bytes in, checked table of tensors out.

Format: https://github.com/huggingface/safetensors (8 bytes little-endian length N, N bytes of JSON,
then the data). Pure: it looks only at the bytes it is given. Knows neither arrays nor where the
bytes come from.

As strict as the reference implementation: the tensors must fill the data part from its first to its
last byte, without overlap and without a hole, so that no byte of a file is outside what its header
says. (Files that start their data on a page boundary do so with a longer header: JSON may end in
spaces.)
"""

import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from mmap import mmap
from types import MappingProxyType
from typing import Any, NoReturn

from mlx_edge.errors import ModelFormatError
from mlx_edge.weights.dtypes import ELEMENT_TYPES, UNSUPPORTED_TYPES

MAX_HEADER_BYTES = 100_000_000  # the reference implementation's and MLX's limit
MAX_DIM = 2**31 - 1  # MLX shapes are int32
MAX_NUM_DIMS = 32  # far above any model, far below where numpy (64) gives up
MAX_BYTES = 2**63 - 1  # offsets and strides are int64
METADATA_KEY = "__metadata__"
GET_AGAIN = "download or convert the file again"

_LENGTH_BYTES = 8
_LFS_POINTER = b"version https://git-lfs"

Place = tuple[str, str]  # a tensor for messages: its file and name, in words only when it fails


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies in its file and what it is.

    `dtype` is the safetensors spelling ("BF16"); `begin` and `end` are offsets in bytes from the
    start of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor in the file."""
        return self.end - self.begin


@dataclass(frozen=True)
class Header:
    """A checked header: tensors in the order of their bytes, and the file's free-form metadata."""

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]


def parse_header(source: str, data: bytes | mmap) -> Header:
    """Checks and returns the header of the safetensors file whose whole content is `data`.

    `source` names the file in messages. Raises ModelFormatError, and nothing else, for whatever the
    bytes are.
    """
    data_begin = _read_data_begin(source, data)
    raw = data[_LENGTH_BYTES:data_begin]
    if not raw.startswith(b"{"):
        fail(source, f"a header that starts with {show(raw[:8])}", "a JSON object, '{'", GET_AGAIN)
    table = parse_json_object(f"{source}: header", raw)
    metadata = _check_metadata(source, table.pop(METADATA_KEY, None))
    entries = [_parse_entry(source, name, value, data_begin) for name, value in table.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    _check_layout(source, entries, data_begin, len(data))
    return Header(MappingProxyType({entry.name: entry for entry in entries}), metadata)


def parse_json_object(source: str, raw: bytes) -> dict[str, Any]:
    """Returns the JSON object in `raw`; whatever is broken in it raises ModelFormatError."""
    try:
        parsed = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_reject_doubles, parse_constant=_reject_constant
        )
    except RecursionError:
        fail(source, "JSON nested beyond reason", "a flat table", GET_AGAIN)
    except (
        ValueError
    ) as error:  # covers UnicodeDecodeError, JSONDecodeError and numbers of thousands of digits
        fail(
            source, f"broken JSON ({show_text(str(error))})", "one JSON object in UTF-8", GET_AGAIN
        )
    if not isinstance(parsed, dict):
        fail(source, f"JSON of type {type(parsed).__name__}", "one JSON object", GET_AGAIN)
    return parsed


def fail(source: str, found: str, expected: str, remedy: str) -> NoReturn:
    """Raises ModelFormatError: where, what was found, what was expected, what to do."""
    raise ModelFormatError(f"{source}: found {found}; expected {expected}; {remedy}")


def show(value: object) -> str:
    """A value from an untrusted file as short text on one line, however large or deep it is."""
    return _SHORT.repr(value)


def show_text(text: str) -> str:
    """A message of another library, cut to a length that fits on one line."""
    return " ".join(text.split())[:120]


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlevel = 3


def _read_data_begin(source: str, data: bytes | mmap) -> int:
    """The offset of the first data byte, from the length in front of the header."""
    prefix = data[: len(_LFS_POINTER)]
    if prefix == _LFS_POINTER:
        fail(source, "a git-lfs pointer", "the file that it points to", "run `git lfs pull`")
    if len(data) < _LENGTH_BYTES:
        fail(source, f"{len(data)} bytes", "a safetensors file (at least 8 bytes)", GET_AGAIN)
    header_bytes = int.from_bytes(prefix[:_LENGTH_BYTES], "little")
    if header_bytes > MAX_HEADER_BYTES:
        found = f"a header length of {header_bytes} bytes"
        fail(
            source,
            found,
            f"at most {MAX_HEADER_BYTES}",
            "this is no safetensors file, or a broken one",
        )
    if _LENGTH_BYTES + header_bytes > len(data):
        found = f"a header of {header_bytes} bytes in a file of {len(data)}"
        fail(source, found, "a header inside the file", f"the file is truncated: {GET_AGAIN}")
    return _LENGTH_BYTES + header_bytes


def _reject_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise ValueError(f"the key {show(key)} appears twice")
        key.encode(
            "utf-8"
        )  # a lone surrogate is no text; it would fail much later, when a name is printed
        table[key] = value
    return table


def _reject_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _check_metadata(source: str, value: object) -> Mapping[str, str]:
    if value is None:  # MLX writes `"__metadata__": null` where there is none
        return MappingProxyType({})
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        fail(source, f"{METADATA_KEY} = {show(value)}", "a table of strings", GET_AGAIN)
    return MappingProxyType(value)


def _parse_entry(source: str, name: str, value: object, data_begin: int) -> TensorEntry:
    where = source, name
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        _fail_tensor(where, show(value), "exactly dtype, shape and data_offsets", GET_AGAIN)
    dtype, shape = value["dtype"], _check_shape(where, value["shape"])
    begin, end = _check_offsets(where, value["data_offsets"])
    if not isinstance(dtype, str) or dtype not in ELEMENT_TYPES:
        known = isinstance(dtype, str) and dtype in UNSUPPORTED_TYPES
        found = f"dtype {show(dtype)}, which is {'not supported' if known else 'unknown'}"
        _fail_tensor(
            where,
            found,
            f"one of {', '.join(ELEMENT_TYPES)}",
            "convert the model to one of these first",
        )
    expected = math.prod(shape) * ELEMENT_TYPES[dtype].size
    if end - begin != expected:
        found = f"{end - begin} bytes (data_offsets {show([begin, end])})"
        _fail_tensor(where, found, f"{show(expected)} for {dtype} {show(list(shape))}", GET_AGAIN)
    return TensorEntry(name, dtype, shape, data_begin + begin, data_begin + end)


def _is_count(value: object) -> bool:
    """True for a non-negative int; JSON's true is a Python int, but not a count."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_shape(where: Place, shape: object) -> tuple[int, ...]:
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        _fail_tensor(
            where,
            f"shape {show(shape)}",
            "a list of sizes (whole numbers, not negative)",
            GET_AGAIN,
        )
    if len(shape) > MAX_NUM_DIMS:
        _fail_tensor(where, f"{len(shape)} dimensions", f"at most {MAX_NUM_DIMS}", GET_AGAIN)
    if any(dim > MAX_DIM for dim in shape):
        _fail_tensor(
            where,
            f"shape {show(shape)}",
            f"sizes up to {MAX_DIM} (MLX counts in int32)",
            "split the tensor",
        )
    if math.prod(dim or 1 for dim in shape) > MAX_BYTES // 8:  # strides count past a size of 0, too
        _fail_tensor(where, f"shape {show(shape)}", "a tensor that 64 bits can address", GET_AGAIN)
    return tuple(shape)


def _check_offsets(where: Place, offsets: object) -> tuple[int, int]:
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        _fail_tensor(
            where, f"data_offsets {show(offsets)}", "two whole numbers, not negative", GET_AGAIN
        )
    begin, end = offsets
    if not begin <= end <= MAX_BYTES:
        _fail_tensor(
            where, f"data_offsets {show(offsets)}", "a begin up to the end, in 64 bits", GET_AGAIN
        )
    return begin, end


def _fail_tensor(where: Place, found: str, expected: str, remedy: str) -> NoReturn:
    source, name = where
    fail(f"{source}: tensor {show(name)}", found, expected, remedy)


def _check_layout(
    source: str, entries: list[TensorEntry], data_begin: int, file_bytes: int
) -> None:
    """Refuses overlaps, holes, and data that is shorter or longer than the (sorted) entries say."""
    reached = data_begin
    for entry in entries:
        if entry.begin != reached:
            kind = "an overlap" if entry.begin < reached else "a hole"
            found = (
                f"{kind} before tensor {show(entry.name)} at data byte {entry.begin - data_begin}"
            )
            fail(source, found, f"it at {reached - data_begin}, behind the last", GET_AGAIN)
        reached = entry.end
    if reached > file_bytes:
        found = f"{file_bytes} bytes, the file is truncated"
        fail(source, found, f"{reached} bytes, as its header says", GET_AGAIN)
    if reached < file_bytes:
        found = f"{file_bytes - reached} bytes behind the last tensor"
        fail(source, found, "the file to end there", GET_AGAIN)
