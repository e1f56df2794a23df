"""Bandwidth and bytes: what is measured is stated, what is counted is what the arrays say."""

from pathlib import Path

import mlx.core as mx
import pytest

from mlx_edge import ops
from mlx_edge.errors import InvalidRequestError
from mlx_edge.profiler import measure_bandwidth, roofline
from mlx_edge.profiler.traffic import Operands, bytes_moved

SMALL = 1 << 20


def test_bandwidth_states_how_it_was_measured() -> None:
    found = measure_bandwidth(buffer_bytes=SMALL, rounds=3)
    assert min(found.read_gbs, found.copy_gbs) > 0
    assert found.gbs == max(found.read_gbs, found.copy_gbs)
    assert (found.buffer_bytes, found.rounds) == (SMALL, 3)
    assert found.cost_s > 0


def test_measured_once_per_process(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(roofline, "measure_bandwidth", lambda: calls.append(1) or len(calls))
    roofline.machine_bandwidth.cache_clear()
    try:
        assert roofline.machine_bandwidth() == roofline.machine_bandwidth() == 1
    finally:
        roofline.machine_bandwidth.cache_clear()


@pytest.mark.parametrize("num_threads", [1, 3])
def test_through_numpy(num_threads: int) -> None:
    assert min(roofline.measure_with_numpy(SMALL, 1, num_threads)) > 0


def test_through_mlx() -> None:
    assert min(roofline.measure_with_mlx(SMALL, 1)) > 0


@pytest.mark.parametrize(("size", "rounds"), [(100, 3), (SMALL, 0)])
def test_nonsense_is_refused(size: int, rounds: int) -> None:
    with pytest.raises(InvalidRequestError, match="expected at least 1 over 4096"):
        measure_bandwidth(buffer_bytes=size, rounds=rounds)


def test_the_largest_cache_counts(tmp_path: Path) -> None:
    for index, size in enumerate(("32K", "512K", "32M")):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        (folder / "size").write_text(size + "\n")
    assert roofline.last_level_cache_bytes(tmp_path) == 32 << 20
    assert roofline.last_level_cache_bytes(tmp_path / "none") == 0


X = mx.zeros((1, 1, 8))  # 32 bytes


def test_weights_and_inputs_are_read_once_and_results_written() -> None:
    weight = ops.Dense(mx.zeros((16, 8)), bias=mx.zeros((16,)))  # 512 + 64
    norm = ops.Norm(mx.zeros((8,)), 1e-5)  # 32
    mlp = ops.MLPWeights(norm, weight, weight, ops.Dense(mx.zeros((8, 16))))  # 32 + 576 + 512
    assert bytes_moved("mlp_block", Operands.of((X, mlp)), Operands.of(X), 0) == 32 + 1120 + 32


def test_packed_weights_count_as_they_lie() -> None:
    packs, scales, offsets = mx.quantize(mx.zeros((64, 128)), group_size=64, bits=4)
    weight = ops.Quantized(packs, scales, offsets, 64, 4)
    operands = Operands.of(weight)
    assert bytes_moved("linear", operands, Operands.of(), 0) == 64 * 64 + 2 * 64 * 2 * 4


def test_embedding_reads_the_rows_it_needs() -> None:
    table = ops.Embedding(ops.Dense(mx.zeros((100, 8))))  # rows of 32 bytes
    tokens = mx.zeros((1, 3), mx.int32)
    result = mx.zeros((1, 3, 8))
    assert bytes_moved("embed", Operands.of(tokens, table), Operands.of(result), 0) == 12 + 96 + 96


class Reserved:
    nbytes = 1000


class Used(Reserved):
    stored_bytes = 300


def test_a_cache_is_read_as_used_and_its_growth_written() -> None:
    operands = Operands.of(X, Used())
    assert operands.is_exact
    assert bytes_moved("attention_block", operands, Operands.of(X), 200) == 32 + 300 + 100 + 32


def test_a_cache_that_does_not_say_counts_as_reserved() -> None:
    operands = Operands.of(X, Reserved())
    assert not operands.is_exact
    assert bytes_moved("attention_block", operands, Operands.of(X), 1000) == 32 + 1000 + 32
