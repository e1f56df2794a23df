"""How a product's launch is cut: what a lane reads at a time, tiles of outputs, shares of K.

Pure arithmetic over sizes and formats, in the words of `metal_kernels/qmv.metal`. Knows no array and launches nothing.
"""

from dataclasses import dataclass
from math import gcd
from typing import Literal

import mlx.core as mx

from mlx_edge.ops.types import Activation

Product = Literal["norm", "res", "glu"]

FLOAT_BITS = 32  # of a float weight, whatever its dtype
LANES = 32
LINE_BYTES = 128
SIMDGROUPS = 8  # of a threadgroup, at most
BUSY_SIMDGROUPS = 1024  # a launch that has fewer splits K; twice as many where K is long
LONG_COLUMNS = 8192
LANE_RUN = {FLOAT_BITS: 8, 2: 16, 3: 32, 4: 16, 5: 32, 6: 16, 8: 8}  # values a lane reads at a time
MATRIX_RUN = {FLOAT_BITS: 16, 2: 64, 3: 32, 4: 64, 5: 32, 6: 32, 8: 32}  # four lanes read a line


@dataclass(frozen=True)
class Buffer:
    """What a kernel must know of an array."""

    dtype: mx.Dtype
    is_small: bool  # fewer than eight elements: MLX passes it as `constant`

    @staticmethod
    def of(array: mx.array) -> "Buffer":
        """The array's."""
        return Buffer(array.dtype, array.size < 8)


@dataclass(frozen=True)
class WeightFormat:
    """How a weight is stored; weights of one launch have the same."""

    bits: int
    group_size: int
    mode: str  # "affine", "mxfp4" or "floats"
    buffers: tuple[Buffer, ...]  # packs, scales, offsets

    def __str__(self) -> str:
        packs, *others = (str(buffer.dtype).removeprefix("mlx.core.") for buffer in self.buffers)
        if self.mode == "floats":
            return packs
        return f"{self.bits} bits group {self.group_size} {others[0]}" if others[1:] else self.mode


@dataclass(frozen=True)
class ProductCase:
    """All that decides a pipeline."""

    product: Product
    dtype: mx.Dtype
    rows: int  # of x, rounded up to a power of two
    is_on_matrices: bool
    weight: WeightFormat
    columns: int  # K
    sizes: tuple[int, ...]  # rows of each matrix
    norm: Buffer | None
    bias: Buffer | None
    activation: Activation

    @property
    def pair(self) -> int:
        """Matrices whose rows a threadgroup has side by side."""
        return 2 if self.product == "glu" else 1

    @property
    def outputs(self) -> tuple[int, ...]:
        """Columns of y that each matrix gives."""
        return self.sizes[:1] if self.product == "glu" else self.sizes


@dataclass(frozen=True)
class Tiling:
    """How a launch is cut, in the words of `qmv.metal`."""

    run: int
    span: int
    tile: int
    parts: int


def cut_matrices(case: ProductCase) -> Tiling:
    """Of the product on 8x8 matrices."""
    run = gcd(case.columns, MATRIX_RUN[case.weight.bits])  # groups are multiples of 32
    return Tiling(run, span=16, tile=32 // case.pair, parts=4)


def cut_lanes(case: ProductCase) -> Tiling:
    """Of the product by lanes. The cut along K depends on the weights alone, or a row would not keep its bits."""
    run = LANE_RUN[case.weight.bits]
    slots = SIMDGROUPS * 4  # a threadgroup's rows of weights, where a simdgroup has four
    fit = (t for t in (8, 16) if t * case.pair < slots and overread(case, t) <= 1.01)
    tile = next(fit, slots // case.pair)
    most = min(4, case.columns // (run * LANES), slots // (tile * case.pair))
    target = BUSY_SIMDGROUPS * (2 if case.columns >= LONG_COLUMNS else 1)
    parts = 1
    while 2 * parts <= most and sum(case.sizes) // 4 * parts < target:
        parts *= 2
    if case.rows <= 4:
        return Tiling(run, 4, tile, parts)
    return Tiling(run, 2, min(tile, slots // 2 // (case.pair * parts)), parts)


def overread(case: ProductCase, tile: int) -> float:
    """Lines that threadgroups read over those that hold the weights, when a tile has so many rows."""
    packs, *others = (buffer.dtype.size for buffer in case.weight.buffers)
    bits = 8 * packs if case.weight.bits == FLOAT_BITS else case.weight.bits
    groups = case.columns // case.weight.group_size if others else 0
    spans = [tile * width for width in (case.columns * bits // 8, *(groups * o for o in others))]
    lines = 0
    for span in spans:
        starts = range(0, LINE_BYTES * span, span)  # as many tiles as a line has bytes
        lines += sum(-(-(start + span) // LINE_BYTES) - start // LINE_BYTES for start in starts)
    return lines / sum(spans)
