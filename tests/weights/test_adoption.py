"""Arrays on mapped pages: that they are the file's, stay valid, and cannot harm it."""

import ctypes
import gc
import json
import mmap
import os
import struct
import threading
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_edge.weights import (
    Checkpoint,
    SafetensorsFile,
    mapping,
    write_checkpoint,
    write_safetensors,
)
from mlx_edge.weights.adoption import _Pages, find_adoption
from mlx_edge.weights.header import TensorEntry
from mlx_edge.weights.locking import find_address
from mlx_edge.weights.mapping import Run, SharedRuns, cut_tensor
from tests.weights.files import SHAPES, bits_of, random_array, same

PAGE = mmap.PAGESIZE
GIB = 2**30

# Forking with MLX's threads around is what these tests are about; Python 3.12 warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

_adoption = find_adoption()
shares = pytest.mark.skipif(
    isinstance(_adoption, str), reason=f"MLX cannot share pages here: {_adoption}"
)
linux_only = pytest.mark.skipif(
    mx.metal.is_available(), reason="Linux's way of adopting; Metal is available here"
)


def test_pages_reach_past_the_end_of_the_file_and_keep_the_mapping(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"\xff" * (PAGE + 5))
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    runs = [Run(0, 2 * PAGE), Run(PAGE, 2 * PAGE)]
    whole, tail = (np.asarray(_Pages(mapped, run)).view(np.uint8) for run in runs)
    with pytest.raises(BufferError):
        mapped.close()
    del mapped
    gc.collect()
    assert whole.ctypes.data % PAGE == 0
    assert not whole.flags.writeable
    assert whole.nbytes == 2 * PAGE
    assert whole[: PAGE + 5].min() == 255
    assert whole[PAGE + 5 :].max() == 0
    assert tail[:6].tolist() == [255] * 5 + [0]


def adopt_file(path, begin=0, num_bytes=None):
    num_bytes = num_bytes or -(-path.stat().st_size // PAGE) * PAGE - begin
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return _adoption(mapped, file.fileno(), Run(begin, begin + num_bytes))


def maps_of(path):
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line]


def make_arrays():
    types = [mx.bfloat16, mx.float16, mx.float32, mx.uint32, mx.uint8, mx.int64]
    return {
        f"{dtype}.{i}": random_array(dtype, shape, seed=i)
        for dtype in types
        for i, shape in enumerate([*SHAPES, (70, 130)])
    }


def in_base(array, runs):
    """Whether an array's bytes lie in one of the adopted buffers."""
    flat = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    address = find_address(flat)
    return any(
        find_address(base) <= address and address + array.nbytes <= find_address(base) + base.nbytes
        for base in runs.bases
    )


@shares
def test_every_tensor_is_a_view_of_the_file(tmp_path):
    arrays = make_arrays()
    write_safetensors(tmp_path / "f", arrays)
    with SafetensorsFile(tmp_path / "f") as file:
        tensors = {name: file.read(name) for name in arrays}
        mx.eval(tensors)
        assert file.report.shared_bytes == file.report.total_bytes > 0
        assert file.report.copied_bytes == 0
        assert len(file._runs.bases) == 1
        for name, array in arrays.items():
            assert same(tensors[name], array)
            assert array.size == 0 or in_base(tensors[name], file._runs), name


@shares
def test_a_file_that_mlx_wrote_is_shared_where_aligned(tmp_path):
    arrays = make_arrays()
    mx.save_safetensors(str(tmp_path / "f.safetensors"), arrays)
    with SafetensorsFile(tmp_path / "f.safetensors") as file:
        for name, array in arrays.items():
            tensor = file.read(name)
            assert same(tensor, array)
            entry = file.tensors[name]
            if entry.num_bytes:
                assert in_base(tensor, file._runs) == (mapping.why_copy(entry) is None)


@shares
@linux_only
def test_sharing_allocates_nothing(tmp_path):
    arrays = {f"t{i}": random_array(mx.bfloat16, (512, 512), seed=i) for i in range(8)}
    write_safetensors(tmp_path / "f", arrays)
    del arrays
    mx.clear_cache()
    before = mx.get_active_memory()
    with SafetensorsFile(tmp_path / "f") as file:
        tensors = [file.read(f"t{i}") for i in range(8)]
        mx.eval(tensors)
        assert mx.get_active_memory() - before < 10_000


OPERATIONS = {
    "contiguous": mx.contiguous,
    "reshape": lambda x: x.reshape(-1),
    "slice": lambda x: x[3:9, 5:17],
    "strided": lambda x: x[::3, ::-2],
    "view": lambda x: x.view(mx.uint8),
    "wider view": lambda x: x.view(mx.uint32),
    "transpose": lambda x: x.T,
    "contiguous transpose": lambda x: mx.contiguous(x.T),
    "add": lambda x: x + 1,
    "in place": lambda x: mx.maximum(mx.negative(x), x),
    "matmul": lambda x: x.astype(mx.float32) @ x.astype(mx.float32).T,
    "gather": lambda x: x[mx.array([1, 0, 1])],
    "assignment": lambda x: x.at[2:4].add(x[0:2]),
    "concatenate": lambda x: mx.concatenate([x, x]),
    "quantized": lambda x: mx.quantize(x[:, :128].astype(mx.float32))[0],
}


@shares
@pytest.mark.parametrize("keep_root", [True, False], ids=["root kept", "root dropped"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_see_what_they_would_in_a_copy(tmp_path, operation, keep_root):
    values = random_array(mx.int16, (70, 130), seed=1)
    path = tmp_path / "f"
    write_safetensors(path, {"x": values})
    content = path.read_bytes()
    file = SafetensorsFile(path)
    tensor = file.read("x")
    file.close()
    if not keep_root:
        del file  # now nobody but `tensor` holds the pages, and MLX may write into them
    result = OPERATIONS[operation](tensor)
    del tensor
    wanted = OPERATIONS[operation](values)
    mx.eval(result)
    assert same(result, wanted)
    del result
    gc.collect()
    assert path.read_bytes() == content


@shares
@linux_only
def test_writing_through_numpy_harms_neither_file_nor_others(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"\1" * (2 * PAGE))
    mine, other = adopt_file(path), adopt_file(path)
    np.asarray(mine)[:] = 7
    assert set(np.asarray(mine).tolist()) == {7}
    assert np.asarray(other).view(np.uint8).max() == 1
    assert path.read_bytes() == b"\1" * (2 * PAGE)


@shares
@linux_only
@pytest.mark.parametrize("order", ["base first", "tensor first", "file first"])
def test_pages_are_unmapped_with_the_last_array(tmp_path, order):
    path = tmp_path / "f"
    write_safetensors(path, {"x": random_array(mx.uint32, (3000,))})
    file = SafetensorsFile(path)
    held = {"tensor": file.read("x")}
    mx.eval(held)
    want = bits_of(held["tensor"])
    held["base"] = file._runs.bases[0]
    held["file"] = file
    file.close()
    del file
    first = order.split()[0]
    for name in [first, *(held.keys() - {first})]:
        if "tensor" in held:
            assert bits_of(held["tensor"]) == want
        assert maps_of(path)
        del held[name]
        gc.collect()
    assert not maps_of(path)


@shares
@linux_only
def test_a_buffer_has_its_size_where_mlx_looks_for_it(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(bytes(3 * PAGE))
    for num_pages in (1, 3):
        base = adopt_file(path, 0, num_pages * PAGE)
        assert ctypes.c_size_t.from_address(find_address(base) - 8).value == num_pages * PAGE


@shares
@linux_only
def test_adopting_again_and_again_leaves_no_address_space(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"\1" * (3 * PAGE))
    num_maps = len(Path("/proc/self/maps").read_text().splitlines())
    for _ in range(300):
        assert adopt_file(path).shape == (3 * PAGE // 4,)
    gc.collect()
    assert not maps_of(path)
    assert len(Path("/proc/self/maps").read_text().splitlines()) < num_maps + 100


@shares
def test_arrays_outlive_file_and_name(tmp_path):
    path = tmp_path / "f"
    arrays = make_arrays()
    write_safetensors(path, arrays)
    file = SafetensorsFile(path)
    tensors = {name: file.read(name) for name in arrays}
    file.close()
    path.unlink()
    assert all(same(tensors[name], array) for name, array in arrays.items())


@shares
@linux_only
def test_a_forked_child_reads_and_ends_without_harm(tmp_path):
    path = tmp_path / "f"
    write_safetensors(path, {"x": random_array(mx.uint32, (5000,))})
    file = SafetensorsFile(path)
    tensor = file.read("x")
    mx.eval(tensor)
    seen = np.asarray(tensor)
    want = seen.tobytes()
    pid = os.fork()
    if pid == 0:  # the stream's thread is not here: look at memory, do not evaluate
        code = 1
        try:
            code = 0 if seen.tobytes() == want else 2
            seen[:] = 0
            code = code or (0 if not seen.any() else 3)
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert np.asarray(tensor).tobytes() == want


@shares
def test_two_threads_use_one_base(tmp_path):
    arrays = {f"t{i}": random_array(mx.uint32, (200, 50), seed=i) for i in range(16)}
    write_safetensors(tmp_path / "f", arrays)
    with SafetensorsFile(tmp_path / "f") as file:
        tensors = {name: file.read(name) for name in arrays}
        mx.eval(tensors)
    failures = []

    def work(stream_number):
        stream = mx.new_stream(mx.cpu)
        for _ in range(30):
            for name, array in arrays.items():
                got = mx.add(tensors[name], stream_number, stream=stream)
                if (
                    np.asarray(got).tobytes()
                    != (np.asarray(array) + np.uint32(stream_number)).tobytes()
                ):
                    failures.append(name)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@shares
def test_a_file_of_more_than_4_gib(tmp_path):
    """A sparse file: the tensors lie beyond what 32 bits count, and in more than one buffer."""
    path = tmp_path / "big"
    sizes = {"a": 3 * GIB, "b": 3 * GIB // 2, "c": 2 * GIB, "d": 4096}
    table, begin = {}, 0
    for name, size in sizes.items():
        rows = size // 4096
        table[name] = {"dtype": "U32", "shape": [rows, 1024], "data_offsets": [begin, begin + size]}
        begin += size
    text = json.dumps(table).encode().ljust(16384 - 8)
    try:
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(16384 + begin)
            for name, item in table.items():
                for place, value in [
                    (item["data_offsets"][0], name),
                    (item["data_offsets"][1] - 4, name.upper()),
                ]:
                    file.seek(16384 + place)
                    file.write(struct.pack("<I", ord(value)))
    except OSError as error:
        pytest.skip(f"no sparse file of 6.5 GiB here: {error}")
    with SafetensorsFile(path) as opened:
        tensors = {name: opened.read(name) for name in sizes}
        for name in sizes:
            assert tensors[name][0, 0].item() == ord(name)
            assert tensors[name][-1, -1].item() == ord(name.upper())
        assert opened.report.copied_bytes == 0
        assert opened.report.shared_bytes == begin
        assert len(opened._runs.bases) == 2
    path.unlink()


@shares
@linux_only
@pytest.mark.parametrize(
    ("begin", "num_bytes", "words"),
    [
        (1, PAGE, "whole pages"),
        (-PAGE, PAGE, "whole pages"),
        (0, PAGE + 4, "whole pages"),
        (0, 0, "whole pages"),
        (0, 3 * PAGE, "behind the end"),
        (2 * PAGE, PAGE, "behind the end"),
        (0, 16 * GIB, "32 bits"),
    ],
)
def test_what_cannot_be_adopted_is_refused(tmp_path, begin, num_bytes, words):
    path = tmp_path / "f"
    path.write_bytes(bytes(PAGE + 5))
    with path.open("rb") as file, pytest.raises(RuntimeError, match=words):
        _adoption(None, file.fileno(), Run(begin, begin + num_bytes))


@shares
@linux_only
def test_a_descriptor_that_cannot_be_mapped_is_refused():
    with pytest.raises(RuntimeError, match="fstat"):
        _adoption(None, -1, Run(0, PAGE))


@shares
def test_runs_smaller_than_the_file(tmp_path):
    arrays = {f"t{i}": random_array(mx.uint8, (3000,), seed=i) for i in range(20)}
    write_safetensors(tmp_path / "f", arrays)
    with SafetensorsFile(tmp_path / "f") as file:
        adopt = partial(_adoption, file._mapping, file._descriptor)
        runs = SharedRuns(file.tensors.values(), adopt, max_run_bytes=2 * PAGE)
        assert all(same(runs.view(file.tensors[name]), array) for name, array in arrays.items())
    assert len(runs.bases) > 3


@shares
@linux_only
def test_cutting_an_adopted_base_never_copies(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(np.arange(4 * PAGE, dtype=np.uint8).tobytes())
    base = adopt_file(path)
    start = find_address(base)
    assert start % PAGE == 0
    for dtype, size in [("U8", 1), ("I8", 1), ("F16", 2), ("U32", 4), ("I64", 8)]:
        for offset in range(0, 5 * size, size):
            entry = TensorEntry("t", dtype, (3, 5), 64 + offset, 64 + offset + 15 * size)
            assert find_address(cut_tensor(base, entry, run_begin=0)) == start + entry.begin


@shares
def test_a_checkpoint_shares_or_copies_as_asked(tmp_path):
    arrays = {f"t{i}": random_array(mx.bfloat16, (64, 64), seed=i) for i in range(6)}
    write_checkpoint(tmp_path, arrays, max_shard_bytes=20_000)
    for use_mmap in (True, False):
        with Checkpoint.open(tmp_path, use_mmap=use_mmap) as checkpoint:
            assert all(same(checkpoint.read(name), array) for name, array in arrays.items())
            report = checkpoint.report
        assert report.total_bytes == (report.shared_bytes if use_mmap else report.copied_bytes)
        assert report.reasons == (() if use_mmap else ("as asked for",))
