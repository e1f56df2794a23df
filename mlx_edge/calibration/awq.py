"""AWQ: channels that are fed large numbers get finer weights, by scales that the layer before takes back.

Lin et al. 2024 (arXiv 2306.00978). Before rounding, a weight's input channels are multiplied by s = size^alpha, size
the mean |x| of the channel; 1 / s goes into what makes the input (`scaling.py`). Alpha is searched for the least output
error; then the range of each group is narrowed where that lowers its output error (queries and keys excepted).
Different from the paper's code:

- Errors are computed from X^T X (`hessian.py`): exact for all tokens, where the code keeps a sample of them. That of
  queries, keys and values is the sum of theirs, each by its own mean square, not that of the attention after them.
- No scale is taken unless it lowers the error; alpha 0 is plain rounding.
- Scales and offsets of groups are fitted to the codes in the end, by least squares. A model whose channels are all fed
  about the same gains little from s; this helps it, too.
- Values that several query heads share get one scale, from the largest of their sizes; the code leaves them out.
- The head is quantized as well, fitted but neither scaled nor clipped.
- Inputs are those that the quantized layers before give.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import mlx.core as mx
import numpy as np

from mlx_edge import ops
from mlx_edge.calibration.grid_fitting import fit_grid, narrow_grid, refuse_other_modes
from mlx_edge.calibration.head import quantize_head
from mlx_edge.calibration.hessian import InputSums, Matrix, damp, output_error, sum_inputs
from mlx_edge.calibration.layerwise import LayerwiseModel
from mlx_edge.calibration.scaling import (
    Fold,
    ScaledLayer,
    find_folds,
    gather_channels,
    spread_channels,
)
from mlx_edge.models.config import ModelConfig
from mlx_edge.quant import Packing, dequantize, make_grid, pack, quantize, quantize_onto, unpack

NUM_ALPHAS = 20
DAMPING = 0.01  # so that channels which the text never fed keep their values


def quantize_awq(
    model: LayerwiseModel,
    rows: mx.array,
    packings: Mapping[str, Packing | None],
    dtype: mx.Dtype,
    *,
    num_alphas: int = NUM_ALPHAS,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[dict[str, mx.array]]:
    """The stored tensors of each layer, norms and biases that changed among them, then those of the head.

    `rows` (R, L) int32 calibrate; scales, offsets and floats are in `dtype`. Alpha is one of `num_alphas`
    steps from 0 to below 1.
    A layer whose packing is None stays float; its weight is among the tensors where its channels were scaled.
    Raises: InvalidRequestError for a packing that is not affine, and for a text that leads to NaN or infinity.
    """
    refuse_other_modes("awq", packings)
    hidden = model.embed(rows)
    for index in range(model.num_layers):
        layer = model.read_layer(index)
        sums, _ = sum_inputs(model, layer, index, hidden)
        scaled = ScaledLayer(model, layer, index, dtype)
        hessians = scale_layer(scaled, model.config, index, sums, packings, dtype, num_alphas)
        stored = scaled.store(packings, _quantizer(model.config, dtype, hessians))
        hidden = model.run_layer(scaled.layer, index, hidden)
        yield stored
        if on_progress is not None:
            on_progress(index + 1, model.num_layers)

    def choose(weight: mx.array, packing: Packing, hessian: Matrix) -> ops.Quantized:
        return quantize_fitted(weight, packing, dtype, hessian, is_clipped=False)

    yield quantize_head(model, hidden, packings, choose, DAMPING)


def _quantizer(
    config: ModelConfig, dtype: mx.Dtype, hessians: Mapping[str, Matrix]
) -> Callable[[str, mx.array, Packing], ops.Quantized]:
    """Quantizes a linear by name; queries and keys keep their whole range, as what they make meets in a softmax."""
    unclipped = (config.family.query, config.family.key)

    def choose(name: str, weight: mx.array, packing: Packing) -> ops.Quantized:
        hessian = hessians[name]
        is_clipped = not name.endswith(unclipped)
        return quantize_fitted(weight, packing, dtype, hessian, is_clipped=is_clipped)

    return choose


def quantize_fitted(
    weight: mx.array, packing: Packing, dtype: mx.Dtype, hessian: Matrix, *, is_clipped: bool
) -> ops.Quantized:
    """The nearest codes of a weight (N, E), and grids fitted to them for X^T X (E, E) of the inputs."""
    plain = make_grid(weight, packing, dtype)
    grid = narrow_grid(weight, packing, dtype, hessian) if is_clipped else plain
    codes, _ = unpack(quantize_onto(weight, grid, packing, dtype))
    exact, wide = np.array(weight, np.float64), np.array(codes, np.float64)
    return pack(codes, fit_grid(exact, wide, grid, dtype, hessian), packing, dtype)


def scale_layer(
    scaled: ScaledLayer,
    config: ModelConfig,
    index: int,
    sums: Mapping[str, InputSums],
    packings: Mapping[str, Packing | None],
    dtype: mx.Dtype,
    num_alphas: int,
) -> dict[str, Matrix]:
    """Folds the best scales into the layer; returns X^T X of the inputs that its linears then have, by name."""
    hessians: dict[str, Matrix] = {}
    for fold in find_folds(config, index):
        inputs = sums[fold.targets[0]]
        linears = scaled.linears()
        weights = [(linears[n].weight, p) for n in fold.targets if (p := packings[n]) is not None]
        scales = None
        if fold.source is not None:
            scales = search_scales(config, fold, inputs, weights, dtype, num_alphas)
        hessian = damp(inputs.hessian, DAMPING)
        if scales is not None:
            inverse = 1 / np.array(scaled.fold(fold, scales), np.float64)
            hessian = hessian * np.outer(inverse, inverse)
        hessians |= dict.fromkeys(fold.targets, hessian)
    return hessians


def search_scales(
    config: ModelConfig,
    fold: Fold,
    inputs: InputSums,
    weights: Sequence[tuple[mx.array, Packing]],
    dtype: mx.Dtype,
    num_alphas: int = NUM_ALPHAS,
) -> mx.array | None:
    """The scales (S,) of a fold with the least output error of its weights (N, E), or None where none lowers it."""
    sizes = mx.array((inputs.sizes / max(1, inputs.num_tokens)).astype(np.float32))
    sizes = gather_channels(config, fold, sizes)
    if not weights or not bool((sizes > 0).any()):
        return None
    hessian = inputs.mean_hessian()
    plain = [output_error(weight, hessian) for weight, _ in weights]  # mean square of the outputs

    def error(scales: mx.array) -> float:
        spread = spread_channels(config, fold, scales)
        rounded = (dequantize(quantize(w * spread, p, dtype)) / spread for w, p in weights)
        lost = (output_error(r - w, hessian) for r, (w, _) in zip(rounded, weights, strict=True))
        return sum(e / square for e, square in zip(lost, plain, strict=True) if square > 0)

    best, least = None, error(mx.ones_like(sizes))
    for step in range(1, num_alphas):
        scales = _scales_of(sizes, step / num_alphas)
        if (found := error(scales)) < least:
            best, least = scales, found
    return best


def _scales_of(sizes: mx.array, alpha: float) -> mx.array:
    """size^alpha, the smallest and largest as far below 1 as above; 1 for a channel that was fed nothing."""
    is_fed = sizes > 0
    scales = mx.maximum(mx.where(is_fed, sizes, 1.0) ** alpha, 1e-4)
    largest = mx.where(is_fed, scales, 0.0).max()
    smallest = mx.where(is_fed, scales, mx.inf).min()
    return mx.where(is_fed, scales / mx.sqrt(largest * smallest), 1.0)
