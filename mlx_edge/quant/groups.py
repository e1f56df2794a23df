"""Quantizes a matrix in groups of columns, and back: the grid of each group first, then the nearest code on it.

An affine group has the values `offset + scale * code`. Scales and offsets are rounded to the dtype that they are stored
in before a code is chosen, so that no code is off its grid. Knows no model and no file.
"""

from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from mlx_edge.ops.types import Quantized
from mlx_edge.quant.formats import Packing
from mlx_edge.quant.packs import pack_codes, unpack_codes
from mlx_edge.quant.small_floats import quantize_floats

Granularity = Literal["group", "channel", "tensor"]  # over what a scale is chosen
MIN_SCALE = 1e-7  # of an affine group, as in MLX: half can hold it


@dataclass(frozen=True)
class Grid:
    """The values that an affine group may have: `offsets + scales * code`, code in 0 ... 2**bits - 1."""

    scales: mx.array  # (N, E / group_size) float32, of values that the stored dtype holds
    offsets: mx.array  # (N, E / group_size) float32, the same

    def nearest(self, values: mx.array, num_codes: int) -> mx.array:
        """Codes of the grid's values nearest to (N, E / group_size, ...) values, as float32."""
        scales, offsets = self._beside(values)
        safe = mx.where(scales == 0, 1.0, scales)
        return mx.clip(mx.round((values - offsets) / safe), 0, num_codes - 1)

    def values(self, codes: mx.array) -> mx.array:
        """The values that (N, E / group_size, ...) codes stand for, as float32."""
        scales, offsets = self._beside(codes)
        return offsets + scales * codes

    def _beside(self, array: mx.array) -> tuple[mx.array, mx.array]:
        shape = (*self.scales.shape, *(1,) * (array.ndim - self.scales.ndim))
        return self.scales.reshape(shape), self.offsets.reshape(shape)


def snap_scales(array: mx.array, dtype: mx.Dtype) -> mx.array:
    """Scales or offsets as float32, rounded to what `dtype` holds; a number beyond half's range becomes its largest."""
    limit = _largest(dtype)
    return mx.clip(array, -limit, limit).astype(dtype).astype(mx.float32)


def _largest(dtype: mx.Dtype) -> float:
    return 65504.0 if dtype == mx.float16 else 3.38e38  # that of bfloat16, which float32 has too


def in_groups(weight: mx.array, packing: Packing) -> mx.array:
    """(N, E) as (N, E / group_size, group_size) float32."""
    rows, columns = weight.shape
    shape = (rows, columns // packing.group_size, packing.group_size)
    return weight.astype(mx.float32).reshape(shape)


def make_grid(
    weight: mx.array,
    packing: Packing,
    dtype: mx.Dtype,
    *,
    is_symmetric: bool = False,
    per: Granularity = "group",
) -> Grid:
    """The grid of round-to-nearest for a weight (N, E): over the range of each group, row or the whole.

    Asymmetric grids reach from the smallest value to the largest, with zero on the grid where the range has it, as MLX
    does. Symmetric ones are those of two's complement: code - 2**(bits - 1) steps, of which the largest magnitude takes
    2**(bits - 1) - 1; zero is on the grid exactly, since a power of two times a scale is exact in every dtype.
    """
    groups = in_groups(weight, packing)
    if groups.size == 0:
        return Grid(mx.zeros(groups.shape[:2]), mx.zeros(groups.shape[:2]))
    axes = {"group": (2,), "channel": (1, 2), "tensor": (0, 1, 2)}[per]
    low = mx.broadcast_to(groups.min(axes, keepdims=True), (*groups.shape[:2], 1))[..., 0]
    high = mx.broadcast_to(groups.max(axes, keepdims=True), (*groups.shape[:2], 1))[..., 0]
    steps = packing.num_codes - 1
    if is_symmetric:
        assert packing.bits > 1, "one bit has no symmetric grid with zero on it"
        half = packing.num_codes // 2
        largest = mx.maximum(mx.abs(low), mx.abs(high))
        scales = mx.clip(largest / (half - 1), MIN_SCALE, _largest(dtype) / half)
        scales = snap_scales(scales, dtype)
        return Grid(scales, -half * scales)
    # From the end that is farther from zero, so that it and zero are both on the grid.
    is_low = mx.abs(low) > mx.abs(high)
    edge = mx.where(is_low, low, high)
    scales = mx.maximum((high - low) / steps, MIN_SCALE)
    scales = mx.where(is_low, scales, -scales)
    zero = mx.round(edge / scales)
    scales = mx.where(zero != 0, edge / mx.where(zero == 0, 1.0, zero), scales)
    offsets = mx.where(zero != 0, edge, 0.0)
    return Grid(snap_scales(scales, dtype), snap_scales(offsets, dtype))


def quantize(
    weight: mx.array,
    packing: Packing,
    dtype: mx.Dtype,
    *,
    bias: mx.array | None = None,
) -> Quantized:
    """Round-to-nearest of a float weight (N, E), with scales and offsets in `dtype`."""
    assert packing.refusal(weight.shape) is None
    if packing.mode == "affine":
        return quantize_onto(weight, make_grid(weight, packing, dtype), packing, dtype, bias=bias)
    words, scales = quantize_floats(weight, packing)
    return Quantized(words, scales, None, packing.group_size, packing.bits, packing.mode, bias)


def quantize_onto(
    weight: mx.array,
    grid: Grid,
    packing: Packing,
    dtype: mx.Dtype,
    *,
    bias: mx.array | None = None,
) -> Quantized:
    """Each value of a float weight (N, E) as the nearest code of a given affine grid."""
    groups = in_groups(weight, packing)
    codes = grid.nearest(groups, packing.num_codes).reshape(weight.shape)
    return pack(codes, grid, packing, dtype, bias=bias)


def pack(
    codes: mx.array,
    grid: Grid,
    packing: Packing,
    dtype: mx.Dtype,
    *,
    bias: mx.array | None = None,
) -> Quantized:
    """Codes (N, E) on an affine grid as they are stored."""
    return Quantized(
        pack_codes(codes, packing.bits),
        grid.scales.astype(dtype),
        grid.offsets.astype(dtype),
        packing.group_size,
        packing.bits,
        bias=bias,
    )


def unpack(weight: Quantized) -> tuple[mx.array, Grid]:
    """The codes (N, E) uint8 of an affine weight, and its grid."""
    assert weight.offsets is not None
    grid = Grid(weight.scales.astype(mx.float32), weight.offsets.astype(mx.float32))
    return unpack_codes(weight.weight, weight.bits), grid


def dequantize(weight: Quantized) -> mx.array:
    """The float32 values (N, E) that a quantized weight stands for."""
    if weight.offsets is not None:
        codes, grid = unpack(weight)
        groups = codes.astype(mx.float32).reshape(*grid.scales.shape, weight.group_size)
        return grid.values(groups).reshape(weight.shape)
    if weight.weight.size == 0:
        return mx.zeros(weight.shape)
    return mx.dequantize(
        weight.weight,
        weight.scales,
        group_size=weight.group_size,
        bits=weight.bits,
        mode=weight.mode,
        dtype=mx.float32,
    )


def stored_tensors(name: str, weight: Quantized) -> dict[str, mx.array]:
    """The tensors of a quantized layer as a file holds them; a bias of the layer itself is not among them."""
    tensors = {f"{name}.weight": weight.weight, f"{name}.scales": weight.scales}
    if weight.offsets is not None:
        tensors[f"{name}.biases"] = weight.offsets  # so MLX calls them
    return tensors
