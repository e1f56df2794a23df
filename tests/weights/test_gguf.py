"""GGUF files: whatever the bytes are, a checked table or one line; values as the gguf package has them, bit for bit."""

import struct
import sys
import tracemalloc
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_edge.errors import InvalidRequestError, ModelFormatError
from mlx_edge.weights import gguf as gguf_module
from mlx_edge.weights.gguf import GGUFFile
from mlx_edge.weights.gguf_header import BLOCK_TYPES, MAX_HEADER_BYTES, parse_gguf_header
from tests.weights.files import bits_of

gguf = pytest.importorskip("gguf", reason="reading GGUF needs the extra mlx-edge[gguf]")

FLOATS = ("F32", "F16", "BF16")
TYPES = sorted({kind.name for kind in BLOCK_TYPES.values()} - set(FLOATS))
bounded = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def write(path: Path, tensors: dict[str, tuple[np.ndarray, str]], **metadata) -> Path:
    """A file of raw blocks: name -> (rows, bytes of a row) uint8 and the type's name."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key.replace("__", "."), value)
    for name, (rows, kind) in tensors.items():
        writer.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_rows(kind: str, shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Random bytes, so that every scale that half can hold is among them: infinite, tiny, not a number."""
    block = next(found for found in BLOCK_TYPES.values() if found.name == kind)
    row_bytes = shape[1] // block.num_values * block.num_bytes
    return np.random.default_rng(seed).integers(0, 256, (shape[0], row_bytes), np.uint8)


def expected(rows: np.ndarray, kind: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def info(name: str, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    head = text(name) + struct.pack("<I", len(dims))
    return head + struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", kind, offset)


def pack(values: list[bytes], infos: list[bytes], data: bytes = b"", **changed) -> bytes:
    """A file by hand; `changed` sets magic, version or a count."""
    facts = {"magic": b"GGUF", "version": 3, "tensors": len(infos), "pairs": len(values)} | changed
    head = facts["magic"] + struct.pack("<IQQ", facts["version"], facts["tensors"], facts["pairs"])
    head += b"".join([*values, *infos])
    return head + bytes(-len(head) % 32) + data


SOUND = pack(
    [
        pair("general.architecture", 8, text("llama")),
        pair("a.list", 9, struct.pack("<IQ", 8, 2) + text("one") + text("två")),
        pair("a.numbers", 9, struct.pack("<IQ3f", 6, 3, 1, 2, 3)),
        pair("a.flag", 7, b"\x01"),
    ],
    [info("first", [4, 2], 1), info("second", [32], 2, 32)],
    bytes(range(50)),
)
CASES = {
    "not a GGUF file": (pack([], [], magic=b"\x93NUM"), "starts with"),
    "a pointer of git-lfs": (b"version https://git-lfs.github.com/spec/v1\n", "starts with"),
    "version 1": (pack([], [], version=1), "version 1"),
    "a version to come": (pack([], [], version=4), "version 4"),
    "big-endian": (pack([], [], version=3 << 24), "big-endian"),
    "only a magic number": (b"GGUF", "byte 4"),
    "a huge count of pairs": (pack([], [], pairs=2**64 - 1), "metadata pairs"),
    "a huge count of tensors": (pack([], [], tensors=2**40), "tensors announced"),
    "one pair too many": (pack([pair("a", 7, b"\0")], [], pairs=2), "GGUF|key|metadata"),
    "a key past the end": (pack([struct.pack("<Q", 60000) + b"abcdef"], []), "key"),
    "an endless key": (pack([struct.pack("<Q", 2**63) + bytes(9)], []), "key of 9223372036854775808"),
    "an empty key": (pack([pair("", 7, b"\0") + bytes(9)], []), "a key of 0 bytes"),
    "a key twice": (pack([pair("a", 7, b"\0")] * 2, []), "'a' twice"),
    "a key of no text": (pack([pair("a", 7, b"\0").replace(b"a", b"\xff")], []), "UTF-8"),
    "a text past the end": (pack([pair("a", 8, struct.pack("<Q", 2**50))], []), "bytes at byte"),
    "a text of no text": (pack([pair("a", 8, text("x").replace(b"x", b"\xc3"))], []), "UTF-8"),
    "an unknown type of value": (pack([pair("a", 13, bytes(8))], []), "type 13"),
    "a list of lists": (pack([pair("a", 9, struct.pack("<IQIQ", 9, 1, 4, 0))], []), "type 9"),
    "a huge list of texts": (pack([pair("a", 9, struct.pack("<IQ", 8, 2**60))], []), "texts of 'a'"),
    "a huge list of numbers": (pack([pair("a", 9, struct.pack("<IQ", 0, 2**63))], []), "numbers as"),
    "a truth value of 2": (pack([pair("a", 7, b"\2")], []), "truth value"),
    "an alignment of 0": (pack([pair("general.alignment", 4, bytes(4))], []), "power of two"),
    "an alignment as text": (pack([pair("general.alignment", 8, text("32"))], []), "power of two"),
    "no dimensions": (pack([], [info("t", [])]), "0 dimensions"),
    "five dimensions": (pack([], [info("t", [1] * 5)], bytes(4)), "5 dimensions"),
    "a huge number of dimensions": (
        pack([], [text("t") + struct.pack("<I", 2**32 - 1) + bytes(40)]),
        "4294967295 dimensions",
    ),
    "a size of 0": (pack([], [info("t", [4, 0])]), "sizes of 1"),
    "a size that MLX cannot count": (pack([], [info("t", [2**31])]), "sizes of 1"),
    "a product beyond 64 bits": (pack([], [info("t", [2**31 - 32] * 4)], bytes(64)), "end at byte"),
    "an unknown type": (pack([], [info("t", [32], 99)], bytes(64)), r"'t'.*type 99 \(not known\)"),
    "integers": (pack([], [info("t", [32], 26)], bytes(128)), r"'t'.*type 26 \(I32\)"),
    "columns that fill no block": (pack([], [info("t", [33], 2)], bytes(64)), "33 columns"),
    "an offset that is not aligned": (pack([], [info("t", [1], 0, 4)], bytes(8)), "offset 4"),
    "an offset outside the file": (pack([], [info("t", [1], 0, 2**40)], bytes(8)), "end at byte"),
    "the largest offset": (pack([], [info("t", [1], 0, 2**64 - 32)], bytes(8)), "end at byte"),
    "data that is cut off": (SOUND[:-1], "truncated"),
    "tensors that overlap": (pack([], [info("a", [9]), info("b", [9], 0, 32)], bytes(99)), "begin at"),
    "a tensor twice": (pack([], [info("a", [1]), info("a", [1], 0, 32)], bytes(64)), "'a' twice"),
    "a name that is too long": (pack([], [info("n" * 65, [1])], bytes(4)), "65 bytes"),
}  # fmt: skip


def parse_or_refuse(data: bytes):
    """The parsed header or None; anything but a ModelFormatError of one short line is a failure."""
    try:
        header = parse_gguf_header("f", data)
    except ModelFormatError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 600
        return None
    assert all(0 < tensor.begin < tensor.end <= len(data) for tensor in header.tensors.values())
    return header


def test_types_are_those_of_the_package() -> None:
    for number, block in BLOCK_TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, *gguf.GGML_QUANT_SIZES[kind]) == (
            block.name,
            block.num_values,
            block.num_bytes,
        )


def test_header_is_what_the_package_reads(tmp_path: Path) -> None:
    tensors = {
        "a": (random_rows("Q4_K", (5, 512)), "Q4_K"),
        "b": (random_rows("F16", (1, 7)), "F16"),
    }
    facts = {
        "x__a": 3,
        "x__b": 0.5,
        "x__c": "två",
        "x__d": ["a", ""],
        "x__e": [1, 2],
        "x__f": [0.5],
    }
    path = write(tmp_path / "m.gguf", tensors, **facts)
    reader = gguf.GGUFReader(path)
    with GGUFFile(path) as file:
        assert file.metadata == {
            key: field.contents()
            for key, field in reader.fields.items()
            if not key.startswith("GGUF.")
        }
        found = {
            name: (t.type.name, list(t.shape)[::-1], t.begin) for name, t in file.tensors.items()
        }
    assert found == {
        t.name: (t.tensor_type.name, t.shape.tolist(), t.data_offset) for t in reader.tensors
    }


@pytest.mark.parametrize("kind", TYPES)
def test_values_are_those_of_the_package(tmp_path: Path, kind: str, monkeypatch) -> None:
    monkeypatch.setattr(gguf_module, "_CHUNK_VALUES", 1 << 12)  # several chunks, the last one short
    rows = random_rows(kind, (37, 512))
    path = write(tmp_path / "m.gguf", {"t": (rows, kind)})
    order = np.random.default_rng(1).permutation(37)
    with GGUFFile(path) as file:
        read = file.read("t")
        assert read.shape == (37, 512)
        assert read.dtype == file.dtype("t") == mx.float32
        assert bits_of(read)[2] == expected(rows, kind).tobytes()
        assert bits_of(file.read("t", order))[2] == expected(rows, kind)[order].tobytes()


@pytest.mark.parametrize("kind", FLOATS)
def test_floats_keep_their_bits(tmp_path: Path, kind: str) -> None:
    rows = random_rows(kind, (3, 5))
    with GGUFFile(write(tmp_path / "m.gguf", {"t": (rows, kind)})) as file:
        assert bits_of(file.read("t"))[2] == rows.tobytes()


def test_a_sound_file_by_hand() -> None:
    header = parse_or_refuse(SOUND)
    assert header is not None
    assert header.metadata["a.list"] == ["one", "två"]
    assert header.metadata["a.numbers"] == [1.0, 2.0, 3.0]
    assert header.metadata["a.flag"] is True
    assert header.tensors["first"].shape == (2, 4)


@pytest.mark.parametrize("case", CASES)
def test_broken_headers_are_refused(case: str) -> None:
    data, message = CASES[case]
    with pytest.raises(ModelFormatError, match=message):
        parse_gguf_header("f", data)
    assert parse_or_refuse(data) is None


@pytest.mark.parametrize("length", range(len(SOUND)))
def test_every_truncation_is_refused(length: int) -> None:
    assert parse_or_refuse(SOUND[:length]) is None


@bounded
@given(st.data())
def test_mutated_files_are_read_or_refused(data) -> None:
    raw = bytearray(SOUND)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        match data.draw(st.integers(0, 4)):
            case 0:
                raw[at] = data.draw(st.integers(0, 255))
            case 1:
                del raw[at : at + data.draw(st.integers(1, 9))]
            case 2:
                raw[at:at] = data.draw(st.binary(min_size=1, max_size=9))
            case 3:
                raw[at:at] = raw[at : at + data.draw(st.integers(1, 60))]
            case _:
                number = data.draw(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]))
                raw[at : at + 8] = struct.pack("<Q", number)
        raw = raw or bytearray(1)
    parse_or_refuse(bytes(raw))


@bounded
@given(st.binary(max_size=300))
def test_random_bytes_are_refused(data: bytes) -> None:
    assert parse_or_refuse(data) is None
    parse_or_refuse(b"GGUF\3\0\0\0" + data)


def test_huge_claims_allocate_nothing() -> None:
    claims = [data for case, (data, _) in CASES.items() if "huge" in case or "endless" in case]
    assert len(claims) > 5
    tracemalloc.start()
    try:
        for claim in claims:
            parse_or_refuse(claim)
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


def test_a_header_has_a_largest_size(monkeypatch) -> None:
    monkeypatch.setattr("mlx_edge.weights.gguf_header.MAX_HEADER_BYTES", 200)
    many = pack([pair("a", 9, struct.pack("<IQ", 8, 100) + bytes(800))], [])
    with pytest.raises(ModelFormatError, match="announced"):
        parse_gguf_header("f", many)
    long = pack([pair("a", 8, text("x" * 500))], [])
    with pytest.raises(ModelFormatError, match="a header of at most"):
        parse_gguf_header("f", long)
    assert MAX_HEADER_BYTES > 10**7  # the vocabularies of today


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for name in ("missing", "empty", "."):
        with pytest.raises(ModelFormatError, match="found"):
            GGUFFile(tmp_path / name)


def test_a_file_that_became_shorter_and_a_closed_one(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {"t": (random_rows("Q8_0", (64, 512)), "Q8_0")})
    with GGUFFile(path) as file:
        with pytest.raises(ModelFormatError, match="no tensor 'u'"):
            file.read("u")
        with path.open("r+b") as handle:
            handle.truncate(1000)
        with pytest.raises(ModelFormatError, match="became shorter"):
            file.read("t")
    with pytest.raises(InvalidRequestError, match="closed"):
        file.read("t")


def test_fingerprints_tell_files_apart(tmp_path: Path) -> None:
    prints = set()
    for seed in (0, 0, 1):
        rows = random_rows("Q8_0", (4, 64), seed)
        with GGUFFile(write(tmp_path / f"{len(prints)}.gguf", {"t": (rows, "Q8_0")})) as file:
            prints.add(file.fingerprint())
            assert file.fingerprint() in prints
    assert len(prints) == 3  # the time of the last change is part of it


def test_without_the_package(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InvalidRequestError, match=r"pip install 'mlx-edge\[gguf\]'"):
        GGUFFile(tmp_path / "any.gguf")
