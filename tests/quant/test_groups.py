"""Every format against float64: codes are the nearest on their grid, grids reach over their groups, packs are MLX's."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_edge import ops
from mlx_edge.quant import (
    Granularity,
    Packing,
    dequantize,
    make_grid,
    pack,
    quantize,
    quantize_onto,
    snap_scales,
    stored_tensors,
    unpack,
)
from tests.ops.oracle import f64
from tests.quant.oracle import codes_of, nearest_error, values_of, values_on_grid

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
BITS = (2, 3, 4, 5, 6, 8)
AFFINE = [Packing(group, bits) for bits in BITS for group in (32, 64, 128)]
SMALL_FLOATS = [Packing(32, 4, "mxfp4"), Packing(32, 8, "mxfp8"), Packing(16, 4, "nvfp4")]
ULP = {mx.float32: 2.0**-24, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}


def normal(rows: int, columns: int, scale: float = 0.02) -> mx.array:
    mx.random.seed(rows + columns)
    return scale * mx.random.normal((rows, columns))


def in_groups(array: mx.array, packing: Packing) -> np.ndarray:
    return f64(array).reshape(array.shape[0], -1, packing.group_size)


def assert_nearest(array: mx.array, weight: ops.Quantized) -> None:
    """No code is farther from its number than the nearest one, but for a draw's rounding."""
    error = np.abs(values_of(weight) - f64(array))
    assert (error <= nearest_error(array, weight) + 1e-6 * np.abs(f64(array))).all()


def assert_mlx_reads(weight: ops.Quantized) -> None:
    """MLX takes the words for the same values, and so does `dequantize`."""
    wanted = values_of(weight)
    theirs = mx.dequantize(
        weight.weight,
        weight.scales.astype(mx.float32) if weight.mode == "affine" else weight.scales,
        None if weight.offsets is None else weight.offsets.astype(mx.float32),
        group_size=weight.group_size,
        bits=weight.bits,
        mode=weight.mode,
        **({} if weight.mode == "affine" else {"dtype": mx.float32}),
    )
    tolerance = 1e-6 * max(np.abs(wanted).max(), 1e-30)
    assert np.abs(f64(theirs) - wanted).max() <= tolerance
    assert np.abs(f64(dequantize(weight)) - wanted).max() <= tolerance


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packing", AFFINE, ids=str)
def test_affine_codes_are_the_nearest_and_within_half_a_step(
    packing: Packing, dtype: mx.Dtype
) -> None:
    weight = normal(7, 2 * packing.group_size).astype(dtype)
    stored = quantize(weight, packing, dtype)
    assert stored.offsets is not None
    assert {stored.scales.dtype, stored.offsets.dtype} == {dtype}
    assert_nearest(weight, stored)
    assert_mlx_reads(stored)
    steps, numbers = np.abs(f64(stored.scales)), in_groups(weight, packing)
    grid = values_on_grid(stored)
    error = np.abs(numbers - values_of(stored).reshape(numbers.shape))
    low, high = grid.min(-1, keepdims=True), grid.max(-1, keepdims=True)
    is_inside = (numbers >= low) & (numbers <= high)
    assert (np.where(is_inside, error, 0).max(-1) <= 0.50001 * steps).all()
    # To have zero on it, a grid may end a step early; rounded scales and offsets move its end, too.
    moved = ULP[dtype] * (packing.num_codes * steps + np.abs(f64(stored.offsets)))
    assert (np.where(is_inside, 0, error).max(-1) <= 1.0001 * steps + moved).all()
    assert is_inside.mean() > 0.85


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packing", AFFINE, ids=str)
def test_affine_is_as_good_as_mlxs_own(packing: Packing, dtype: mx.Dtype) -> None:
    weight = normal(16, 256).astype(dtype)
    words, scales, offsets = mx.quantize(weight, group_size=packing.group_size, bits=packing.bits)
    theirs = ops.Quantized(words, scales, offsets, packing.group_size, packing.bits)
    ours = quantize(weight, packing, dtype)
    errors = [np.square(values_of(q) - f64(weight)).mean() for q in (ours, theirs)]
    assert errors[0] <= 1.001 * errors[1]
    if dtype == mx.float32:
        assert np.mean(codes_of(ours) == codes_of(theirs)) > 0.999


@pytest.mark.parametrize("scale", [1.0, 0.02, 1e-3, 1e-12])
@pytest.mark.parametrize("packing", SMALL_FLOATS, ids=str)
def test_small_floats_are_the_nearest_on_their_grid(packing: Packing, scale: float) -> None:
    weight = normal(7, 96, scale)
    stored = quantize(weight, packing, mx.float16)
    assert stored.offsets is None and stored.scales.dtype == mx.uint8
    assert_nearest(weight, stored)
    assert_mlx_reads(stored)


@pytest.mark.parametrize("scale", [1.0, 0.02, 1e-3])
@pytest.mark.parametrize("packing", SMALL_FLOATS, ids=str)
def test_small_floats_are_at_least_as_good_as_mlxs_own(packing: Packing, scale: float) -> None:
    weight = normal(64, 256, scale)
    options = {"group_size": packing.group_size, "bits": packing.bits, "mode": packing.mode}
    theirs = ops.Quantized(*mx.quantize(weight, **options), None, *options.values())
    ours = quantize(weight, packing, mx.float16)
    errors = [np.square(values_of(q) - f64(weight)).mean() for q in (ours, theirs)]
    assert errors[0] <= errors[1] * (1 if packing.bits == 8 else 0.96)


@pytest.mark.parametrize("packing", [*AFFINE, *SMALL_FLOATS], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_any_number_of_rows(packing: Packing, rows: int) -> None:
    columns = 6 * packing.group_size
    weight = normal(8, columns)[:rows]
    stored = quantize(weight, packing, mx.float16)
    assert stored.shape == (rows, columns)
    assert dequantize(stored).shape == (rows, columns)
    whole = quantize(normal(8, columns), packing, mx.float16)
    assert np.array_equal(codes_of(stored), codes_of(whole)[:rows])


@pytest.mark.parametrize("packing", [*AFFINE, *SMALL_FLOATS], ids=str)
def test_zeros_stay_zeros(packing: Packing) -> None:
    stored = quantize(mx.zeros((2, 256)), packing, mx.float16)
    assert (values_of(stored) == 0).all()
    assert_mlx_reads(stored)


@pytest.mark.parametrize("value", [0.37, -0.37])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packing", AFFINE, ids=str)
def test_a_constant_group_is_exact_but_for_the_dtype(
    packing: Packing, dtype: mx.Dtype, value: float
) -> None:
    stored = quantize(mx.full((2, 128), value), packing, dtype)
    assert np.abs(values_of(stored) - value).max() <= 2 * ULP[dtype] * abs(value)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("packing", AFFINE, ids=str)
def test_groups_on_one_side_of_zero(packing: Packing, sign: int) -> None:
    weight = sign * (1 + mx.abs(normal(3, 256)))
    stored = quantize(weight, packing, mx.float32)
    assert_nearest(weight, stored)
    assert (np.sign(values_of(stored)) == sign).all()
    # All of the grid lies where the group does: no step is spent on the way to zero.
    steps = np.abs(f64(stored.scales))
    spread = np.ptp(in_groups(weight, packing), axis=-1)
    assert (steps <= 1.5 * spread / (packing.num_codes - 1) + 1e-6).all()


@pytest.mark.parametrize("packing", [Packing(32, 4), Packing(32, 8), *SMALL_FLOATS], ids=str)
@pytest.mark.parametrize("size", [1e-40, 1e-9, 3e-6, 6e4, 1e6, 1e38])
def test_the_ends_of_a_dtypes_range(packing: Packing, size: float) -> None:
    """Never NaN, never the other sign, never larger than meant: what is out of range is the nearest that is in it."""
    weight = size * mx.concatenate([mx.ones((1, 64)), -mx.ones((1, 64))])
    values = values_of(quantize(weight, packing, mx.float16))
    assert np.isfinite(values).all()
    assert (values[0] >= 0).all() and (values[1] <= 0).all()
    assert np.abs(values).max() <= 1.2 * size
    if 1e-5 < size < 6e4 and packing.mode != "nvfp4":
        assert np.abs(values).min() >= 0.8 * size


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [1.0, 3e-6, 1e5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_symmetric_grids_have_zero_and_equal_steps(bits: int, size: float, dtype: mx.Dtype) -> None:
    packing = Packing(64, bits)
    weight = normal(5, 128, size)
    grid = make_grid(weight, packing, dtype, is_symmetric=True)
    stored = quantize_onto(weight, grid, packing, dtype)
    values = values_on_grid(stored)
    half = 1 << (bits - 1)
    assert (values[..., half] == 0).all()
    below, above = values[..., 1:half], values[..., half + 1 :]
    assert np.array_equal(-below[..., ::-1], above)
    assert_nearest(weight, stored)
    if size == 1.0 or (size == 1e5 and dtype != mx.float16):
        largest = np.abs(in_groups(weight, packing)).max(-1)
        assert np.allclose(above[..., -1], largest, rtol=4 * ULP[dtype])


@pytest.mark.parametrize("is_symmetric", [False, True])
@pytest.mark.parametrize(("per", "num_scales"), [("group", 20), ("channel", 5), ("tensor", 1)])
def test_a_scale_may_be_shared(per: Granularity, num_scales: int, is_symmetric: bool) -> None:
    packing = Packing(32, 8)
    weight = normal(5, 128)
    grid = make_grid(weight, packing, mx.float16, is_symmetric=is_symmetric, per=per)
    stored = quantize_onto(weight, grid, packing, mx.float16)
    scales, offsets = f64(stored.scales), f64(stored.offsets)
    assert len(np.unique(scales)) == num_scales
    if per != "group":
        assert all(len(set(row)) == 1 for row in scales) and all(len(set(r)) == 1 for r in offsets)
    assert_nearest(weight, stored)
    assert_mlx_reads(stored)
    error = np.abs(values_of(stored) - f64(weight)).max()
    assert error <= np.abs(scales).max() * 0.75


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scales_are_what_the_dtype_holds(dtype: mx.Dtype) -> None:
    scales = snap_scales(mx.array([0.1, -1e-6, 1e9, -3e38, 0.0]), dtype)
    assert scales.dtype == mx.float32
    assert np.isfinite(np.array(scales)).all()
    assert np.array_equal(np.array(scales), f64(scales.astype(dtype)))
    if dtype == mx.float16:
        assert scales.tolist()[2:4] == [65504.0, -65504.0]


def test_codes_and_grid_make_the_same_weight_again() -> None:
    packing = Packing(64, 5)
    stored = quantize(normal(3, 128), packing, mx.bfloat16, bias=mx.ones((3,)))
    codes, grid = unpack(stored)
    again = pack(codes, grid, packing, mx.bfloat16, bias=stored.bias)
    assert np.array_equal(np.array(again.weight), np.array(stored.weight))
    assert np.array_equal(f64(again.scales), f64(stored.scales))
    assert again.bias is stored.bias


def test_stored_tensors_have_mlxs_names() -> None:
    affine = stored_tensors("a.b", quantize(normal(2, 64), Packing(32, 4), mx.float16))
    assert list(affine) == ["a.b.weight", "a.b.scales", "a.b.biases"]
    floats = stored_tensors("a.b", quantize(normal(2, 64), Packing(32, 4, "mxfp4"), mx.float16))
    assert list(floats) == ["a.b.weight", "a.b.scales"]
