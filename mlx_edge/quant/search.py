"""Looks for the grid that costs a layer's output least: narrower ranges are tried, errors weighed by the inputs.

A weight's largest values may be worth clipping for finer steps for all others. The measure is the squared error of each
value times the mean square of the input that it meets, which is what it adds to the error of the output when inputs do
not go together; AWQ searches ranges so (Lin et al. 2023), with the outputs themselves. Knows no model.
"""

import mlx.core as mx

from mlx_edge.quant.formats import Packing
from mlx_edge.quant.groups import Granularity, Grid, in_groups, make_grid

SHRINKS = tuple(1 - i / 20 for i in range(10))  # of the range; 1 first, which wins a draw


def find_grid(
    weight: mx.array,
    packing: Packing,
    dtype: mx.Dtype,
    column_weights: mx.array,
    *,
    is_symmetric: bool = False,
    per: Granularity = "group",
) -> Grid:
    """The best of some grids for a weight (N, E) whose columns matter as `column_weights` (E,) say."""
    groups = in_groups(weight, packing)
    importance = column_weights.reshape(1, -1, packing.group_size)
    best: Grid | None = None
    best_error = mx.array(mx.inf)
    for shrink in SHRINKS:
        grid = make_grid(shrink * weight, packing, dtype, is_symmetric=is_symmetric, per=per)
        values = grid.values(grid.nearest(groups, packing.num_codes))
        error = _total((importance * (values - groups).square()).sum(-1), per)
        is_better = error < best_error
        best = grid if best is None else _mix(is_better, grid, best)
        best_error = mx.minimum(error, best_error)
        mx.eval(best.scales, best.offsets, best_error)
    assert best is not None
    return best


def _total(error: mx.array, per: Granularity) -> mx.array:
    """Errors (N, E / G) as they count for a scale: over the group, the row or the whole."""
    axes = {"group": (), "channel": (1,), "tensor": (0, 1)}[per]
    return error.sum(axes, keepdims=True) if axes else error


def _mix(is_first: mx.array, first: Grid, second: Grid) -> Grid:
    return Grid(
        mx.where(is_first, first.scales, second.scales),
        mx.where(is_first, first.offsets, second.offsets),
    )
