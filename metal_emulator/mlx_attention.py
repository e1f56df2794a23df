"""MLX's attention and softmax kernels: which ones a call launches, and with which grids.

As in MLX's backend/metal/scaled_dot_product_attention.cpp and softmax.cpp, for row-contiguous arrays without a mask
array. q is (B, H, L, D), k and v are (B, K, S, D).
"""

import struct

import mlx.core as mx
import numpy as np

from metal_emulator.arrays import Array
from metal_emulator.mlx_source import (
    TYPES,
    Chip,
    How,
    MLXKernel,
    Result,
    ceil_div,
    int32,
    launch,
    uint64,
)

_VECTOR = ("utils.h", "sdpa_vector.h")
_STEEL = ("utils.h", "steel/attn/kernels/steel_attention.h")
_SOFTMAX = ("utils.h", "softmax.h")
_LOOPED = 4096  # columns beyond which softmax loops


def attention(
    how: How, q: mx.array, k: mx.array, v: mx.array, scale: float, chip: Chip | None = None
) -> Result:
    """Attention of at most 8 rows by sequence without a mask, by one pass or two as MLX chooses on this chip."""
    size = (chip or Chip()).size
    stored = k.shape[2]
    if (size in {"d", "s"} and stored >= 1024) or (k.shape[1] < q.shape[1] and stored >= 4096):
        return sdpa_vector_2pass(how, q, k, v, scale, blocks(q, k, size))
    return sdpa_vector(how, q, k, v, scale)


def blocks(q: mx.array, k: mx.array, size: str) -> int:
    """Into how many parts MLX cuts the keys in two passes, on a chip of this size."""
    simdgroups, stored = q.shape[1] // k.shape[1] * q.shape[2], k.shape[2]
    if size == "s":
        if stored <= 1024 or simdgroups <= 4:
            return 64
        return next(
            (n for most, n in ((8192, 128), (32768, 256), (65536, 512)) if stored <= most), 1024
        )
    if size == "d":
        if simdgroups <= 2 and stored > 8192:
            return 256
        if simdgroups >= 6 and stored >= 16384:
            return 512 if stored < 65536 else 1024
        return 128
    return 64 if simdgroups >= 4 else 32


def sdpa_vector(
    how: How, q: mx.array, k: mx.array, v: mx.array, scale: float, *, causal: bool = False
) -> Result:
    """One pass: a threadgroup of 32 simdgroups makes one head of one row."""
    batch, heads, rows, dim = q.shape
    template = f"{TYPES[q.dtype]}, {dim}, {v.shape[3]}"
    kernel = MLXKernel(_VECTOR, "sdpa_vector", template, _vector_constants(causal and rows > 1))
    inputs: dict[str, mx.array | Array] = {
        "queries": q,
        "keys": k,
        "values": v,
        "gqa_factor": int32(heads // k.shape[1]),
    }
    outputs = {"out": ((batch, heads, rows, v.shape[3]), q.dtype)}
    made, ran = launch(
        how,
        kernel,
        inputs | _vector_sizes(k, v, scale),
        outputs,
        (batch * heads, rows, 1),
        (1024, 1, 1),
    )
    return Result(made["out"], (ran,))


def sdpa_vector_2pass(
    how: How,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    parts: int,
    *,
    causal: bool = False,
) -> Result:
    """Two passes: `parts` parts of the keys by kv head, then their sum."""
    batch, heads, rows, dim = q.shape
    kv_heads, stored, value_dim = k.shape[1], k.shape[2], v.shape[3]
    factor = heads // kv_heads
    type_name = TYPES[q.dtype]
    shares = rows == 1 and factor == 8 and dim == value_dim and dim in {64, 128} and stored >= 8192
    name = "sdpa_vector_2pass_1_gqa" if shares else "sdpa_vector_2pass_1"
    template = f"{type_name}, {dim}, {value_dim}" + (", 8, 4" if shares else "")
    constants = (*_vector_constants(causal and rows > 1), (26, parts))
    made, first = launch(
        how,
        MLXKernel(_VECTOR, name, template, constants),
        {"queries": q, "keys": k, "values": v} | _vector_sizes(k, v, scale),
        {
            "out": ((batch, heads, rows, parts, value_dim), q.dtype),
            "sums": ((batch, heads, rows, parts), mx.float32),
            "maxs": ((batch, heads, rows, parts), mx.float32),
        },
        (kv_heads, batch, parts),
        (32, factor, rows),
    )
    joined, second = launch(
        how,
        MLXKernel(_VECTOR, "sdpa_vector_2pass_2", f"{type_name}, {value_dim}", constants),
        {
            "partials": made["out"],
            "sums": made["sums"],
            "maxs": made["maxs"],
            "blocks": int32(parts),
        },
        {"out": ((batch, heads, rows, value_dim), q.dtype)},
        (batch * heads, rows, 1),
        (1024, 1, 1),
    )
    return Result(joined["out"], (first, second))


def _vector_constants(causal: bool) -> tuple[tuple[int, bool | int], ...]:
    """has_mask, query_transposed, do_causal, bool_mask, float_mask, has_sinks."""
    return ((20, False), (21, False), (22, causal), (23, False), (24, False), (25, False))


def _vector_sizes(k: mx.array, v: mx.array, scale: float) -> dict[str, mx.array | Array]:
    return {
        "N": int32(k.shape[2]),
        "k_head_stride": uint64(k.shape[2] * k.shape[3]),
        "k_seq_stride": uint64(k.shape[3]),
        "v_head_stride": uint64(v.shape[2] * v.shape[3]),
        "v_seq_stride": uint64(v.shape[3]),
        "scale": np.array([scale], np.float32),
    }


def steel_attention(
    how: How, q: mx.array, k: mx.array, v: mx.array, scale: float, *, causal: bool = False
) -> Result:
    """Attention of many rows on simdgroup matrices, without a mask array."""
    batch, heads, rows, dim = q.shape
    stored = k.shape[2]
    tile_q, tile_k = 32, 32 if dim < 128 else 16
    constants = (
        (200, rows % tile_q == 0),
        (201, stored % tile_k == 0),
        (300, False),
        (301, causal),
    )
    type_name = TYPES[q.dtype]
    template = f"{type_name}, {tile_q}, {tile_k}, {dim}, {dim}, 4, 1, {type_name}, float"
    kernel = MLXKernel(_STEEL, "attention", template, (*constants, (302, False), (303, False)))
    params = struct.pack(
        "<6if7i12q",
        *(batch, heads, dim, rows, stored, heads // k.shape[1], scale),
        *(ceil_div(rows, tile_q), ceil_div(stored, tile_k), rows // tile_q, stored // tile_k),
        *(rows % tile_q, stored % tile_k, stored - rows),
        *(heads * rows * dim, rows * dim, dim),
        *(k.shape[1] * stored * dim, stored * dim, dim) * 2,
        *(rows * heads * dim, dim, heads * dim),  # the output is (B, L, H, D) in memory
    )
    made, ran = launch(
        how,
        kernel,
        {"Q": q, "K": k, "V": v, "params": np.frombuffer(params, np.uint8)},
        {"O": ((batch, rows, heads, dim), q.dtype)},
        (ceil_div(rows, tile_q), heads, batch),
        (32, 4, 1),
    )
    return Result(made["O"].transpose(0, 2, 1, 3), (ran,))


def softmax(how: How, x: mx.array, *, precise: bool = False) -> Result:
    """Softmax over the last axis of x (rows, columns)."""
    rows, columns = x.shape
    looped = columns > _LOOPED
    type_name = TYPES[x.dtype]
    template = f"{type_name}, {'float' if precise else type_name}, 4"
    name = "softmax_looped" if looped else "softmax_single_row"
    threads = 1024 if looped else 32 * ceil_div(ceil_div(columns, 4), 32)
    made, ran = launch(
        how,
        MLXKernel(_SOFTMAX, name, template),
        {"in": x, "axis_size": int32(columns)},
        {"out": (tuple(x.shape), x.dtype)},
        (rows, 1, 1),
        (threads, 1, 1),
    )
    return Result(made["out"], (ran,))
