"""MLX's products with packed weights: which kernels `mx.quantized_matmul` launches on a chip, and with which grids.

y (M, N) = x (M, K) @ dequantized(w (N, K)).T for one batch, as in MLX's backend/metal/quantized.cpp. Knows no other
layout; a model's shapes are the caller's.
"""

from dataclasses import dataclass

import mlx.core as mx

from metal_emulator.arrays import Array
from metal_emulator.counts import LINE_BYTES, BufferCounts, Counts, Traffic
from metal_emulator.device import Launch
from metal_emulator.mlx_source import TYPES, Chip, How, MLXKernel, Result, ceil_div, int32, launch

_AFFINE = ("utils.h", "steel/gemm/gemm.h", "quantized_utils.h", "quantized.h")
_FP = ("utils.h", "steel/gemm/gemm.h", "quantized_utils.h", "fp_quantized.h")
_TILE = 32  # rows and columns of a threadgroup's tile in qmm_t
_SPLIT_GROUPS = 512  # threadgroups that a split product aims at
# M at which qmm takes over: for K and N up to 2048, up to 4096, beyond; by generation from, and whether it is an Ultra
_LIMITS = {
    (17, False): (33, 25, 13),
    (15, False): (13, 15, 13),
    (13, False): (14, 10, 6),
    (13, True): (32, 18, 12),
    (0, False): (18, 12, 10),
    (0, True): (32, 18, 12),
}


@dataclass(frozen=True)
class Weights:
    """Packed weights: w (N, K * bits / 32) uint32, scales (N, K / group), biases alike, or None for mxfp4."""

    w: mx.array
    scales: mx.array
    biases: mx.array | None
    group_size: int
    bits: int

    @property
    def rows(self) -> int:
        """N."""
        return int(self.w.shape[0])

    @property
    def columns(self) -> int:
        """K."""
        return int(self.w.shape[1]) * 32 // self.bits

    @property
    def prefix(self) -> str:
        """Of kernel names."""
        return "affine" if self.biases is not None else "fp"

    def kernel(self, name: str, x: mx.array, *more: bool | int) -> MLXKernel:
        """The instance of a kernel for these weights."""
        arguments = [TYPES[x.dtype], self.group_size, self.bits, *(str(m).lower() for m in more)]
        headers = _AFFINE if self.biases is not None else _FP
        # The library holds more kernels, with constants that this one does not use.
        return MLXKernel(headers, f"{self.prefix}_{name}", ", ".join(str(a) for a in arguments))

    def buffers(self, x: mx.array) -> dict[str, mx.array | Array]:
        """Inputs by the names that all these kernels use."""
        biases = {"biases": self.biases} if self.biases is not None else {}
        return {"w": self.w, "scales": self.scales, **biases, "x": x}


def quantized_matmul(how: How, x: mx.array, weights: Weights, chip: Chip | None = None) -> Result:
    """y (M, N) for x (M, K), through the kernels that MLX launches on this chip."""
    chip = chip or Chip()
    rows, columns = int(x.shape[0]), weights.columns
    if rows >= vector_limit(columns, weights.rows, chip):
        return qmm_splitk(how, x, weights)
    if columns in {64, 128} and weights.bits in {2, 4, 8}:
        return qmv_quad(how, x, weights)
    if rows >= 2 and (weights.biases is None or chip.generation >= 15):
        return qmv_wide(how, x, weights)
    return qmv(how, x, weights)


def vector_limit(columns: int, rows: int, chip: Chip) -> int:
    """From how many rows of x MLX takes its matrix kernel."""
    ultra = chip.size == "d"
    generations = [g for g, is_ultra in _LIMITS if is_ultra == ultra and g <= chip.generation]
    small, middle, large = _LIMITS[max(generations), ultra]
    return next(
        (n for size, n in ((2048, small), (4096, middle)) if max(columns, rows) <= size), large
    )


def qmv(how: How, x: mx.array, weights: Weights) -> Result:
    """A simdgroup makes 4 results of one row of x; each row reads all weights."""
    rows, columns = int(x.shape[0]), weights.columns
    values_per_word = {3: 8, 5: 8, 6: 4}.get(weights.bits, 32 // weights.bits)
    is_fast = (
        weights.rows % 8 == 0
        and columns % (values_per_word * (1 if weights.bits == 2 else 2) * 32) == 0
    )
    kernel = weights.kernel("qmv_fast" if is_fast else "qmv", x, False)
    inputs = weights.buffers(x) | {
        "in_vec_size": int32(columns),
        "out_vec_size": int32(weights.rows),
    }
    # With a ragged N the last rows are written twice, with the same values.
    made, ran = launch(
        how,
        kernel,
        inputs,
        {"y": ((rows, weights.rows), x.dtype)},
        (rows, ceil_div(weights.rows, 8), 1),
        (32, 2, 1),
        same_value_ok=not is_fast,
    )
    return Result(made["y"], (ran,))


def qmv_quad(how: How, x: mx.array, weights: Weights) -> Result:
    """For K of 64 or 128: 4 lanes make a result."""
    rows = int(x.shape[0])
    kernel = weights.kernel("qmv_quad", x, weights.columns, False)
    inputs = weights.buffers(x) | {
        "in_vec_size": int32(weights.columns),
        "out_vec_size": int32(weights.rows),
    }
    outputs = {"y": ((rows, weights.rows), x.dtype)}
    made, ran = launch(
        how, kernel, inputs, outputs, (rows, ceil_div(weights.rows, 64), 1), (32, 1, 1)
    )
    return Result(made["y"], (ran,))


def qmv_wide(how: How, x: mx.array, weights: Weights) -> Result:
    """Up to 5 rows of x for one reading of the weights."""
    rows = int(x.shape[0])
    per_group = ceil_div(rows, ceil_div(rows, 5))
    lanes = 8 if weights.biases is not None else 16
    kernel = weights.kernel("qmv_wide", x, per_group, lanes, False)
    inputs = weights.buffers(x) | {
        "in_vec_size": int32(weights.columns),
        "out_vec_size": int32(weights.rows),
        "M": int32(rows),
    }
    groups = (ceil_div(rows, per_group), ceil_div(weights.rows, 32 // lanes * 2), 1)
    made, ran = launch(
        how, kernel, inputs, {"y": ((rows, weights.rows), x.dtype)}, groups, (32, 2, 1)
    )
    return Result(made["y"], (ran,))


def qmm_t(how: How, x: mx.array, weights: Weights) -> Result:
    """Tiles of 32x32 on simdgroup matrices."""
    rows = int(x.shape[0])
    kernel = weights.kernel("qmm_t", x, weights.rows % _TILE == 0, False)
    made, ran = launch(
        how,
        kernel,
        weights.buffers(x) | _sizes(x, weights),
        {"y": ((rows, weights.rows), x.dtype)},
        (ceil_div(weights.rows, _TILE), ceil_div(rows, _TILE), 1),
        (32, 2, 2),
    )
    return Result(made["y"], (ran,))


def qmm_splitk(how: How, x: mx.array, weights: Weights) -> Result:
    """`qmm_t` over parts of K, and a sum of the parts; MLX's choice of parts, one part being `qmm_t`."""
    rows, columns = int(x.shape[0]), weights.columns
    tiles = (ceil_div(weights.rows, _TILE), ceil_div(rows, _TILE))
    align = max(weights.group_size, 32)
    parts = min(max(1, _SPLIT_GROUPS // (tiles[0] * tiles[1])), columns // align)
    while parts > 1 and columns % (parts * align):
        parts -= 1
    if parts <= 1:
        return qmm_t(how, x, weights)
    kernel = weights.kernel("qmm_t_splitk", x, weights.rows % _TILE == 0)
    sizes = {
        "k_partition_size": int32(columns // parts),
        "split_k_partition_stride": int32(rows * weights.rows),
    }
    made, ran = launch(
        how,
        kernel,
        weights.buffers(x) | _sizes(x, weights) | sizes,
        {"y": ((parts, rows, weights.rows), mx.float32)},
        (*tiles, parts),
        (32, 2, 2),
    )
    y = made["y"].sum(axis=0).astype(x.dtype)
    return Result(y, (ran, sum_launch(how, made["y"], y)))


def _sizes(x: mx.array, weights: Weights) -> dict[str, mx.array | Array]:
    return {"K": int32(weights.columns), "N": int32(weights.rows), "M": int32(int(x.shape[0]))}


def sum_launch(how: How, parts: mx.array, y: mx.array) -> Launch:
    """The launch that sums the parts. It is not emulated: its counts are each byte read once, each written once."""
    counts = None
    if how.mode == "count":
        moved = [ceil_div(a.nbytes, LINE_BYTES) for a in (parts, y)]
        reads, writes = (
            Traffic(bytes_asked=a.nbytes, unique_lines=n, group_lines=n)
            for a, n in zip((parts, y), moved, strict=True)
        )
        buffers = {
            "in": BufferCounts("in", parts.nbytes, reads, Traffic()),
            "out": BufferCounts("out", y.nbytes, Traffic(), writes),
        }
        counts = Counts.of_traffic(int(y.size), buffers)
    return Launch("col_reduce_sum", (int(y.size), 1, 1), (1, 1, 1), counts)
