"""Groups of floats of 4 or 8 bits under one scale: mxfp4, mxfp8 (OCP Microscaling Formats 1.0) and nvfp4.

A value is scale * element. Elements are E2M1 (4 bits, up to 6) or E4M3 (8 bits, up to 448); scales are powers of two
(E8M0) or, in nvfp4, E4M3. Two scales are tried for each group and the one with the smaller squared error is taken: the
powers of two below and above the one that puts the largest value on the largest element; for nvfp4 those that put it
on 6 and on 4 ("Four Over Six", Cook et al. 2025). MLX's own `quantize` tries one, and near the ends of a scale's range
wraps round or loses the whole group. Knows no model and no file.
"""

from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_edge.quant.formats import Packing
from mlx_edge.quant.packs import pack_codes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Codes = NDArray[np.uint8]

TOP = {4: 6.0, 8: 448.0}  # the largest element, by bits
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by code; the sign is bit 3
E2M1_BETWEEN = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # in the middle of two neighbours
MIN_E4M3, MAX_E4M3 = 2.0**-9, 448.0
EXPONENT_BIAS = 127


def quantize_floats(weight: mx.array, packing: Packing) -> tuple[mx.array, mx.array]:
    """Words (N, E * bits / 32) uint32 and scales (N, E / group_size) uint8 of a float weight (N, E)."""
    import numpy as np  # slow to import; on a CPU its loops are several times as fast as MLX's

    rows, columns = weight.shape
    shape = (rows, columns // packing.group_size, packing.group_size)
    groups = np.array(weight.astype(mx.float32)).reshape(shape)
    largest = np.abs(groups).max(-1, initial=0)
    scales, other_scales = (
        _e4m3_scales(largest) if packing.mode == "nvfp4" else _e8m0_scales(largest, packing.bits)
    )
    codes, error = _nearest(groups, scales[1], packing.bits)
    other, other_error = _nearest(groups, other_scales[1], packing.bits)
    is_better = other_error < error
    codes[is_better] = other[is_better]
    scale_codes = np.where(is_better, other_scales[0], scales[0])
    words = pack_codes(mx.array(codes.reshape(rows, columns)), packing.bits)
    return words, mx.array(scale_codes)


def _nearest(groups: "Floats", scales: "Floats", bits: int) -> "tuple[Codes, NDArray[np.float64]]":
    """The nearest codes (N, E / G, G), and the squared error of each group."""
    import numpy as np

    scaled = np.clip(groups / scales[..., None], -TOP[bits], TOP[bits])
    codes, values = _nearest_e2m1(scaled) if bits == 4 else _nearest_e4m3(scaled)
    with np.errstate(over="ignore"):  # far beyond what nvfp4 reaches: as bad on both scales
        errors = groups / scales[..., None] - values
        squares = np.einsum("ngk,ngk->ng", errors, errors)
    return codes, squares * scales.astype(np.float64) ** 2  # small ones are zero in float32


def _nearest_e2m1(x: "Floats") -> "tuple[Codes, Floats]":
    import numpy as np

    size = np.abs(x)
    codes = np.zeros(x.shape, np.uint8)
    for edge in E2M1_BETWEEN:
        codes += size > edge
    codes += 8 * ((x < 0) & (codes > 0)).astype(np.uint8)
    values = np.array([*E2M1_VALUES, *(-value for value in E2M1_VALUES)], np.float32)
    return codes, values[codes]


def _nearest_e4m3(x: "Floats") -> "tuple[Codes, Floats]":
    import numpy as np

    codes = mx.to_fp8(mx.array(x))
    return np.array(codes), np.array(mx.from_fp8(codes, mx.float32))


def _e8m0_scales(largest: "Floats", bits: int) -> "list[tuple[Codes, Floats]]":
    """Codes and values of the powers of two above and below the one that would be exact."""
    import numpy as np

    exponent = np.log2(np.maximum(largest, np.finfo(np.float32).tiny) / TOP[bits])
    tries = []
    for near in (np.ceil(exponent), np.floor(exponent)):
        power = np.where(largest > 0, np.clip(near, -126, 127), 0).astype(np.int32)
        values = np.ldexp(np.float32(1), power)
        tries.append(((power + EXPONENT_BIAS).astype(np.uint8), values))
    return tries


def _e4m3_scales(largest: "Floats") -> "list[tuple[Codes, Floats]]":
    """Codes and values of the scales with the largest value on 6 and on 4."""
    import numpy as np

    return [
        _nearest_e4m3(np.clip(largest / np.float32(element), MIN_E4M3, MAX_E4M3))
        for element in (6, 4)
    ]
