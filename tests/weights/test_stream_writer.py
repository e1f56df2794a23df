"""Tensors that come in pieces and in any order make the same files as all of them at once."""

import errno
import os
import random

import mlx.core as mx
import pytest

from mlx_edge.errors import InvalidRequestError
from mlx_edge.weights import stream_writer, write_checkpoint
from mlx_edge.weights.stream_writer import StreamWriter
from mlx_edge.weights.writer import plan_tensors
from tests.weights.files import SHAPES, random_array

TYPES = [mx.float16, mx.bfloat16, mx.uint32, mx.uint8, mx.bool_]
ARRAYS = {
    f"t{i}.{dtype}": random_array(dtype, shape, seed=i)
    for dtype in TYPES
    for i, shape in enumerate(SHAPES)
}


def read_folder(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def pieces(arrays, seed):
    """(name, rows, first row) of all arrays, cut into rows where they have some, shuffled."""
    cut = []
    for name, array in arrays.items():
        if array.ndim > 1 and array.shape[0] > 2:
            middle = array.shape[0] // 2
            cut += [(name, array[:middle], 0), (name, array[middle:], middle)]
        else:
            cut.append((name, array, 0))
    random.Random(seed).shuffle(cut)
    return cut


@pytest.mark.parametrize("max_shard_bytes", [1, 300, 3000, 10**9])
def test_same_bytes_as_the_writer_in_any_order(tmp_path, max_shard_bytes):
    write_checkpoint(tmp_path / "whole", ARRAYS, max_shard_bytes=max_shard_bytes)
    plan = plan_tensors(ARRAYS)
    with StreamWriter(tmp_path / "stream", plan, max_shard_bytes=max_shard_bytes) as writer:
        for name, rows, first_row in pieces(ARRAYS, seed=max_shard_bytes):
            writer.put(name, rows, first_row)
        assert writer.written_bytes == sum(array.nbytes for array in ARRAYS.values())
        writer.finish()
    assert read_folder(tmp_path / "stream") == read_folder(tmp_path / "whole")


def test_a_run_that_broke_off_leaves_whole_shards_which_the_next_one_keeps(tmp_path):
    arrays = {f"t{i}": random_array(mx.float32, (16, 4), seed=i) for i in range(6)}
    plan = plan_tensors(arrays)
    folder = tmp_path / "f"
    with StreamWriter(folder, plan, max_shard_bytes=512) as writer:
        for name in ("t0", "t1", "t2"):
            writer.put(name, arrays[name])
    assert [path.name for path in folder.iterdir()] == ["model-00001-of-00003.safetensors"]
    (folder / ".model-00002-of-00003.safetensors.0123.tmp").write_bytes(b"of a killed run")
    before = (folder / "model-00001-of-00003.safetensors").stat().st_ino
    with StreamWriter(folder, plan, max_shard_bytes=512) as writer:
        assert [name for name in arrays if writer.is_written(name)] == ["t0", "t1"]
        assert (writer.num_whole_shards, writer.written_bytes) == (1, 512)
        for name, array in arrays.items():
            writer.put(name, array)
        writer.finish()
    assert (folder / "model-00001-of-00003.safetensors").stat().st_ino == before
    write_checkpoint(tmp_path / "whole", arrays, max_shard_bytes=512)
    assert read_folder(folder) == read_folder(tmp_path / "whole")


def test_a_file_of_another_plan_is_written_anew(tmp_path):
    write_checkpoint(tmp_path, {"a": mx.zeros((4, 4))})
    arrays = {"b": mx.ones((4, 4))}
    with StreamWriter(tmp_path, plan_tensors(arrays)) as writer:
        assert not writer.is_written("b")
        writer.put("b", arrays["b"])
        writer.finish()
    assert mx.array_equal(mx.load(str(tmp_path / "model.safetensors"))["b"], arrays["b"])


def test_a_full_disk_is_one_line_and_leaves_no_file(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with StreamWriter(tmp_path, plan_tensors({"a": mx.zeros((4, 4))})) as writer:
        monkeypatch.setattr(stream_writer.os, "pwrite", refuse)
        with pytest.raises(InvalidRequestError, match="No space left on device"):
            writer.put("a", mx.zeros((4, 4)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "array", [mx.zeros((4, 4), mx.float16), mx.zeros((4, 3)), mx.zeros((5, 4))]
)
def test_what_is_not_as_planned_is_our_own_mistake(tmp_path, array):
    with (
        StreamWriter(tmp_path, plan_tensors({"a": mx.zeros((4, 4))})) as writer,
        pytest.raises(AssertionError),
    ):
        writer.put("a", array)
