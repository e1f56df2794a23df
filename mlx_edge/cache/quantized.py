"""Quantized rows: layout, rounding and the float64 meaning of a quantized KV cache, defined once.

Each row of a key or value head is cut into groups along the head; a group is packed as MLX packs an affine
weight: uint32 words, a scale and an offset in the dtype of the rows, value = scale * code + offset. Rounding
is MLX's `mx.quantize`. The layout is that of mlx-lm's quantized caches.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_edge.cache.rows import Planes, keys_of, values_of
from mlx_edge.errors import InvalidRequestError
from mlx_edge.ops import PackedRows

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BITS = (4, 8)
GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class QuantizedRows:
    """Rows of `bits` bits in groups of `group_size`."""

    bits: int = 8
    group_size: int = 64

    def __post_init__(self) -> None:
        if self.bits not in BITS or self.group_size not in GROUP_SIZES:
            raise InvalidRequestError(
                f"a KV cache of {self.bits} bits in groups of {self.group_size}; expected bits of "
                f"{' or '.join(map(str, BITS))} and groups of {', '.join(map(str, GROUP_SIZES))}"
            )

    def check(self, head_dim: int) -> None:
        """Raises InvalidRequestError when a head does not divide into groups."""
        if head_dim % self.group_size:
            raise InvalidRequestError(
                f"heads of {head_dim} do not divide into groups of {self.group_size}; "
                "choose a smaller --kv-group-size"
            )

    def encode(self, rows: mx.array) -> Planes:
        """Packs, scales and offsets of rows (2, B, K, L, D).

        Raises: InvalidRequestError when the head does not divide into groups.
        """
        self.check(rows.shape[-1])
        packs, scales, offsets = mx.quantize(rows, group_size=self.group_size, bits=self.bits)
        return packs, scales, offsets

    def split(self, planes: Planes) -> tuple[PackedRows, PackedRows]:
        """Keys and values, still packed."""
        packs, scales, offsets = planes
        keys, values = (
            PackedRows(half(packs), half(scales), half(offsets), self.group_size, self.bits)
            for half in (keys_of, values_of)
        )
        return keys, values


def dequantize_float64(rows: PackedRows) -> "NDArray[np.float64]":
    """The rows (B, K, S, D) that are meant, unpacked by hand: the oracle of attention over packed rows."""
    import numpy as np  # the oracle's alone: slow to import

    packs = np.ascontiguousarray(np.array(rows.packs)).astype("<u4")
    bits = np.unpackbits(packs.view(np.uint8), axis=-1, bitorder="little")
    digits = bits.reshape(*packs.shape[:-1], -1, rows.bits)
    codes = (digits * (1 << np.arange(rows.bits))).sum(-1).astype(np.float64)
    groups = codes.reshape(*packs.shape[:-1], -1, rows.group_size)
    scales, offsets = (
        np.array(a.astype(mx.float32)).astype(np.float64)[..., None]
        for a in (rows.scales, rows.offsets)
    )
    values: NDArray[np.float64] = (groups * scales + offsets).reshape(*packs.shape[:-1], -1)
    return values
