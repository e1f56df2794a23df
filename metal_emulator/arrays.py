"""MLX arrays as numpy sees them, and back. bfloat16 travels as uint16, because numpy has none."""

from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def to_numpy(array: mx.array) -> Array:
    """A view of an evaluated array's memory, with its strides; bfloat16 as uint16."""
    shown = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return np.array(shown, copy=False)


def to_mlx(array: Array, dtype: mx.Dtype) -> mx.array:
    """A copy as an MLX array; `dtype` tells bfloat16 from uint16."""
    made = mx.array(array)
    return made.view(mx.bfloat16) if dtype == mx.bfloat16 else made


@cache
def numpy_dtype(dtype: mx.Dtype) -> np.dtype[Any]:
    """numpy's dtype of the same memory."""
    return to_numpy(mx.zeros((1,), dtype)).dtype
