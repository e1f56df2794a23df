"""GPTQ: codes of one column after the other, each making up for the errors of those before it.

Frantar et al. 2023 (arXiv 2210.17323). With X^T X = R R^T, R upper triangular, the squared output error of a row is
|(w - q) R|^2. Column k adds R_kk^2 (w_k + sum_{i<k} (w_i - q_i) R_ik / R_kk - q_k)^2 to it, and the code nearest to
what stands before q_k is chosen. That is the paper's elimination with the inverse, in other words (LDLQ; Chee et al.
2023, arXiv 2307.13304, prove them equal); it takes one Cholesky factor and no inverse. Different from the paper:

- The grids are those of round-to-nearest, chosen beforehand ("static groups" of the authors' code), so that columns can
  be taken in the order of falling diagonal while groups stay runs of columns, as MLX's layout has them.
- Scales and offsets are fitted to the codes in the end, by least squares.
- A channel that the text never fed keeps its nearest codes; the authors' code makes its weights zero.
- The head is quantized too, for what the final norm gives; a token table of its own is not.

All linears of a layer are quantized for what the quantized layers before it give, from one pass over the text.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import mlx.core as mx
import numpy as np

from mlx_edge import ops
from mlx_edge.calibration.grid_fitting import fit_grid, refuse_other_modes
from mlx_edge.calibration.head import quantize_head
from mlx_edge.calibration.hessian import Matrix, damp, sum_inputs
from mlx_edge.calibration.layerwise import LayerwiseModel, as_dense
from mlx_edge.models.linears import replace_linears
from mlx_edge.quant import Grid, Packing, make_grid, pack, stored_tensors

BLOCK = 128  # columns whose errors reach the columns after them in one product


def quantize_gptq(
    model: LayerwiseModel,
    rows: mx.array,
    packings: Mapping[str, Packing | None],
    dtype: mx.Dtype,
    *,
    damping: float = 0.01,
    act_order: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[dict[str, mx.array]]:
    """The stored tensors of each layer that `packings` has quantized, then those of a head of its own.

    `rows` (R, L) int32 calibrate; scales and offsets are in `dtype`. `damping` is the share of the mean of X^T X's
    diagonal that is added to it; `act_order` takes the columns by falling diagonal, else as they stand.
    Layers whose packing is None stay floats. In memory are a layer in float32, X^T X of its inputs in float64 and the
    hidden states of all rows. Raises: InvalidRequestError for a packing that is not affine, and for a text that leads
    to NaN or infinity.
    """
    refuse_other_modes("gptq", packings)
    hidden = model.embed(rows)
    for index in range(model.num_layers):
        layer = model.read_layer(index)
        linears = model.find_linears(layer, index)
        sums, _ = sum_inputs(model, layer, index, hidden)
        stored: dict[str, mx.array] = {}
        for name, linear in linears.items():
            packing = packings[name]
            if packing is None:
                continue
            weight = as_dense(linear)
            hessian = damp(sums[name].hessian, damping)
            chosen = quantize_weight(weight.weight, packing, dtype, hessian, act_order=act_order)
            stored |= stored_tensors(name, chosen)
            dense = as_dense(dataclasses.replace(chosen, bias=weight.bias))
            layer = replace_linears(layer, model.config, index, {name: dense})
        hidden = model.run_layer(layer, index, hidden)
        yield stored
        if on_progress is not None:
            on_progress(index + 1, model.num_layers)

    def choose(weight: mx.array, packing: Packing, hessian: Matrix) -> ops.Quantized:
        return quantize_weight(weight, packing, dtype, hessian, act_order=act_order)

    yield quantize_head(model, hidden, packings, choose, damping)


def quantize_weight(
    weight: mx.array,
    packing: Packing,
    dtype: mx.Dtype,
    hessian: Matrix,
    *,
    act_order: bool = True,
) -> ops.Quantized:
    """GPTQ of a weight (N, E) for a damped X^T X (E, E) of its inputs."""
    exact = np.array(weight, np.float64)
    grid = make_grid(weight, packing, dtype)
    codes = choose_codes(exact, grid, packing, hessian, act_order=act_order)
    grid = fit_grid(exact, codes, grid, dtype, hessian)
    return pack(mx.array(codes.astype(np.uint8)), grid, packing, dtype)


def choose_codes(
    weight: Matrix, grid: Grid, packing: Packing, hessian: Matrix, *, act_order: bool = True
) -> Matrix:
    """The codes (N, E) of a weight (N, E) on a grid, for a damped X^T X (E, E) of its inputs.

    `act_order` takes the columns in the order of its falling diagonal.
    """
    order = np.argsort(-np.diag(hessian), kind="stable") if act_order else np.arange(len(hessian))
    feedback = _factor(hessian[np.ix_(order, order)])
    scales, offsets = (np.array(part, np.float64).T for part in (grid.scales, grid.offsets))
    steps = np.where(scales == 0, 1, scales)
    columns = np.ascontiguousarray(weight.T[order])  # a column a row, so that one lies in one piece
    codes, errors = np.empty_like(columns), np.empty_like(columns)
    for start in range(0, len(order), BLOCK):
        end = min(start + BLOCK, len(order))
        block = columns[start:end] + feedback[:start, start:end].T @ errors[:start]
        for k in range(start, end):
            group = order[k] // packing.group_size
            target = block[k - start] + feedback[start:k, k] @ errors[start:k]
            nearest = np.rint((target - offsets[group]) / steps[group])
            codes[k] = np.clip(nearest, 0, packing.num_codes - 1)
            errors[k] = columns[k] - offsets[group] - scales[group] * codes[k]
    chosen = np.empty_like(codes)
    chosen[order] = codes
    return np.ascontiguousarray(chosen.T)


def _factor(hessian: Matrix) -> Matrix:
    """R / diag(R) for the upper triangular R with R R^T = X^T X: what part of an error a later column makes up for."""
    lower = np.linalg.cholesky(hessian[::-1, ::-1])
    upper = lower[::-1, ::-1]
    feedback: Matrix = np.ascontiguousarray(upper / np.diag(upper))
    return feedback
