"""What goes into a linear, measured: how large its numbers are, and how much each of its columns matters.

Numbers come in pieces and are not kept. Knows no model.
"""

from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_edge.errors import InvalidRequestError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_CODE = 127  # int8, the same on both sides of zero
BIN_SHIFT = 19  # of a float32's bits: 16 bins to each power of two
NUM_BINS = 1 << (31 - BIN_SHIFT)
MIN_LIMIT = 1e-25  # numbers that are all below it count as zero
MIN_SHARE = 1e-4  # of the largest number: smaller limits are not tried
SAMPLED = 1 << 20  # numbers that are counted of each piece


class InputStatistics:
    """A histogram of magnitudes, and the mean square of each column."""

    def __init__(self, name: str) -> None:
        """`name` is that of the linear, for messages."""
        import numpy as np  # slow to import, and a start measures nothing

        self.name = name
        self._weights: NDArray[np.float64] = np.zeros(NUM_BINS)  # of the numbers in each bin
        self._squares: mx.array | None = None
        self._num_rows = 0

    def add(self, x: mx.array) -> None:
        """Take in rows x (..., E).

        Raises: InvalidRequestError for NaN or infinity.
        """
        rows = x.astype(mx.float32).reshape(-1, x.shape[-1])
        squares = rows.square()
        total = squares.sum(0)
        self._squares = total if self._squares is None else self._squares + total
        self._num_rows += rows.shape[0]
        if not mx.isfinite(self._squares).all().item():
            raise InvalidRequestError(
                f"the calibration text makes NaN or infinity go into {self.name}; the model is broken"
            )
        self._count(rows, mx.sqrt(squares.mean(-1)))

    def _count(self, rows: mx.array, sizes: mx.array) -> None:
        import numpy as np

        numbers = np.array(rows).reshape(-1)
        step = -(-numbers.size // SAMPLED)
        chosen = np.arange(0, numbers.size, step)
        weights = step / np.maximum(np.array(sizes, np.float64), MIN_LIMIT)[chosen // rows.shape[1]]
        bits = numbers[chosen].view(np.uint32) & np.uint32(0x7FFFFFFF)
        self._weights += np.bincount(bits >> BIN_SHIFT, weights=weights, minlength=NUM_BINS)

    @property
    def has_rows(self) -> bool:
        """Whether anything was taken in."""
        return self._num_rows > 0

    @property
    def column_weights(self) -> mx.array:
        """(E,) float32: the mean square of what each column of the weight is multiplied with."""
        assert self._squares is not None
        return self._squares / self._num_rows

    def best_scale(self) -> float:
        """The step of int8 codes -127 ... 127 with the smallest squared error over all that was seen.

        A smaller step is finer and clips more; every edge of a bin is tried as the largest value (Nagel et al. 2021, "A
        White Paper on Neural Network Quantization", 3.1). What lies between two codes counts as evenly spread. An error
        counts in proportion to the size (root mean square) of its row: the first token of a text has numbers hundreds
        of times as large as all others (Sun et al. 2024, "Massive Activations"), and plain squares would be its alone.
        """
        import numpy as np

        used = np.flatnonzero(self._weights)
        if not used.size or _bin_edges(used[-1:] + 1)[0] < MIN_LIMIT:
            return 1.0  # it was always zero: any step does
        middle = (_bin_edges(used) + _bin_edges(used + 1)) / 2
        limits = _bin_edges(np.arange(used[-1] + 1) + 1)
        limits = limits[limits > max(MIN_LIMIT, limits[-1] * MIN_SHARE)]
        errors = [(self._weights[used] * _squared_errors(middle, limit)).sum() for limit in limits]
        return float(limits[int(np.argmin(errors))] / MAX_CODE)


def _bin_edges(bins: "NDArray[np.int64]") -> "NDArray[np.float64]":
    """The smallest magnitude in each bin."""
    import numpy as np

    return (bins << BIN_SHIFT).astype(np.uint32).view(np.float32).astype(np.float64)


def _squared_errors(magnitude: "NDArray[np.float64]", limit: float) -> "NDArray[np.float64]":
    """What rounding to 127 codes up to a limit costs numbers of each magnitude."""
    import numpy as np

    step = limit / MAX_CODE
    inside = np.where(magnitude < step / 2, magnitude**2, step**2 / 12)
    return np.where(magnitude > limit, (magnitude - limit) ** 2, inside)
