"""Weights that are not finite are refused by the name of their tensor, before they mislead anything."""

import mlx.core as mx

from mlx_edge.conversion.source import Source
from mlx_edge.errors import ModelFormatError

CHUNK = 1 << 21  # elements that are looked at at once

# Floats as words, and the bits of their exponents.
_EXPONENTS = {
    mx.float16: (mx.uint16, 0x7C00),
    mx.bfloat16: (mx.uint16, 0x7F80),
    mx.float32: (mx.uint32, 0x7F800000),
}


def check_finite(source: Source) -> None:
    """Raises ModelFormatError naming the first tensor with a NaN or an infinity: before a calibration is misled."""
    for name in source.names():
        if mx.issubdtype(source.dtype(name), mx.floating):
            require_finite(source, name, source.read(name))


def require_finite(source: Source, name: str, block: mx.array) -> None:
    """Raises ModelFormatError naming the tensor when a block of it holds a NaN or an infinity."""
    if _is_finite(block):
        return
    kind = "a NaN" if mx.isnan(block).any().item() else "an infinity"
    raise ModelFormatError(
        f"{source.name}: found {kind} in tensor {name} (as {str(block.dtype).removeprefix('mlx.core.')}); "
        "expected finite weights; get the model again, or give a --dtype with a wider range"
    )


def _is_finite(block: mx.array) -> bool:
    """By the bits: a float whose exponent is all ones is a NaN or an infinity. MLX's `isfinite` is slower."""
    import numpy as np  # slow to import

    if block.dtype not in _EXPONENTS or not block.size:
        return True
    words, exponent = _EXPONENTS[block.dtype]
    bits = np.asarray(mx.contiguous(block).view(words)).reshape(-1)
    mask = bits.dtype.type(exponent)
    starts = range(0, bits.size, CHUNK)
    return all(
        int(np.bitwise_and(bits[start : start + CHUNK], mask).max()) != exponent for start in starts
    )
