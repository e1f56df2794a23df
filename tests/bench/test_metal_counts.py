"""bench/metal_counts.py: the roofline's arithmetic, what counts as a dispatch, calibration, and the run's plumbing."""

import json
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import pytest

from bench import metal_counts
from bench.metal_calibration import Point, calibrate, make_points
from bench.metal_cases import (
    Case,
    MLXProduct,
    MLXUnfusedAttention,
    OurProduct,
    mlx_attention_case,
    mlx_route,
)
from bench.metal_graph import Layer, count_mlx, mark, read_graph
from bench.metal_plan import FULL, QUICK, Scope, mlx_step, our_products, our_step
from bench.metal_report import make_markdown
from bench.metal_roofline import (
    L1_BYTES,
    L2_BYTES,
    LEVEL_S,
    MATRIX_CYCLES,
    PREDICTED,
    SECTOR_BYTES,
    Chip,
    alu_cycles,
    predict,
    step_seconds,
)
from bench.metal_shapes import GQA4, GQA8, Heads, Matrix, Model
from bench.metal_steps import STEPS, count_dispatches, count_ours
from bench.metal_summary import summarize, weight_ratio
from bench.metal_work import LINE, Lines, Work, role_of

CHIP = Chip("a chip", 15, "g", cores=10, ghz=1.0, gbs=100, achievable=0.8)
BUSY = {"threadgroups": 1000.0, "simdgroups": 8000.0}  # every core full
TINY = Model("tiny", 2, 128, 256, 512, Heads(4, 2, 64))
SCOPE = Scope("tiny", (TINY,), (512,), (1, 8), has_points=False)
LAYERS = {
    name: Layer(dispatches, 12, 9, 5)
    for name, dispatches in {
        "ours": 6.0, "ours_packed": 6.0, "mlx": 17, "mlx_qk_norm": 19, "mlx_packed": 26
    }.items()
}  # fmt: skip


def reading(role: str, lines: float, **more: float) -> Work:
    """A full grid that reads so many lines once."""
    return Work("reader", **BUSY, reads={role: Lines(lines, lines, lines, lines * LINE)}, **more)


@pytest.mark.parametrize(
    ("work", "limit", "expected_s"),
    [
        (reading("kv", 1e6), "memory", 1e6 * LINE / 80e9),
        (
            Work("w", **BUSY, reads={"kv": Lines(1, group=1e6)}),
            "l2",
            1e6 * LINE / L2_BYTES / 10e9,
        ),
        (
            Work("w", **BUSY, reads={"kv": Lines(1, 1, issued=1e6)}),
            "loads",
            1e6 * SECTOR_BYTES / L1_BYTES / 10e9,
        ),
        (Work("w", **BUSY, operations={"fma": 1.28e9}), "arithmetic", 1e7 / 10e9),
        (Work("w", **BUSY, bank_cycles=1e7), "threadgroup_memory", 1e7 / 10e9),
    ],
)
def test_a_dispatch_takes_as_long_as_its_longest_part(
    work: Work, limit: str, expected_s: float
) -> None:
    times = predict(work, CHIP)
    assert times.limit == limit
    assert times.total == pytest.approx(expected_s)


@pytest.mark.parametrize(
    ("work", "cycles"),
    [
        (Work("w", operations={"fmul": 256.0, "fadd": 128.0, "fsub": 64.0}), 2.0),  # fused
        (Work("w", operations={"uitofp": 32.0, "expf": 32.0, "sqrt": 16.0}), 3.0),
        (Work("w", operations={"add": 1e9, "icmp": 1e9, "load": 1e9}), 0.0),
        (Work("w", matrix_multiplies=2), 2 * MATRIX_CYCLES),
        (Work("w", simd_operations=4), 4 * 3.75),
    ],
)
def test_arithmetic_at_published_rates(work: Work, cycles: float) -> None:
    assert alu_cycles(work) == pytest.approx(cycles)


def test_a_small_grid_leaves_cores_idle_and_latency_in_sight() -> None:
    full = Work("w", **BUSY, operations={"fma": 1e9})
    half = Work("w", 5, 5 * 24, operations={"fma": 1e9})
    lonely = Work("w", 10, 10 * 3, operations={"fma": 1e9})
    assert predict(half, CHIP).total == pytest.approx(2 * predict(full, CHIP).total)
    assert predict(lonely, CHIP).total == pytest.approx(2 * predict(full, CHIP).total)


def test_a_step_is_its_dispatches_and_their_waiting() -> None:
    one = predict(reading("kv", 1e6), CHIP).total
    assert step_seconds([reading("kv", 1e6)] * 3, 7, CHIP) == pytest.approx(3 * one + 7 * LEVEL_S)


def test_scaled_work_touches_shared_inputs_once() -> None:
    reads = {"weights": Lines(10, 10, 10, 10), "other": Lines(3, 30, 30, 30)}
    scaled = Work("w", 4, 8, reads, Lines(2, 2, 2, 2), {"fma": 5}).scaled(3)
    assert scaled.lines("weights").unique == 30
    assert (scaled.lines("other").unique, scaled.lines("other").group) == (3, 90)
    assert (scaled.threadgroups, scaled.writes.unique, scaled.operations) == (12, 6, {"fma": 15})


@pytest.mark.parametrize(
    ("kernel", "buffer", "role"),
    [
        ("qmv_norm", "packs2", "weights"),
        ("affine_qmv_fast", "biases", "weights"),
        ("affine_qmv_fast", "x", "other"),
        ("attn_decode", "tail_rows", "kv"),
        ("attn_decode_q_parts", "body_scales", "kv"),
        ("sdpa_vector", "values", "kv"),
        ("attn_combine", "values", "other"),
    ],
)
def test_roles_of_buffers(kernel: str, buffer: str, role: str) -> None:
    assert role_of(kernel, buffer) == role


def test_views_are_no_dispatch_and_levels_are_the_longest_chain() -> None:
    x = mx.array([1.0, 2.0])
    y = mx.sin(x).reshape(2, 1).T + mx.cos(x)[None]
    graph = read_graph([y])
    assert graph.dispatches == {"Sin": 1, "Cos": 1, "Add": 1}
    assert graph.levels == 2


def test_a_compiled_function_counts_at_every_call() -> None:
    twice = mx.compile(lambda x: mx.exp(x) * 2 + 1)
    graph = read_graph([twice(twice(mx.array([1.0])))])
    assert (graph.total, graph.levels) == (2, 2)


def test_a_marker_is_one_node_that_waits_for_all_inputs() -> None:
    x = mx.array([1.0])
    graph = read_graph([mark([mx.sin(x), mx.sin(mx.cos(x))], (3, 4), x.dtype)])
    assert graph.dispatches == {"Sin": 2, "Cos": 1, "Concatenate": 1}
    assert graph.levels == 3


@pytest.mark.parametrize(
    ("family", "kv_bits", "dispatches", "levels"),
    [("llama", None, 17, 12), ("llama", 4, 26, 15), ("qwen3", None, 19, 13)],
)
def test_dispatches_of_mlx_lm(
    family: str, kv_bits: int | None, dispatches: int, levels: int
) -> None:
    layer = count_mlx(family, kv_bits)
    assert (layer.dispatches, layer.levels) == (dispatches, levels)
    assert layer.others == 9  # embed 4, norm, head, and 3 of greedy sampling


@pytest.mark.parametrize(("kv_bits", "planes"), [(None, 1), (4, 3)])
def test_our_dispatches_are_six_and_the_merges(kv_bits: int | None, planes: int) -> None:
    dispatches, machine = count_dispatches(kv_bits)
    assert dispatches == 6 + planes / STEPS
    assert machine.counts.copied_bytes == 0
    layer = count_ours(kv_bits)
    assert (layer.dispatches, layer.levels, layer.others) == (dispatches, 6, 6)


@pytest.mark.parametrize(
    ("matrix", "rows", "generation", "route"),
    [
        (Matrix(2048, 2048), 1, 13, "qmv"),
        (Matrix(2048, 2048), 8, 13, "qmv"),
        (Matrix(8192, 2048), 8, 13, "qmm"),
        (Matrix(2048, 2048), 8, 16, "qmv_wide"),
        (Matrix(2048, 2048), 16, 16, "qmm"),
        (Matrix(2048, 2048), 16, 17, "qmv_wide"),
    ],
)
def test_kernels_that_mlx_takes(matrix: Matrix, rows: int, generation: int, route: str) -> None:
    assert mlx_route(matrix, rows, generation, "g") == route


@pytest.mark.parametrize(
    ("heads", "rows", "positions", "kernel"),
    [
        (GQA4, 1, 512, "sdpa_vector"),
        (GQA4, 1, 4096, "sdpa_vector_2pass"),
        (Heads(8, 8, 128), 1, 4096, "sdpa_vector"),
        (GQA8, 8, 512, None),  # more than 32 query rows to a head of keys
        (GQA4, 16, 512, "steel_attention"),
        (Heads(4, 1, 256), 16, 512, None),
    ],
)
def test_attention_that_mlx_takes(
    heads: Heads, rows: int, positions: int, kernel: str | None
) -> None:
    case = mlx_attention_case(heads, rows, positions, "g")
    assert (case and case.kernel) == kernel


def test_a_missed_point_says_so() -> None:
    case = MLXProduct(Matrix(8, 128), 1, "qmv")
    points = [
        Point(f"off by {by}", "nowhere", CHIP, 1.0, (case,), lambda _, by=by: 1 + by)  # type: ignore[misc]
        for by in (0.24, -0.24, 0.26, -0.26)
    ]
    rows = calibrate(points, {case: []})
    assert [row["is_missed"] for row in rows] == [False, False, True, True]
    assert calibrate(points, {}) == []  # not counted


def test_published_points_name_their_sources() -> None:
    for point in make_points():
        assert "#" in point.source
        assert point.published > 0


def test_a_window_bounds_what_most_layers_see() -> None:
    model = Model("windowed", 6, 128, 256, 512, Heads(4, 1, 64), window=128, num_global_layers=1)
    assert model.attended(1024) == {1024: 1, 128: 5}
    assert model.attended(100) == {100: 6}
    ours = our_step(model, 1, 1024, SCOPE)
    mlx = mlx_step(model, 1, 1024, PREDICTED[0], SCOPE)
    assert mlx is not None
    assert sum(part.times for part in ours) == 6 * 4 + 6 + 1
    assert sum(part.times for part in mlx) == 6 * 7 + 6 + 1


def read_once(case: Case) -> list[Work]:
    """As if every weight were read once."""
    matrices = [case.matrix] if isinstance(case, MLXProduct) else []
    if isinstance(case, OurProduct):
        matrices = [Matrix(size, case.columns) for size in case.sizes]
    lines = sum(matrix.lines for matrix in matrices) or 100
    return [reading("weights" if matrices else "kv", lines)]


def test_one_reading_of_the_weights_is_a_ratio_of_one() -> None:
    cases = our_products(TINY, 8, SCOPE)
    assert weight_ratio(TINY, cases, {case: read_once(case) for case in cases}) == 1.0
    assert weight_ratio(TINY, cases, {}) is None


KEYS = (
    "dispatches_per_layer_llama dispatches_per_layer_quantized_kv weight_bytes_ratio_m1 "
    "weight_bytes_ratio_m8 weight_bytes_ratio_m16 kv_lines_ratio_gqa4 kv_lines_ratio_gqa8 "
    "quantized_kv_bytes_ratio_8k"
).split()


def test_every_key_stands_beside_mlx_and_is_null_when_not_counted() -> None:
    summary, notes = summarize(SCOPE, {}, LAYERS)
    assert set(summary) == {name for key in KEYS for name in (key, f"mlx_{key}")}
    assert list(notes) == KEYS
    assert summary["dispatches_per_layer_quantized_kv"] == 6.0
    assert summary["mlx_dispatches_per_layer_quantized_kv"] == 27
    assert summary["weight_bytes_ratio_m1"] is None


def test_a_run_counts_each_case_once_and_reports(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    counted: list[Case] = []

    def count_all(cases: Sequence[Case], _processes: int) -> list[metal_counts.Counted]:
        counted.extend(cases)
        refused = [c for c in cases if isinstance(c, MLXUnfusedAttention)]
        others = [c for c in cases if c not in refused]
        return [
            *((case, [], "MetalError: refused") for case in refused),
            *((case, read_once(case), "") for case in others),
        ]

    monkeypatch.setattr(metal_counts, "count_all", count_all)
    monkeypatch.setattr(metal_counts, "count_layers", lambda: LAYERS)
    monkeypatch.setattr(metal_counts, "count_case", lambda case: (case, read_once(case), ""))
    result = metal_counts.run(SCOPE)
    assert len(counted) == len(set(counted))
    assert len(result["failures"]) == 2
    assert result["summary"]["quantized_kv_bytes_ratio_8k"] is None
    assert result["summary"]["weight_bytes_ratio_m8"] == 1.0
    assert result["null"] == {"ours": 1.0, "mlx": 1.0}
    assert len(result["steps"]) == 2 * len(PREDICTED)
    step = result["steps"][0]
    assert (step["ours"]["dispatches"], step["mlx"]["dispatches"]) == (2 * 6 + 9, 2 * 17 + 9)
    assert step["mlx"]["levels"] == 2 * 12 + 5
    weights = sum(matrix.lines for matrix in TINY.projections.values()) * 2 + TINY.head.lines
    assert step["ours"]["weights_mb"] == pytest.approx(weights * LINE / 1e6, rel=1e-3)
    tables = make_markdown(result)
    assert "not counted" in tables
    assert all(f"`{key}`" in tables for key in KEYS)
    (tmp_path / "result.json").write_text(json.dumps(result))


def test_quick_is_a_part_of_the_full_run() -> None:
    assert set(QUICK.models) < set(FULL.models)
    assert set(QUICK.contexts) < set(FULL.contexts)
    assert len(metal_counts.find_cases(QUICK)) < len(metal_counts.find_cases(FULL)) / 2


@pytest.mark.parametrize("rows", [1, 8])
def test_kernels_read_weights_as_often_as_they_must(rows: int) -> None:
    """In the emulator: ours once, MLX's for each row; a share of a matrix counts for all of it."""
    matrix = Matrix(256, 512)

    def lines(case: Case) -> float:
        return sum(work.lines("weights").group for work in case.count())

    assert lines(OurProduct("res", (256,), 512, rows)) == matrix.lines
    assert lines(MLXProduct(matrix, rows, "qmv")) == rows * matrix.lines
    assert lines(MLXProduct(matrix, rows, "qmv", most_rows=64)) == rows * matrix.lines
