"""What a stored weight stands for, in float64 and from its bits: nothing here is MLX's or ours."""

import mlx.core as mx
import numpy as np

from mlx_edge import ops
from tests.ops import oracle


def codes_of(weight: ops.Quantized) -> np.ndarray:
    """The codes (N, E), bit by bit from the words: one little-endian stream a row."""
    words = np.array(weight.weight).astype("<u4")
    bits = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
    digits = bits.reshape(words.shape[0], words.shape[1] * 32 // weight.bits, weight.bits)
    return (digits.astype(np.int64) << np.arange(weight.bits)).sum(-1)


def values_on_grid(weight: ops.Quantized) -> np.ndarray:
    """Every value that each group may have: (N, E / G, number of codes) float64."""
    if weight.mode == "affine":
        assert weight.offsets is not None
        codes = np.arange(1 << weight.bits, dtype=np.float64)
        return oracle.f64(weight.offsets)[..., None] + oracle.f64(weight.scales)[..., None] * codes
    elements = oracle.E4M3 if weight.bits == 8 else oracle.E2M1
    scales = oracle.E4M3 if weight.mode == "nvfp4" else oracle.E8M0
    values = scales[np.array(weight.scales)][..., None] * elements
    if weight.bits == 8:  # the two codes that are no number
        values[..., [0x7F, 0xFF]] = np.inf
    return values


def values_of(weight: ops.Quantized) -> np.ndarray:
    """The values (N, E) that are stored, in float64."""
    grid = values_on_grid(weight)
    codes = codes_of(weight).reshape(*grid.shape[:2], weight.group_size)
    return np.take_along_axis(grid, codes, axis=-1).reshape(weight.shape)


def nearest_error(array: mx.array, weight: ops.Quantized) -> np.ndarray:
    """How far each number (N, E) is from the nearest value of its group's grid."""
    grid = np.sort(values_on_grid(weight), axis=-1)
    numbers = oracle.f64(array).reshape(*grid.shape[:2], weight.group_size)
    errors = np.empty_like(numbers)
    for place in np.ndindex(*grid.shape[:2]):
        column = np.abs(numbers[place][:, None] - grid[place][None, :])
        errors[place] = column.min(-1)
    return errors.reshape(weight.shape)
