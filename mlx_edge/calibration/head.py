"""The head's weight, quantized for what the final norm gives it: the head itself, or the token table that is also one.

Knows where it is and what it is given, not how it is quantized.
"""

from collections.abc import Callable, Mapping

import mlx.core as mx

from mlx_edge import ops
from mlx_edge.calibration.hessian import Matrix, damp, sum_head_inputs
from mlx_edge.calibration.layerwise import LayerwiseModel
from mlx_edge.quant import Packing, stored_tensors

Quantize = Callable[[mx.array, Packing, Matrix], ops.Quantized]  # weight (V, E), damped X^T X


def quantize_head(
    model: LayerwiseModel,
    hidden: mx.array,
    packings: Mapping[str, Packing | None],
    quantize: Quantize,
    damping: float,
) -> dict[str, mx.array]:
    """The stored tensors of the head for the last layer's hidden states (R, L, E); none where it stays float.

    A table that is embedding and head at once is damped by the whole mean of X^T X's diagonal: as rows that are looked
    up, every channel of it counts the same.
    """
    family = model.config.family
    name = family.embedding if model.is_tied else family.head
    packing = packings[name]
    if packing is None:
        return {}
    sums = sum_head_inputs(model, hidden)
    weight = model.read_head().projection
    assert isinstance(weight, ops.Dense)
    hessian = damp(sums.hessian, 1.0 if model.is_tied else damping)
    return stored_tensors(name, quantize(weight.weight, packing, hessian))
