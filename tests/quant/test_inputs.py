"""Inputs rounded in fixed steps: the op against float64, what backends say to it, and how a step is chosen."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_edge import ops
from mlx_edge.errors import InvalidRequestError
from mlx_edge.models.packing import pack_weight
from mlx_edge.ops import cpu, metal_qmv
from mlx_edge.quant import InputStatistics, Packing, dequantize, quantize
from tests.ops import oracle
from tests.quant.oracle import values_of

SCALE = 0.021


def rounded(x: np.ndarray, scale: float) -> np.ndarray:
    """Half to even, in float32 as the op divides; then exactly."""
    codes = np.rint((x.astype(np.float32) / np.float32(scale)).astype(np.float64))
    return np.clip(codes, -127, 127) * np.float64(np.float32(scale))


def make_weight(kind: str, input_scale: float | None) -> ops.Dense | ops.Quantized:
    mx.random.seed(3)
    weight, bias = mx.random.normal((24, 64)), mx.random.normal((24,))
    if kind == "dense":
        return ops.Dense(weight, bias, input_scale)
    packed = quantize(weight, Packing(32, 8, kind), mx.float32, bias=bias)
    return ops.Quantized(**{**vars(packed), "input_scale": input_scale})


def values(weight: ops.Dense | ops.Quantized) -> np.ndarray:
    return values_of(weight) if isinstance(weight, ops.Quantized) else oracle.f64(weight.weight)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("kind", ["affine", "mxfp8", "dense"])
def test_the_product_meets_rounded_inputs(kind: str, rows: int) -> None:
    weight = make_weight(kind, SCALE)
    x = 1.5 * mx.random.normal((1, rows, 64))  # some of it beyond 127 steps
    wanted = rounded(np.array(x), SCALE) @ values(weight).T + oracle.f64(weight.bias)
    assert (np.abs(np.array(x)) > 127 * SCALE).any()
    found = oracle.f64(ops.linear(x, weight))
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()
    floats = oracle.f64(ops.linear(x, make_weight(kind, None)))
    assert np.abs(floats - wanted).max() > 1e-3 * np.abs(wanted).max()


def test_inputs_on_the_grid_stay_and_those_beyond_are_clipped() -> None:
    eye = ops.Dense(mx.eye(4), None, 0.5)
    x = mx.array([[0.5, -63.5, 64.0, -1000.0]])
    assert ops.linear(x, eye).tolist() == [[0.5, -63.5, 63.5, -63.5]]
    for dtype in (mx.float16, mx.bfloat16):
        assert ops.linear(x.astype(dtype), eye).dtype == dtype


@pytest.mark.parametrize("block", ["mlp", "head"])
def test_blocks_round_the_input_of_each_linear(block: str) -> None:
    norm, x = ops.Norm(mx.ones((64,)), 1e-5), mx.random.normal((1, 3, 64))
    weight = make_weight("affine", SCALE)
    h = oracle.rms_norm(oracle.f64(x), norm)
    if block == "head":
        wanted = rounded(h, SCALE) @ values(weight).T + oracle.f64(weight.bias)
        found = ops.head(x, ops.HeadWeights(norm, weight))
    else:
        down = ops.Dense(mx.random.normal((64, 24)), None, 0.1)
        inner = rounded(h, SCALE) @ values(weight).T + oracle.f64(weight.bias)
        inner = oracle.glu(inner, inner, "silu")
        wanted = oracle.f64(x) + rounded(inner, 0.1) @ oracle.f64(down.weight).T
        found = ops.mlp_block(x, ops.MLPWeights(norm, weight, weight, down))
    # Where the last bit of an input differs, rounding may choose the neighbouring code: by one step, seldom.
    error = np.abs(oracle.f64(found) - wanted)
    assert np.median(error) <= 1e-5 * np.abs(wanted).max()
    assert error.max() <= 0.1 * np.abs(wanted).max()


def test_a_watcher_sees_inputs_as_they_come() -> None:
    seen: list[mx.array] = []
    x = mx.random.normal((1, 2, 64))
    with ops.reference(), ops.watch_inputs(lambda _weight, given: seen.append(given)):
        ops.linear(x, make_weight("affine", SCALE))
    assert seen[0] is x


@pytest.mark.parametrize("kind", ["affine", "dense"])
def test_fast_backends_leave_fixed_steps_to_the_reference(kind: str) -> None:
    weight, free = make_weight(kind, SCALE), make_weight(kind, None)
    x = mx.random.normal((1, 1, 64))
    assert metal_qmv.refuse(x[0], [free]) is None
    said = metal_qmv.refuse(x[0], [weight])
    assert said == "inputs are rounded in fixed steps; served are inputs as they come"
    assert metal_qmv.refuse_residual(weight) == said
    refuse = cpu.OPS["linear"][1]
    assert refuse(x, weight) == cpu.FIXED_STEPS
    assert refuse(x, free) == cpu.NOT_PACKED
    assert ops.choose("linear", x, weight).backend.name == "reference"
    if cpu.missing() is None:
        with pytest.raises(ValueError, match="rounded in fixed steps"):
            pack_weight(weight)


def collect(*pieces: mx.array) -> InputStatistics:
    statistics = InputStatistics("layer")
    for piece in pieces:
        statistics.add(piece)
    return statistics


def error_of(x: mx.array, scale: float) -> float:
    return float(np.square(rounded(np.array(x), scale) - np.array(x)).mean())


@pytest.mark.parametrize("kind", ["normal", "uniform", "heavy"])
def test_the_step_is_about_the_best_there_is(kind: str) -> None:
    mx.random.seed(5)
    shape = (400, 256)
    x = mx.random.normal(shape) if kind != "uniform" else mx.random.uniform(-1, 1, shape)
    x = x * mx.abs(x) * mx.abs(x) if kind == "heavy" else x
    found = collect(x[:100], x[100:]).best_scale()
    largest = float(mx.abs(x).max()) / 127
    best = min(error_of(x, share * largest) for share in np.linspace(0.05, 1.2, 60))
    assert error_of(x, found) <= 1.1 * best
    assert error_of(x, largest) >= 0.98 * error_of(x, found)


def test_one_huge_number_does_not_decide_alone() -> None:
    mx.random.seed(6)
    x = mx.random.normal((512, 128))
    usual = collect(x).best_scale()
    x[0, 0] = 2000.0
    assert usual < collect(x).best_scale() < 0.1 * 2000 / 127  # squares alone take about all of it


def test_pieces_add_up() -> None:
    x = mx.random.normal((2, 300, 64))
    whole, parts = collect(x), collect(x[0], x[1, :7], x[1, 7:])
    assert whole.best_scale() == parts.best_scale()
    assert np.allclose(whole.column_weights, parts.column_weights, rtol=1e-5)
    assert np.allclose(whole.column_weights, np.square(np.array(x)).mean((0, 1)), rtol=1e-5)
    assert whole.has_rows and not InputStatistics("other").has_rows


def test_many_numbers_are_sampled_and_give_about_the_same() -> None:
    x = mx.random.normal((9000, 256))
    step = collect(x).best_scale()
    assert abs(collect(x[:2000]).best_scale() / step - 1) < 0.1


def test_zeros_have_some_step_and_broken_numbers_are_refused() -> None:
    assert collect(mx.zeros((4, 32))).best_scale() == 1.0
    assert collect(mx.full((4, 32), 1e-30)).best_scale() == 1.0
    for bad in (mx.nan, mx.inf, -mx.inf):
        x = mx.zeros((4, 32))
        x[1, 3] = bad
        with pytest.raises(InvalidRequestError, match="NaN or infinity go into layer"):
            collect(x)


def test_the_oracle_reads_what_is_stored() -> None:
    weight = make_weight("affine", None)
    assert isinstance(weight, ops.Quantized)
    assert np.allclose(values_of(weight), oracle.f64(dequantize(weight)), rtol=1e-6, atol=1e-7)
