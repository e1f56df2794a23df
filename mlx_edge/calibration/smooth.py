"""SmoothQuant: outliers of activations move into weights, so that both fit into 8 bits.

Xiao et al. 2023 (arXiv 2211.10438). A channel that linears take from a norm is divided by s = max|x|^alpha /
max|w|^(1 - alpha), its weights are multiplied by s; the norm takes the division (`scaling.py`). Weights are then
rounded to the nearest. As in the paper, inputs that no norm makes (o, down) stay as they are, and the text is run
through the float model. Different from it: scales make up for the rounding of the norms that they are folded into.
"""

from collections.abc import Callable, Iterator, Mapping

import mlx.core as mx
import numpy as np

from mlx_edge import ops
from mlx_edge.calibration.hessian import sum_inputs
from mlx_edge.calibration.layerwise import LayerwiseModel
from mlx_edge.calibration.scaling import ScaledLayer, find_folds
from mlx_edge.quant import Packing, quantize

SMALLEST = 1e-5  # of a range or a scale


def quantize_smooth(
    model: LayerwiseModel,
    rows: mx.array,
    packings: Mapping[str, Packing | None],
    dtype: mx.Dtype,
    *,
    alpha: float = 0.5,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[dict[str, mx.array]]:
    """The stored tensors of each layer, its two norms among them; table and head are not touched.

    `rows` (R, L) int32 calibrate; scales, offsets and floats are in `dtype`. With `alpha` 0 all of the difficulty stays
    with the activations, with 1 all of it goes to the weights. Serves every packing; a weight whose packing is None is
    among the tensors as floats, with its channels scaled.
    """
    hidden = model.embed(rows)
    for index in range(model.num_layers):
        layer = model.read_layer(index)
        sums, hidden = sum_inputs(model, layer, index, hidden)
        scaled = ScaledLayer(model, layer, index, dtype)
        for fold in find_folds(model.config, index):
            linears = scaled.linears()
            if fold.source is not None and fold.source not in linears:
                weights = [linears[name].weight for name in fold.targets]
                largest = mx.array(sums[fold.targets[0]].largest.astype(np.float32))
                scaled.fold(fold, smoothing_scales(largest, weights, alpha))

        def choose(_name: str, weight: mx.array, packing: Packing) -> ops.Quantized:
            return quantize(weight, packing, dtype)

        yield scaled.store(packings, choose)
        if on_progress is not None:
            on_progress(index + 1, model.num_layers)


def smoothing_scales(largest: mx.array, weights: list[mx.array], alpha: float) -> mx.array:
    """s (E,) for the largest |x| (E,) of channels and the weights (N, E) that take them; 1 for what is never fed."""
    heaviest = mx.stack([mx.abs(weight).max(0) for weight in weights]).max(0)
    scales = largest**alpha / mx.maximum(heaviest, SMALLEST) ** (1 - alpha)
    return mx.where(largest > 0, mx.maximum(scales, SMALLEST), 1.0)
