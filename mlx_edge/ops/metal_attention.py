"""Launches of the attention kernels: new rows of qkv over what a cache has stored, to heads and the next tail.

Knows how positions become `meta` and `sizes` (metal_kernels/README.md), which template serves which geometry, and
what is not served. Knows no cache class and no weights.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from mlx_edge.ops.metal_launch import Kernel, Template
from mlx_edge.ops.types import Norm, Rope, StoredPlanes

CHUNK = 32  # positions of a simdgroup; a tail begins at a multiple of it
PART = 256  # positions of a threadgroup, and its threads
TAIL_SLOTS = 64  # of the next tail
HEAD_DIMS = (64, 80, 96, 128, 192, 256)
DTYPES = (mx.float16, mx.bfloat16, mx.float32)
MAX_WIDTH = 16  # new rows of a sequence
BITS = (4, 8)
GROUP_SIZES = (32, 64, 128)
BLOCK_ROWS = 8  # query rows that a threadgroup has in registers
SMALL = 8  # MLX passes inputs of fewer elements in another address space


@dataclass(frozen=True)
class Positions:
    """Where a step's rows stand, for kernels and for their grid; made once a step by `place`."""

    meta: mx.array  # (B, 8) int32
    first_part: int
    num_parts: int
    width: int  # L


def place(
    starts: Sequence[int],
    lengths: Sequence[int],
    tail_starts: Sequence[int],
    *,
    width: int,
    ring: int = 0,
    window: int = 0,
    keep: int = 0,
    keep_window: int = 0,
    shifts: Sequence[int] = (),
) -> Positions:
    """Positions of a step of `width` rows a sequence, from those of its new rows and of its tail; 0 is no limit.

    Columns of the meta are those of metal_kernels/README.md. Parts are counted from the first that a query sees or
    that the tail begins in; with `keep` part 0 comes before them.
    """
    rows = list(zip(starts, lengths, tail_starts, shifts or (0,) * len(starts), strict=True))
    assert all(tail % CHUNK == 0 and 0 <= tail <= start for start, _, tail, _ in rows)
    assert all(start + length - tail <= TAIL_SLOTS for start, length, tail, _ in rows)
    assert ring % CHUNK == 0 and all(0 <= length <= width for length in lengths)
    meta = [[s, n, tail, ring, window, keep, keep_window, shift] for s, n, tail, shift in rows]
    oldest = min(max(0, start - window + 1) if window else 0 for start in starts)
    first = min(oldest, *tail_starts) // PART
    if keep:
        first = max(first, 1)
    last = max(start + length - 1 for start, length, _, _ in rows) // PART
    num_parts = max(0, last - first + 1) + bool(keep)
    return Positions(mx.array(meta, dtype=mx.int32), first, max(1, num_parts), width)


def refuse(
    dtype: mx.Dtype,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    width: int,
    rope: Rope | None = None,
    bits: int = 0,
    group_size: int = 0,
    keep: int = 0,
    norms: Sequence[Norm | None] = (),
    softcap: float | None = None,
) -> str | None:
    """Why no kernel serves this, with the nearest that is served; None when one does. `bits` 0: floats."""
    if dtype not in DTYPES:
        return f"rows of {dtype}; float16, bfloat16 and float32 are served"
    if head_dim not in HEAD_DIMS:
        return f"head_dim {head_dim}; the nearest served is {_nearest(head_dim, HEAD_DIMS)}"
    if num_heads % num_kv_heads:
        return f"{num_heads} heads over {num_kv_heads} kv heads; a multiple of these is served"
    if width > MAX_WIDTH:
        return f"{width} new rows; at most {MAX_WIDTH} are served"
    if rope is not None and (rope.dims % 2 or not 2 * SMALL <= rope.dims <= head_dim):
        return f"a rotation of {rope.dims} dims; an even number from {2 * SMALL} to {head_dim} is served"
    if any(norm is not None and norm.weight.size != head_dim for norm in norms):
        return f"a norm over all heads together; one over each, of {head_dim}, is served"
    if softcap is not None:
        return f"scores capped at {softcap:g}; scores as they are are served"
    if keep > PART:
        return f"{keep} first positions kept; at most {PART} are served"
    if bits == 0:
        return None
    if bits not in BITS:
        return f"keys and values of {bits} bits; the nearest served is {_nearest(bits, BITS)}"
    groups = [size for size in GROUP_SIZES if head_dim % size == 0]
    if not groups:
        return f"packed heads of {head_dim}; the nearest served is {_nearest(head_dim, (64, 96))}"
    if group_size not in groups:
        nearest = _nearest(group_size, groups)
        return f"groups of {group_size} in heads of {head_dim}; the nearest served is {nearest}"
    return None


def _nearest(value: int, served: Sequence[int]) -> int:
    return min(served, key=lambda candidate: abs(candidate - value))


def attend(
    qkv: mx.array,
    stored: StoredPlanes,
    positions: Positions,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    rope: Rope | None = None,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    sinks: mx.array | None = None,
) -> tuple[mx.array, tuple[mx.array, ...]]:
    """Heads (M, H * D) of raw qkv (M, (H + 2K) * D), M = B * L, and the next tail's planes, of TAIL_SLOTS slots.

    Queries and keys are normed and rotated here. `sinks` (H,): one more score of each head, without a value. Of
    `stored` the arrays and their format are used; where its rows stand is said by `positions`. What `refuse` names is
    not served.
    """
    group, parts = num_heads // num_kv_heads, positions.num_parts
    batch, tail = positions.meta.shape[0], stored.tail
    heads_of_rows = (batch * positions.width, num_heads)
    planes = (stored.body or tail, tail, stored.prefix or tail)
    slots = [plane[0].shape[3] for plane in planes]
    sizes = _integers(*slots, TAIL_SLOTS, positions.first_part, parts, positions.width, 0)
    sinks = _no_sinks(num_heads) if sinks is None else _padded(sinks)
    results = _kernel(is_packed=stored.bits > 0, has_parts=parts > 1)(
        [
            qkv,
            *(array for plane in planes for array in plane),
            positions.meta,
            sizes,
            *_rotation(scale, rope, q_norm, k_norm),
            *(qkv if norm is None else norm.weight.astype(qkv.dtype) for norm in (q_norm, k_norm)),
            sinks,
        ],
        template=[
            ("T", qkv.dtype),
            ("D", head_dim),
            ("G", group),
            ("ROWS", min(BLOCK_ROWS, 1 << (group * positions.width - 1).bit_length())),
            *_variants(stored, rope, q_norm, k_norm),
        ],
        grid=(PART * num_kv_heads, batch, parts),
        threadgroup=(PART, 1, 1),
        shapes=_shapes(heads_of_rows, head_dim, parts, tail),
        dtypes=[*([qkv.dtype] if parts == 1 else [mx.float32] * 2), *(p.dtype for p in tail)],
    )
    heads, next_tail = results[: -len(tail)], tuple(results[-len(tail) :])
    if parts > 1:
        heads = COMBINE(
            [*heads, sinks, sizes],
            template=[("T", qkv.dtype), ("D", head_dim)],
            grid=(head_dim, num_heads, heads_of_rows[0]),
            threadgroup=(head_dim, 1, 1),
            shapes=_shapes(heads_of_rows, head_dim, 1, ()),
            dtypes=[qkv.dtype],
        )
    return heads[0], next_tail


def _variants(
    stored: StoredPlanes, rope: Rope | None, q_norm: Norm | None, k_norm: Norm | None
) -> Template:
    """What is done to a row, and how it is stored."""
    variants: list[tuple[str, int | bool]] = [
        ("DIMS", 0 if rope is None else rope.dims),
        ("PAIRED", rope is not None and rope.is_interleaved),
        ("NORM", (q_norm is not None) + 2 * (k_norm is not None)),
    ]
    if stored.bits:
        variants += [("BITS", stored.bits), ("GROUP", stored.group_size)]
    return variants


def _shapes(
    heads_of_rows: tuple[int, int], head_dim: int, parts: int, tail: tuple[mx.array, ...]
) -> list[tuple[int, ...]]:
    """Of heads, or of their values and sums by parts; then of the next tail."""
    num_rows, num_heads = heads_of_rows
    next_tail = [(*plane.shape[:3], TAIL_SLOTS, plane.shape[4]) for plane in tail]
    if parts == 1:
        return [(num_rows, num_heads * head_dim), *next_tail]
    return [(*heads_of_rows, parts, head_dim), (*heads_of_rows, 2, parts), *next_tail]


def _rotation(
    scale: float, rope: Rope | None, q_norm: Norm | None, k_norm: Norm | None
) -> tuple[mx.array, mx.array]:
    """The kernel's numbers and periods; without a rotation something in place of these, which is not read."""
    epsilons = (0.0 if norm is None else norm.eps for norm in (q_norm, k_norm))
    params = _params(scale, *epsilons, 1.0 if rope is None else rope.magnitude)
    return params, params if rope is None else rope.periods


def _padded(sinks: mx.array) -> mx.array:
    """In float32, and not small."""
    sinks = sinks.astype(mx.float32)
    return mx.pad(sinks, (0, SMALL - sinks.size)) if sinks.size < SMALL else sinks


@cache
def _no_sinks(num_heads: int) -> mx.array:
    return mx.array([-math.inf] * max(num_heads, SMALL))


@cache
def _integers(*values: int) -> mx.array:
    return mx.array(values, dtype=mx.int32)


@cache
def _params(scale: float, q_eps: float, k_eps: float, magnitude: float) -> mx.array:
    """Scores are to the base 2."""
    return mx.array([scale / math.log(2), q_eps, k_eps, magnitude, 0, 0, 0, 0], dtype=mx.float32)


@cache
def _kernel(*, is_packed: bool, has_parts: bool) -> Kernel:
    """Of plain or packed rows, to heads or to parts of them."""
    planes = ("codes", "scales", "offsets") if is_packed else ("rows",)
    sources = ("body", "tail", "prefix")
    rows = (
        "mlx_edge::PackedRows<T, D, BITS, GROUP, {0} uint*, {0} T*>"
        if is_packed
        else "mlx_edge::PlainRows<T, D, {0} T*>"
    )
    stored = [f"{{{', '.join(f'{s}_{p}' for p in planes)}}}" for s in (*sources, "next", "next")]
    results = ("values", "sums") if has_parts else ("heads",)
    body = f"""
using Rows = {rows.format("const device")};
using NewRows = {rows.format("device")};
using Out = {"float" if has_parts else "T"};
using Attention = mlx_edge::Attention<T, Out, Rows, NewRows, D, G, ROWS, DIMS, PAIRED, NORM>;
threadgroup float room[mlx_edge::CHUNKS * Attention::JOINED * D];
threadgroup float tops[2 * mlx_edge::CHUNKS * ROWS];
const uint3 group = threadgroup_position_in_grid;
Attention attention{{
qkv, q_norm, k_norm, {", ".join(stored)},
*(const device mlx_edge::Span*)(meta + 8 * group.y), *(const device mlx_edge::Sizes*)sizes, params, periods, sinks,
{"values, sums" if has_parts else "heads, nullptr"}, room, tops,
group, threadgroups_per_grid, int(simdgroup_index_in_threadgroup), int(thread_index_in_simdgroup)}};
attention.run();
"""
    name = "attn_decode_q" if is_packed else "attn_decode"
    return Kernel(
        name=f"{name}_parts" if has_parts else name,
        file=f"{name}.metal",
        inputs=(
            "qkv",
            *(f"{source}_{plane}" for source in sources for plane in planes),
            *("meta", "sizes", "params", "periods", "q_norm", "k_norm", "sinks"),
        ),
        outputs=(*results, *(f"next_{plane}" for plane in planes)),
        body=body,
    )


COMBINE = Kernel(
    name="attn_combine",
    file="attn_combine.metal",
    inputs=("values", "sums", "sinks", "sizes"),
    outputs=("heads",),
    body="""
const uint3 group = threadgroup_position_in_grid;
mlx_edge::attn_combine<D>(values, sums, sinks[group.y], sizes[5], heads,
group.z * threadgroups_per_grid.y + group.y, thread_index_in_threadgroup);
""",
)
