"""The plan of runs, the cutting of tensors, and the fallback, on any machine.

A copying stand-in replaces the adoption of pages here, so that all but the adoption itself is exercised: that is in
test_adoption.py.
"""

import json
import mmap
import os
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_edge.weights import SafetensorsFile, mapping, safetensors, write_safetensors
from mlx_edge.weights.adoption import NOT_ASKED_FOR
from mlx_edge.weights.dtypes import ELEMENT_TYPES
from mlx_edge.weights.header import TensorEntry
from mlx_edge.weights.mapping import Run, SharedRuns, cut_tensor, plan_runs, why_copy
from tests.weights.files import SHAPES, item, random_array, same, save

PAGE = mmap.PAGESIZE
GIB = 2**30


def entry(begin, num_bytes, *, dtype="U8", shape=None):
    return TensorEntry(f"t{begin}", dtype, shape or (num_bytes,), begin, begin + num_bytes)


def test_one_run_of_whole_pages():
    assert plan_runs([entry(138, 50), entry(5000, 4000)], page_bytes=4096) == [Run(0, 12288)]
    assert plan_runs([entry(16384, 16384)], page_bytes=16384) == [Run(16384, 32768)]
    assert plan_runs([], page_bytes=4096) == []


def test_a_full_run_ends_before_the_tensor_that_does_not_fit():
    entries = [entry(0, 6000), entry(6000, 6000), entry(12000, 288)]
    assert plan_runs(entries, page_bytes=4096, max_run_bytes=8192) == [
        Run(0, 8192),
        Run(4096, 12288),
    ]


def test_tensors_without_bytes_or_without_a_buffer_are_left_out():
    entries = [entry(0, 0), entry(0, 20000), entry(20000, 100)]
    assert plan_runs(entries, page_bytes=4096, max_run_bytes=8192) == [Run(16384, 20480)]


@settings(max_examples=150, deadline=None, database=None)
@given(st.lists(st.integers(0, 40), max_size=30), st.integers(0, 30), st.integers(4, 64))
def test_runs_hold_each_tensor_and_stay_small(sizes, start, max_pages):
    entries, begin = [], start
    for size in sizes:
        entries.append(entry(begin, size))
        begin += size
    runs = plan_runs(entries, page_bytes=4, max_run_bytes=4 * max_pages)
    assert all(run.begin % 4 == 0 and run.end % 4 == 0 for run in runs)
    assert all(0 < run.num_bytes <= 4 * max_pages for run in runs)
    for one in entries:
        span = -(-one.end // 4) * 4 - one.begin // 4 * 4
        if one.num_bytes and span <= 4 * max_pages:
            assert any(run.holds(one) for run in runs)


def test_why_copy():
    assert why_copy(entry(138, 8)) is None
    assert why_copy(entry(139, 8, dtype="BF16", shape=(4,))) == mapping.UNALIGNED
    assert why_copy(entry(138, 8, dtype="BF16", shape=(4,))) is None
    assert why_copy(entry(138, 8, dtype="F32", shape=(2,))) == mapping.UNALIGNED
    assert why_copy(entry(132, 8, dtype="I64", shape=(1,))) == mapping.UNALIGNED
    assert why_copy(entry(136, 8, dtype="F64", shape=(1,))) == mapping.NOT_A_VIEW
    assert why_copy(entry(136, 8, dtype="BOOL")) == mapping.NOT_A_VIEW


def test_why_copy_of_what_mlx_cannot_count():
    # 4 GiB of float32 is a full buffer; 2 GiB of bytes is too long for one int32 axis.
    assert why_copy(entry(0, 4 * GIB, dtype="F32", shape=(1024, 2**20))) is None
    assert why_copy(entry(4, 4 * GIB, dtype="F32", shape=(1024, 2**20))) == mapping.TOO_LARGE
    assert why_copy(entry(0, 2 * GIB, shape=(1024, 2**21))) == mapping.TOO_LARGE
    assert why_copy(entry(0, 2 * GIB - 64, shape=(64, 2**25 - 1))) is None


@pytest.mark.parametrize("name", ["U8", "I8", "F16", "BF16", "U32", "F32", "I64", "U64"])
def test_tensors_are_cut_at_every_place_that_is_aligned(name):
    element = ELEMENT_TYPES[name]
    raw = np.random.default_rng(0).integers(0, 256, 64 * 1024, dtype=np.uint8)
    base = mx.array(raw.view(np.uint32))
    for offset in range(0, 24, element.size):
        one = entry(PAGE + offset, 15 * element.size, dtype=name, shape=(3, 5))
        want = mx.array(raw[offset : offset + one.num_bytes].copy()).view(element.mlx)
        assert same(cut_tensor(base, one, run_begin=PAGE), want.reshape(3, 5))


@pytest.fixture
def copying_adoption(monkeypatch):
    """Makes this machine look like one that adopts pages; returns the sizes of what it adopted."""
    adopted = []

    def adopt(mapped, descriptor, run):
        assert run.begin % PAGE == 0
        assert run.num_bytes % PAGE == 0
        adopted.append(run.num_bytes)
        data = mapped[run.begin : run.end].ljust(run.num_bytes, b"\0")
        assert os.pread(descriptor, run.num_bytes, run.begin) == data[: len(mapped) - run.begin]
        return mx.array(np.frombuffer(data, np.uint32))

    monkeypatch.setattr(safetensors, "find_adoption", lambda: adopt)
    return adopted


def make_arrays():
    types = [mx.bfloat16, mx.float16, mx.float32, mx.uint32, mx.uint8, mx.int64, mx.bool_]
    return {
        f"{dtype}.{i}": random_array(dtype, shape, seed=i)
        for dtype in types
        for i, shape in enumerate(SHAPES)
    }


def test_what_our_writer_writes_is_all_shared_but_bools(tmp_path, copying_adoption):
    arrays = make_arrays()
    write_safetensors(tmp_path / "f", arrays)
    with SafetensorsFile(tmp_path / "f") as file:
        for _ in range(2):
            assert all(same(file.read(name), array) for name, array in arrays.items())
        report = file.report
    bools = sum(array.nbytes for array in arrays.values() if array.dtype == mx.bool_)
    assert report.shared_bytes == report.total_bytes - bools
    assert report.copied_bytes == 2 * bools
    assert report.reasons == (mapping.NOT_A_VIEW,)
    assert len(copying_adoption) == 1


def test_an_unpadded_file_is_shared_where_aligned(tmp_path, copying_adoption):
    table = {"a": item("U8", [3], [0, 3]), "b": item("F32", [2], [3, 11])}
    data = b"\1\2\3" + np.float32([1, 2]).tobytes()
    text = json.dumps(table).encode()
    for spaces, shared in [(1, 11), (0, 3)]:  # data begins at 8 + header: 1 makes `b` aligned
        header = text + b" " * ((spaces - len(text)) % 4)
        with SafetensorsFile(save(tmp_path / "f", header, data)) as file:
            assert file.read("a").tolist() == [1, 2, 3]
            assert file.read("b").tolist() == [1, 2]
            assert file.report.shared_bytes == shared
            assert file.report.copied_bytes == 11 - shared


def test_many_runs(tmp_path, copying_adoption):
    arrays = {f"t{i}": random_array(mx.uint8, (3000,), seed=i) for i in range(20)}
    write_safetensors(tmp_path / "f", arrays)
    with SafetensorsFile(tmp_path / "f") as file:
        adopt = partial(safetensors.find_adoption(), file._mapping, file._descriptor)
        runs = SharedRuns(file.tensors.values(), adopt, max_run_bytes=2 * PAGE)
        for name, array in arrays.items():
            assert same(runs.view(file.tensors[name]), array)
    assert len(copying_adoption) > 3
    assert max(copying_adoption) <= 2 * PAGE


@pytest.mark.parametrize("error", [ValueError, RuntimeError, TypeError])
def test_refused_adoption_falls_back_to_copies(tmp_path, monkeypatch, caplog, error):
    def refuse(*_):
        raise error("not here")

    monkeypatch.setattr(safetensors, "find_adoption", lambda: refuse)
    arrays = make_arrays()
    write_safetensors(tmp_path / "f", arrays)
    with SafetensorsFile(tmp_path / "f") as file:
        assert all(same(file.read(name), array) for name, array in arrays.items())
        report = file.report
    assert report.shared_bytes == 0
    assert report.copied_bytes == report.total_bytes
    assert mapping.REFUSED in report.reasons
    assert len(caplog.records) == 1


def test_a_machine_that_cannot_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors, "find_adoption", lambda: "because it is Tuesday")
    arrays = make_arrays()
    write_safetensors(tmp_path / "f", arrays)
    with SafetensorsFile(tmp_path / "f") as file:
        assert all(same(file.read(name), array) for name, array in arrays.items())
        assert file.report.copied_bytes == file.report.total_bytes
        assert file.report.reasons == ("because it is Tuesday",)


def test_without_mapping_everything_is_read(tmp_path, copying_adoption):
    arrays = make_arrays()
    write_safetensors(tmp_path / "f", arrays)
    with SafetensorsFile(tmp_path / "f", use_mmap=False) as file:
        assert all(same(file.read(name), array) for name, array in arrays.items())
        assert file.report.copied_bytes == file.report.total_bytes
        assert file.report.reasons == (NOT_ASKED_FOR,)
    assert not copying_adoption
