"""What is written is aligned, loads everywhere, and is there whole or not at all."""

import json
import stat

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from mlx_edge.errors import InvalidRequestError
from mlx_edge.weights import (
    INDEX_NAME,
    Checkpoint,
    SafetensorsFile,
    write_checkpoint,
    write_safetensors,
    writer,
)
from mlx_edge.weights.dtypes import ELEMENT_TYPES
from tests.weights.files import SHAPES, random_array, same

WRITABLE = [name for name in ELEMENT_TYPES if name != "F64"]


def make_arrays():
    return {
        f"{name}.{i}": random_array(ELEMENT_TYPES[name].mlx, shape, seed=i)
        for name in WRITABLE
        for i, shape in enumerate(SHAPES)
    }


def test_round_trip_here_in_mlx_and_in_the_reference_package(tmp_path):
    arrays, path = make_arrays(), tmp_path / "model.safetensors"
    write_safetensors(path, arrays)
    loaded, metadata = mx.load(str(path), return_metadata=True)
    assert metadata == {"format": "mlx"}
    assert set(loaded) == set(arrays)
    with SafetensorsFile(path) as file, safe_open(path, framework="np") as reference:
        assert file.metadata == {"format": "mlx"}
        for name, array in arrays.items():
            assert same(file.read(name), array)
            assert same(loaded[name], array)
            assert reference.get_slice(name).get_shape() == list(array.shape)
            if array.dtype != mx.bfloat16:  # which numpy, and so the package, has not
                assert same(mx.array(reference.get_tensor(name)), array)


def test_layout(tmp_path):
    write_safetensors(tmp_path / "f", make_arrays())
    with SafetensorsFile(tmp_path / "f") as file:
        entries = list(file.tensors.values())
    assert entries[0].begin == 16384
    for entry in entries:
        assert entry.begin % ELEMENT_TYPES[entry.dtype].size == 0
        if entry.num_bytes % 64 == 0:
            assert entry.begin % 64 == 0


@settings(max_examples=60, deadline=None, database=None)
@given(st.lists(st.tuples(st.sampled_from([1, 2, 4, 8]), st.integers(0, 70)), max_size=20))
def test_layout_is_aligned_to_what_divides_the_size(sizes):
    planned = [
        writer.TensorPlan(f"t{i}", "U8", (n,), n * size) for i, (size, n) in enumerate(sizes)
    ]
    begin = 0
    for plan in writer.order_tensors(planned):
        element_size = sizes[int(plan.name[1:])][0]
        assert begin % element_size == 0
        assert plan.num_bytes % 64 or begin % 64 == 0
        begin += plan.num_bytes


def test_equal_alignment_keeps_the_order_of_the_caller(tmp_path):
    names = ["z", "a", "m", "b"]
    write_safetensors(tmp_path / "f", {name: mx.zeros(64) for name in names})
    with SafetensorsFile(tmp_path / "f") as file:
        assert list(file.tensors) == names


def test_header_longer_than_a_page_goes_to_the_next(tmp_path):
    arrays = {f"layer.{i}.{'x' * 60}": mx.full((1,), i) for i in range(300)}
    write_safetensors(tmp_path / "f", arrays)
    with SafetensorsFile(tmp_path / "f") as file:
        begin = next(iter(file.tensors.values())).begin
        assert begin > 16384
        assert begin % 16384 == 0
        assert file.read(next(reversed(arrays))).item() == 299


def test_metadata_and_unusual_names(tmp_path):
    arrays = {"": mx.zeros(1), 'quote"\\': mx.ones(2), "Größe/重み": mx.ones(3)}
    write_safetensors(tmp_path / "f", arrays, metadata={"note": "ä\n", "n": ""})
    with SafetensorsFile(tmp_path / "f") as file:
        assert file.metadata == {"note": "ä\n", "n": ""}
        assert set(file.tensors) == set(arrays)
    assert set(mx.load(str(tmp_path / "f"), format="safetensors")) == set(arrays)


def test_nothing_to_write_is_a_sound_file(tmp_path):
    write_safetensors(tmp_path / "f", {}, metadata={})
    with SafetensorsFile(tmp_path / "f") as file:
        assert not file.tensors


def test_arrays_that_are_not_contiguous_or_not_evaluated(tmp_path):
    base = random_array(mx.bfloat16, (6, 10))
    arrays = {
        "transposed": base.T,
        "strided": base[::2, 1::3],
        "broadcast": mx.broadcast_to(mx.array([1, 2, 3]), (4, 3)),
        "lazy": mx.arange(12).reshape(3, 4) * 2,
    }
    write_safetensors(tmp_path / "f", arrays)
    with SafetensorsFile(tmp_path / "f") as file:
        assert all(same(file.read(name), mx.contiguous(a)) for name, a in arrays.items())


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        ({"a": mx.zeros(1, dtype=mx.complex64)}, None, "complex64"),
        ({"__metadata__": mx.zeros(1)}, None, "cannot name a tensor"),
        ({"\ud800": mx.zeros(1)}, None, "cannot name a tensor"),
        ({1: mx.zeros(1)}, None, "cannot name a tensor"),
        ({"a": mx.zeros(1)}, {"n": 1}, "not a table of strings"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_disk_is_touched(
    tmp_path, tensors, metadata, words
):
    with pytest.raises(InvalidRequestError, match=words):
        write_safetensors(tmp_path / "f", tensors, metadata=metadata)
    assert list(tmp_path.iterdir()) == []


def test_float64_is_refused():
    with mx.stream(mx.cpu):
        tensors = {"a": mx.array(np.float64([1]), dtype=mx.float64)}
    with pytest.raises(InvalidRequestError, match="float64"):
        write_safetensors(None, tensors)


class Failing(dict):
    """Tensors of which one cannot be had any more when its turn to be written comes."""

    def __init__(self, arrays, error):
        super().__init__(arrays)
        self.asked, self.error = 0, error

    def __getitem__(self, name):
        self.asked += 1
        if self.asked > len(self) + 2:
            raise self.error
        return super().__getitem__(name)


@pytest.mark.parametrize("error", [RuntimeError("gpu lost"), KeyboardInterrupt()])
def test_failure_midway_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "f"
    write_safetensors(path, {"old": mx.ones(3)})
    before = path.read_bytes()
    with pytest.raises(type(error)):
        write_safetensors(path, Failing({f"t{i}": mx.ones(3) for i in range(5)}, error))
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    assert path.read_bytes() == before


@pytest.mark.parametrize("call", ["fsync", "open"])
def test_a_disk_that_refuses(tmp_path, monkeypatch, call):
    def refuse(*args, **kwargs):
        raise OSError(28, "No space left on device")

    write_safetensors(tmp_path / "f", {"old": mx.ones(3)})
    monkeypatch.setattr(
        *((writer.os, "fsync") if call == "fsync" else (writer.Path, "open")), refuse
    )
    with pytest.raises(InvalidRequestError, match="No space left on device"):
        write_safetensors(tmp_path / "f", {"new": mx.ones(3)})
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    assert list(mx.load(str(tmp_path / "f"), format="safetensors")) == ["old"]


def test_paths_that_cannot_be_written(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    for path in ("absent/f", "folder", "file/f"):
        with pytest.raises(InvalidRequestError, match="cannot be written"):
            write_safetensors(tmp_path / path, {"a": mx.ones(3)})
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]


def test_a_tensor_that_changes_between_planning_and_writing(tmp_path):
    class Fickle(dict):
        calls = 0

        def __getitem__(self, name):
            self.calls += 1
            return mx.zeros(self.calls)

    with pytest.raises(InvalidRequestError, match="changed while it was written"):
        write_safetensors(tmp_path / "f", Fickle(a=None))
    assert list(tmp_path.iterdir()) == []


def test_a_new_file_has_ordinary_rights_and_an_open_one_survives_replacing(tmp_path):
    write_safetensors(tmp_path / "f", {"a": mx.ones(3)})
    (tmp_path / "plain").write_text("")
    modes = {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}
    assert len(modes) == 1
    with SafetensorsFile(tmp_path / "f") as file:
        write_safetensors(tmp_path / "f", {"a": mx.zeros(3)})
        assert file.read("a").tolist() == [1, 1, 1]


def test_shards_and_their_index(tmp_path):
    arrays = {f"t{i}": random_array(mx.uint32, (16,), seed=i) for i in range(5)}
    arrays["large"] = random_array(mx.uint32, (100,))
    write_checkpoint(tmp_path, arrays, max_shard_bytes=128)
    names = [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    assert sorted(p.name for p in tmp_path.iterdir()) == [*names, INDEX_NAME]
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in arrays.values())
    assert [index["weight_map"][name] for name in arrays] == [names[i] for i in (0, 0, 1, 1, 2, 3)]
    everything = {}
    for name in names:
        loaded, metadata = mx.load(str(tmp_path / name), return_metadata=True)
        assert metadata == {"format": "mlx"}
        everything |= loaded
    assert all(same(everything[name], array) for name, array in arrays.items())
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.names() == frozenset(arrays)


def test_index_comes_last(tmp_path, monkeypatch):
    written = []
    replacing = writer.replacing
    monkeypatch.setattr(
        writer, "replacing", lambda path: (written.append(path.name), replacing(path))[1]
    )
    write_checkpoint(tmp_path, {"a": mx.ones(9), "b": mx.ones(9)}, max_shard_bytes=1)
    assert written[-1] == INDEX_NAME
    assert len(written) == 3


def test_folder_is_made_and_rewritten_but_never_mixed(tmp_path):
    folder = tmp_path / "new" / "model"
    tensors = {"a": mx.ones(9), "b": mx.ones(9)}
    write_checkpoint(folder, tensors, max_shard_bytes=1)
    write_checkpoint(folder, tensors, max_shard_bytes=1)
    (folder / "tokenizer.json").write_text("{}")
    before = sorted(p.name for p in folder.iterdir())
    with pytest.raises(InvalidRequestError, match="of another checkpoint"):
        write_checkpoint(folder, tensors)
    assert sorted(p.name for p in folder.iterdir()) == before
    with pytest.raises(InvalidRequestError, match="cannot be used as a folder"):
        write_checkpoint(folder / "tokenizer.json", tensors)
    with pytest.raises(InvalidRequestError, match="must be positive"):
        write_checkpoint(folder, tensors, max_shard_bytes=0)


def test_mlx_lm_reads_what_we_write(tmp_path):
    """As `mlx_lm.utils.load_model` does: every `model*.safetensors` through `mx.load`, together."""
    arrays = {f"t{i}": random_array(mx.float16, (8, 8), seed=i) for i in range(4)}
    write_checkpoint(tmp_path, arrays, max_shard_bytes=300)
    weights = {}
    for path in tmp_path.glob("model*.safetensors"):
        weights.update(mx.load(str(path)))
    assert set(weights) == set(arrays)
    assert all(same(weights[name], array) for name, array in arrays.items())
