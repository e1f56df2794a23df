"""Blocks of GGUF into MLX's packed layout without another rounding: Q4_0 and Q8_0 are affine grids of 32 values.

A block has a scale d (half) and 32 codes: Q4_0 means d * (code - 8), Q8_0 d * code with a signed code. As an affine
group that is the offset -8 d or -128 d, and the codes from 0. All of it is exact while the offset is a number of the
stored dtype: in half for d up to 8188 (Q4_0) or 511 (Q8_0), in float32 always, in bfloat16 only for a d of 8 bits.
Blocks: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h. Knows no file and no model.
"""

from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_edge.ops.types import Quantized
from mlx_edge.quant import Packing, pack_codes

if TYPE_CHECKING:
    from numpy.typing import NDArray

PACKINGS = {"Q4_0": Packing(32, 4), "Q8_0": Packing(32, 8)}
_SCALE_BYTES = 2
_CHUNK_VALUES = 1 << 22  # packed at a time


def repack(type_name: str, rows: "NDArray[Any]", dtype: mx.Dtype) -> Quantized | None:
    """Stored rows (N, bytes of a row) uint8 of a type in PACKINGS, with scales and offsets in `dtype`.

    Its values are those of `gguf.quants.dequantize` to the last bit, but for the sign of zero. None when `dtype` cannot
    hold every scale and offset: then the floats have to be rounded anew.
    """
    import numpy as np

    packing = PACKINGS[type_name]
    blocks = rows.reshape(rows.shape[0], -1, _SCALE_BYTES + 32 * packing.bits // 8)
    scales = np.ascontiguousarray(blocks[:, :, :_SCALE_BYTES]).view("<f2")[:, :, 0]
    scales = scales.astype(np.float32)
    stored = _store(scales, dtype)
    offsets = _store(scales * -(packing.num_codes // 2), dtype)
    if stored is None or offsets is None:
        return None
    step = max(1, _CHUNK_VALUES // (32 * blocks.shape[1]))
    words = [
        pack_codes(
            _read_codes(blocks[row : row + step, :, _SCALE_BYTES:], packing.bits), packing.bits
        )
        for row in range(0, rows.shape[0], step)
    ]
    return Quantized(mx.concatenate(words), stored, offsets, packing.group_size, packing.bits)


def _store(values: "NDArray[Any]", dtype: mx.Dtype) -> mx.array | None:
    """Float32 values in `dtype`, or None when one of them is not a number of it."""
    wanted = mx.array(values)
    stored = wanted.astype(dtype)
    is_exact = mx.isfinite(stored) & (stored.astype(mx.float32) == wanted)
    return stored if is_exact.all().item() else None


def _read_codes(data: "NDArray[Any]", bits: int) -> mx.array:
    """Codes from 0, (N, E) uint8."""
    import numpy as np

    if bits == 8:  # a signed byte + 128
        return mx.array((data ^ np.uint8(0x80)).reshape(data.shape[0], -1))
    # A byte holds value i in its low half and value i + 16 in its high one.
    codes = np.concatenate([data & np.uint8(15), data >> np.uint8(4)], axis=2)
    return mx.array(codes.reshape(codes.shape[0], -1))
