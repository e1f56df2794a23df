"""Grids of groups chosen by the output error that they cause: narrower ones before codes, fitted ones after.

Knows weights, codes and the X^T X of their inputs (`hessian.py`); nothing of models.
"""

from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from mlx_edge.calibration.hessian import Matrix
from mlx_edge.errors import InvalidRequestError
from mlx_edge.quant import Grid, Packing, make_grid, snap_scales

SHRINKS = tuple(
    1 - 0.05 * step for step in range(11)
)  # of a group's range; AWQ's search ends at half too


def refuse_other_modes(method: str, packings: Mapping[str, Packing | None]) -> None:
    """Raises: InvalidRequestError for a packing that is not affine, which `method` does not serve."""
    for name, packing in packings.items():
        if packing is not None and packing.mode != "affine":
            raise InvalidRequestError(
                f"{name} is to be {packing.mode}; {method} serves affine packings only, "
                "use --method rtn for other modes"
            )


def narrow_grid(weight: mx.array, packing: Packing, dtype: mx.Dtype, hessian: Matrix) -> Grid:
    """For each group of a weight (N, E) the grid with the least output error among those over shrunk ranges.

    The error is that of the group alone, rounded to the nearest: d H d^T of its own block of `hessian` (E, E). What a
    narrower grid cuts off, it pays for there (AWQ's search for clipping, Lin et al. 2024).
    """
    size = packing.group_size
    groups = weight.reshape(weight.shape[0], -1, size)
    starts = range(0, weight.shape[1], size)
    squares = np.stack([hessian[i : i + size, i : i + size] for i in starts])
    blocks = mx.array((squares / max(np.abs(squares).max(), 1e-30)).astype(np.float32))
    best = make_grid(weight, packing, dtype)
    least = _errors(groups, best, packing, blocks)
    for shrink in SHRINKS[1:]:
        grid = make_grid(weight * shrink, packing, dtype)
        errors = _errors(groups, grid, packing, blocks)
        is_better = errors < least
        least = mx.where(is_better, errors, least)
        best = Grid(
            mx.where(is_better, grid.scales, best.scales),
            mx.where(is_better, grid.offsets, best.offsets),
        )
        mx.eval(least, best.scales, best.offsets)
    return best


def _errors(groups: mx.array, grid: Grid, packing: Packing, blocks: mx.array) -> mx.array:
    """Output errors (N, E / G) of groups (N, E / G, G) on the grid, for X^T X (E / G, G, G)."""
    lost = (groups - grid.values(grid.nearest(groups, packing.num_codes))).swapaxes(0, 1)
    return ((lost @ blocks) * lost).sum(-1).T


def fit_grid(weight: Matrix, codes: Matrix, grid: Grid, dtype: mx.Dtype, hessian: Matrix) -> Grid:
    """Scales and offsets that lessen the output error (w - q) H (w - q)^T for given codes (N, E).

    Group after group has its two numbers chosen for all rows by least squares, beside the others as they stand; a row
    keeps its own where rounding to `dtype` would make it worse, and where all of its values are the same: zeros of a
    pruned group stay zeros.
    """
    scales, offsets = (np.array(part, np.float64) for part in (grid.scales, grid.offsets))
    size = weight.shape[1] // scales.shape[1]
    errors = weight - grid_values(grid, codes)
    for group in range(scales.shape[1]):
        span = slice(group * size, (group + 1) * size)
        block, code = hessian[span, span], codes[:, span]
        slope = errors @ hessian[:, span]
        scale_step, offset_step = _solve(code, block, slope)
        scale = _snap(scales[:, group] + scale_step, dtype)
        offset = _snap(offsets[:, group] + offset_step, dtype)
        fitted = weight[:, span] - offset[:, None] - scale[:, None] * code
        change = fitted - errors[:, span]
        is_better = ((2 * slope + change @ block) * change).sum(1) < 0
        is_better &= np.ptp(weight[:, span], axis=1) > 0
        scales[is_better, group], offsets[is_better, group] = scale[is_better], offset[is_better]
        errors[is_better, span] = fitted[is_better]
    return Grid(*(mx.array(part.astype(np.float32)) for part in (scales, offsets)))


def _solve(codes: Matrix, block: Matrix, slope: Matrix) -> tuple[Matrix, Matrix]:
    """Steps (N,) of scale and offset that least squares asks for; none where the two cannot be told apart."""
    weighted = codes @ block
    scale_square, both = (weighted * codes).sum(1), weighted.sum(1)
    offset_square = block.sum()
    determinant = scale_square * offset_square - both * both
    is_sound = determinant > 1e-9 * scale_square * offset_square
    determinant = np.where(is_sound, determinant, 1)
    by_scale, by_offset = (slope * codes).sum(1), slope.sum(1)
    scale_step = (offset_square * by_scale - both * by_offset) / determinant
    offset_step = (scale_square * by_offset - both * by_scale) / determinant
    return np.where(is_sound, scale_step, 0), np.where(is_sound, offset_step, 0)


def grid_values(grid: Grid, codes: Matrix) -> Matrix:
    """The values (N, E) that codes (N, E) stand for, in float64."""
    scales, offsets = (np.array(part, np.float64) for part in (grid.scales, grid.offsets))
    groups = codes.reshape(*scales.shape, -1)
    values: Matrix = offsets[..., None] + scales[..., None] * groups
    return values.reshape(codes.shape)


def _snap(numbers: Matrix, dtype: mx.Dtype) -> Matrix:
    return np.array(snap_scales(mx.array(numbers.astype(np.float32)), dtype), np.float64)
