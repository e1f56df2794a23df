"""What goes into the linears of a layer, summed over a text: X^T X and the mean and largest size of each channel.

X^T X is half the Hessian of a linear's squared output error with regard to a row of its weight; for X of all tokens it
gives that error exactly, without the tokens. Knows nothing of how a weight is quantized.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_edge import ops
from mlx_edge.calibration.layerwise import LayerwiseModel
from mlx_edge.errors import InvalidRequestError
from mlx_edge.models.decoder import Layer

Matrix = NDArray[np.float64]


@dataclass
class InputSums:
    """Sums over the tokens x (E,) that a linear was given. Blocks are summed in float32, their sums in float64."""

    hessian: Matrix  # (E, E), of x x^T
    sizes: Matrix  # (E,), of |x|
    largest: Matrix  # (E,), the largest |x|
    num_tokens: int

    @staticmethod
    def empty(num_channels: int) -> "InputSums":
        """Of no token yet."""
        square = np.zeros((num_channels, num_channels))
        return InputSums(square, np.zeros(num_channels), np.zeros(num_channels), 0)

    def add(self, x: mx.array) -> None:
        """Count the tokens of x (..., E) in."""
        x = x.reshape(-1, x.shape[-1]).astype(mx.float32)
        sizes = mx.abs(x)
        self.hessian += np.array(x.T @ x)
        self.sizes += np.array(sizes.sum(0))
        self.largest = np.maximum(self.largest, np.array(sizes.max(0)))
        self.num_tokens += x.shape[0]

    def refuse_overflow(self, name: str) -> None:
        """Raises: InvalidRequestError when NaN or infinity was among what the linear `name` was given."""
        if not np.isfinite(self.hessian).all():
            raise InvalidRequestError(
                f"the inputs of {name} hold NaN or infinity, expected numbers; "
                "check the model's weights, or convert it with --method rtn"
            )

    def mean_hessian(self) -> mx.array:
        """X^T X (E, E) float32 of one token, on average."""
        return mx.array((self.hessian / max(1, self.num_tokens)).astype(np.float32))


def output_error(difference: mx.array, mean_hessian: mx.array) -> float:
    """The mean of |difference x|^2 over the tokens x of a mean X^T X (E, E), for the difference (N, E) of weights."""
    return float(((difference @ mean_hessian) * difference).sum())


def sum_inputs(
    model: LayerwiseModel, layer: Layer, index: int, hidden: mx.array
) -> tuple[dict[str, InputSums], mx.array]:
    """What each linear of the layer is given for hidden states (R, L, E), by name, and the hidden states after it.

    Linears that are given the same array share one record. Raises: InvalidRequestError for NaN or infinity in them.
    """
    sums: dict[str, InputSums] = {}
    seen: list[Any] = [None, None]  # the array before, and its record

    def watch(name: str, x: mx.array) -> None:
        if x is seen[0]:
            sums[name] = seen[1]
            return
        record = sums.setdefault(name, InputSums.empty(x.shape[-1]))
        record.add(x)
        seen[:] = x, record

    after = model.run_layer(layer, index, hidden, watch)
    for name, record in sums.items():
        record.refuse_overflow(name)
    return sums, after


def sum_head_inputs(model: LayerwiseModel, hidden: mx.array) -> InputSums:
    """What the head is given for the last layer's hidden states (R, L, E)."""
    norm = model.read_head().norm
    sums = InputSums.empty(hidden.shape[-1])
    for row in hidden:
        sums.add(ops.rms_norm(row, norm))
    sums.refuse_overflow(model.config.family.head)
    return sums


def damp(hessian: Matrix, damping: float) -> Matrix:
    """X^T X (E, E) with `damping` times its diagonal's mean on the diagonal; the identity where all is zero."""
    mean = float(np.diag(hessian).mean())
    return hessian + np.eye(len(hessian)) * (damping * mean if mean > 0 else 1.0)
