"""Whatever bytes a file holds: it is read, or it is a ModelFormatError, and never anything else."""

import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize

from mlx_edge.errors import ModelFormatError
from mlx_edge.weights import INDEX_NAME, Checkpoint, SafetensorsFile, write_safetensors
from mlx_edge.weights.dtypes import ELEMENT_TYPES
from mlx_edge.weights.header import parse_header
from tests.weights.files import item, pack, random_array

bounded = settings(max_examples=80, deadline=None, database=None)

SOUND = pack(
    {
        "__metadata__": {"format": "mlx"},
        "a": item("F32", [2, 3], [0, 24]),
        "b": item("BF16", [4], [24, 32]),
        "c": item("BOOL", [], [32, 33]),
    },
    bytes(range(33)),
)

numbers = st.one_of(
    st.integers(-2, 40), st.sampled_from([2**31 - 1, 2**31, 2**32, 2**63, 2**64, 10**400])
)
leaves = st.one_of(st.none(), st.booleans(), numbers, st.floats(), st.text(max_size=5))
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*ELEMENT_TYPES, "F8_E4M3", "X"]) | leaves,
        "shape": st.lists(numbers, max_size=4) | values,
        "data_offsets": st.lists(numbers, min_size=2, max_size=2) | values,
    }
)
tables = st.dictionaries(
    st.text(max_size=4) | st.just("__metadata__"), entries | values, max_size=4
)


def parse_or_refuse(data):
    """The parsed header or None; anything but a ModelFormatError of one short line is a failure."""
    try:
        header = parse_header("f", data)
    except ModelFormatError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 2000
        return None
    assert sum(entry.num_bytes for entry in header.tensors.values()) <= len(data)
    deserialize(bytes(data))  # the reference implementation is never stricter than we are
    return header


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "f.safetensors"


@bounded
@given(st.binary(max_size=200))
def test_random_bytes(data):
    parse_or_refuse(data)
    parse_or_refuse(len(data).to_bytes(8, "little") + data)
    parse_or_refuse((len(data) + 1).to_bytes(8, "little") + b"{" + data)


@bounded
@given(tables, st.binary(max_size=40))
def test_random_tables(table, data):
    parse_or_refuse(pack(table, data))


@bounded
@given(st.data())
def test_mutated_files_are_read_whole_or_refused(path, data):
    raw = bytearray(SOUND)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        match data.draw(st.integers(0, 3)):
            case 0:
                raw[at] = data.draw(st.integers(0, 255))
            case 1:
                del raw[at : at + data.draw(st.integers(1, 8))]
            case 2:
                raw[at:at] = data.draw(st.binary(min_size=1, max_size=8))
            case _:
                raw[at:at] = raw[at : at + data.draw(st.integers(1, 40))]
        raw = raw or bytearray(1)
    path.write_bytes(raw)
    if parse_or_refuse(bytes(raw)) is not None:
        with SafetensorsFile(path) as file:
            for name, entry in file.tensors.items():
                assert file.read(name).shape == entry.shape
    else:
        with pytest.raises(ModelFormatError):
            SafetensorsFile(path)


def test_huge_claims_allocate_nothing():
    claims = [
        pack({"a": item("F64", [2**31 - 1, 2**20], [0, 8 * (2**31 - 1) * 2**20])}),
        pack({"a": item("U8", [0, 2**31 - 1], [0, 0])}),
        (10**8).to_bytes(8, "little") + b"{}",
        (2**64 - 1).to_bytes(8, "little") + b"{}",
    ]
    tracemalloc.start()
    try:
        for claim in claims:
            parse_or_refuse(claim)
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


@bounded
@given(values | st.fixed_dictionaries({"weight_map": st.dictionaries(st.text(), values)}))
def test_random_indexes(tmp_path_factory, index):
    folder = tmp_path_factory.getbasetemp() / "fuzz_index"
    folder.mkdir(exist_ok=True)
    if not (folder / "model.safetensors").exists():
        write_safetensors(
            folder / "model.safetensors", {"a": random_array(ELEMENT_TYPES["F16"].mlx, (2,))}
        )
    (folder / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(ModelFormatError):
        Checkpoint.open(folder)
