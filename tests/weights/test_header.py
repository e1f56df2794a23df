"""Every way in which a header can be wrong has its own line, and is a ModelFormatError."""

import json

import pytest

from mlx_edge.errors import ModelFormatError
from mlx_edge.weights.dtypes import ELEMENT_TYPES
from mlx_edge.weights.header import MAX_HEADER_BYTES, parse_header
from tests.weights.files import item, pack

SOUND = {"a": item("F32", [2, 3], [0, 24]), "b": item("I8", [4], [24, 28])}


def parse(header, data=b""):
    return parse_header("file.safetensors", pack(header, data))


def refuse(header, data=b""):
    with pytest.raises(ModelFormatError) as caught:
        parse(header, data)
    message = str(caught.value)
    assert message.startswith("file.safetensors")
    assert "\n" not in message
    assert len(message) < 600
    return message


def test_sound_header_in_byte_order_with_absolute_offsets():
    table = {"b": SOUND["b"], "__metadata__": {"format": "mlx"}, "a": SOUND["a"]}
    header = parse(table, bytes(28))
    start = 8 + len(json.dumps(table))
    assert list(header.tensors) == ["a", "b"]
    assert header.metadata == {"format": "mlx"}
    entry = header.tensors["a"]
    assert (entry.dtype, entry.shape, entry.begin, entry.end) == ("F32", (2, 3), start, start + 24)
    assert entry.num_bytes == 24


def test_no_tensors_padding_and_null_metadata_are_sound():
    assert not parse({}).tensors
    assert parse(json.dumps(SOUND).encode().ljust(5000), bytes(28)).tensors
    assert parse({"__metadata__": None}).metadata == {}


def test_every_type_has_its_size():
    for name, element in ELEMENT_TYPES.items():
        assert element.size == element.mlx.size
        parse({"a": item(name, [3], [0, 3 * element.size])}, bytes(3 * element.size))


@pytest.mark.parametrize("data", [b"", b"1234567", b"\0" * 7])
def test_shorter_than_a_length(data):
    with pytest.raises(ModelFormatError, match=f"found {len(data)} bytes; expected a safetensors"):
        parse_header("f", data)


def test_header_length_beyond_reason_and_beyond_the_file():
    length = (MAX_HEADER_BYTES + 1).to_bytes(8, "little")
    with pytest.raises(ModelFormatError, match=f"at most {MAX_HEADER_BYTES}"):
        parse_header("f", length + b"{}")
    with pytest.raises(ModelFormatError, match=r"header of 50 bytes in a file of 10.*truncated"):
        parse_header("f", (50).to_bytes(8, "little") + b"{}")


def test_lfs_pointer_and_zip_are_named_or_refused():
    with pytest.raises(ModelFormatError, match="git lfs pull"):
        parse_header("f", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(ModelFormatError, match="no safetensors file"):
        parse_header("f", b"PK\x03\x04" + b"\xff" * 100)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "expected a JSON object"),
        (b"[]", "expected a JSON object"),
        (b" {}", "expected a JSON object"),
        (b"{", "broken JSON"),
        (b"{}x", "broken JSON"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"\xff": 1}', "broken JSON"),
        (b'{"a": {}, "a": {}}', "'a' appears twice"),
        (b'{"\\ud800": {}}', "broken JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "broken JSON"),
        (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested beyond reason"),
        (b'{"a":' * 100_000, "nested beyond reason"),
        (b'{"__metadata__": {"a": 1}}', "__metadata__"),
        (b'{"__metadata__": []}', "__metadata__"),
        (b'{"a": 1}', "exactly dtype, shape and data_offsets"),
        (b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}", "exactly dtype, shape and data_offsets"),
    ],
)
def test_broken_json(raw, words):
    assert words in refuse(raw)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"dtype": "F32", "shape": [1]}, "exactly dtype"),
        (item("F32", [1], [0, 4]) | {"extra": 1}, "exactly dtype"),
        (item("F33", [1], [0, 4]), "'F33', which is unknown"),
        (item("F8_E4M3", [4], [0, 4]), "'F8_E4M3', which is not supported"),
        (item(None, [1], [0, 4]), "which is unknown"),
        (item(["F32"], [1], [0, 4]), "which is unknown"),
        (item("F32", 1, [0, 4]), "a list of sizes"),
        (item("F32", [True], [0, 4]), "a list of sizes"),
        (item("F32", [1.0], [0, 4]), "a list of sizes"),
        (item("F32", [-1], [0, 4]), "a list of sizes"),
        (item("F32", ["1"], [0, 4]), "a list of sizes"),
        (item("F32", [1] * 33, [0, 4]), "33 dimensions"),
        (item("U8", [2**31], [0, 2**31]), "int32"),
        (item("U8", [0, 10**4000], [0, 0]), "int32"),
        (item("U8", [0] + [2**31 - 1] * 3, [0, 0]), "64 bits can address"),
        (item("F32", [2**31 - 1] * 32, [0, 4]), "64 bits can address"),
        (item("F32", [1], [0]), "two whole numbers"),
        (item("F32", [1], [0, 4, 8]), "two whole numbers"),
        (item("F32", [1], [False, 4]), "two whole numbers"),
        (item("F32", [1], [-4, 0]), "two whole numbers"),
        (item("F32", [1], [0.0, 4.0]), "two whole numbers"),
        (item("F32", [1], [4, 0]), "a begin up to the end"),
        (item("F32", [1], [10**4200, 10**4200 + 4]), "in 64 bits"),
        (item("F32", [2], [0, 4]), "found 4 bytes (data_offsets [0, 4]); expected 8 for F32 [2]"),
        (item("F16", [3], [0, 4]), "expected 6"),
        (item("F32", [], [0, 0]), "expected 4"),
        (item("F32", [0], [0, 4]), "expected 0"),
    ],
)
def test_broken_entry(entry, words):
    message = refuse({"a": entry}, bytes(4))
    assert words in message
    assert "tensor 'a'" in message


@pytest.mark.parametrize(
    ("offsets", "num_bytes", "words"),
    [
        ([[0, 4], [2, 6]], 6, "an overlap before tensor 'b' at data byte 2"),
        ([[0, 4], [0, 4]], 4, "an overlap before tensor 'b'"),
        ([[0, 4], [8, 12]], 12, "a hole before tensor 'b' at data byte 8"),
        ([[4, 8], [8, 12]], 12, "a hole before tensor 'a'"),
        ([[0, 4], [4, 8]], 7, "truncated"),
        ([[0, 4], [4, 8]], 0, "truncated"),
        ([[0, 4], [4, 8]], 9, "1 bytes behind the last tensor"),
    ],
)
def test_broken_layout(offsets, num_bytes, words):
    table = {name: item("F32", [1], pair) for name, pair in zip("ab", offsets, strict=True)}
    assert words in refuse(table, bytes(num_bytes))


def test_huge_tensor_that_agrees_with_itself_is_a_truncated_file():
    num_bytes = 4 * (2**31 - 1) * 2**20
    assert "truncated" in refuse({"a": item("F32", [2**31 - 1, 2**20], [0, num_bytes])}, b"")


def test_long_names_are_cut_in_messages():
    assert "..." in refuse({"n" * 10**6: item("X", [1], [0, 4])}, bytes(4))
