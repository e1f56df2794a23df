"""The Metal backend: one decode step as the dispatches that `metal_kernels/README.md` lists.

Serves at most MAX_ROWS rows: a token, a small batch of them, or drafts to verify. Longer steps, embedding and what else
it has no op for are left to the reference, which is MLX's own kernels on a Mac. The same launches run on the emulator,
where it is asked for by name. Knows which kernels follow each other; what they are given is in `metal_qmv.py` and
`metal_attention.py`.
"""

import sys
from collections.abc import Callable, Mapping
from functools import cache, lru_cache, wraps
from typing import Any

import mlx.core as mx

from mlx_edge.ops.metal_attention import PART, Positions, attend, place
from mlx_edge.ops.metal_attention import refuse as refuse_attention
from mlx_edge.ops.metal_launch import on
from mlx_edge.ops.metal_qmv import (
    ACTIVATIONS,
    describe,
    have_one_format,
    qmv_glu,
    qmv_norm,
    qmv_res,
    refuse,
    refuse_residual,
)
from mlx_edge.ops.reference import add_residual
from mlx_edge.ops.reference_attention import cap
from mlx_edge.ops.types import (
    AttentionWeights,
    HeadWeights,
    KVHandle,
    Linear,
    MLPWeights,
    RaggedKV,
    Rope,
    StepMeta,
    StoredPlanes,
    TailHandle,
)

MAX_ROWS = 16


def missing() -> str | None:
    """What this machine lacks for the kernels, or None."""
    if not mx.metal.is_available():
        return "no Apple GPU" if sys.platform == "darwin" else "not macOS"
    if mx.default_device().type != mx.DeviceType.gpu:
        return "the default device is the CPU"
    return None


@cache
def _find_emulator() -> Any:
    """The device that emulates a GPU, or in words why there is none."""
    try:
        from metal_emulator import Device, MetalError
    except ImportError:
        return "the package metal_emulator is not here; run from a checkout of the repository"
    try:
        return Device(mode="fast")
    except MetalError as error:
        return str(error)


def missing_for_emulator() -> str | None:
    """What this machine lacks to emulate the kernels, or None."""
    found = _find_emulator()
    return found if isinstance(found, str) else None


def _is_exact(x: mx.array) -> bool:
    """Whether rows must have the bits that they have alone: those of one sequence, as drafts are held against
    what decoding would have said. A batch of single tokens may take the faster 8x8 matrices."""
    return x.shape[-2] > 1


def linear(x: mx.array, weights: Linear) -> mx.array:
    """As `ops.linear`."""
    return _back(qmv_norm(_rows(x), None, [weights], exact=_is_exact(x)), x)


def head(x: mx.array, weights: HeadWeights) -> mx.array:
    """As `ops.head`: the norm is in the product; a scale and a cap are MLX's."""
    rows = qmv_norm(_rows(x), weights.norm, [weights.projection], exact=_is_exact(x))
    rows = rows if weights.scale == 1.0 else rows * weights.scale
    return _back(cap(rows, weights.softcap), x)


def attention_block(
    x: mx.array,
    weights: AttentionWeights,
    kv: TailHandle | RaggedKV,
    rope: Rope | None,
    meta: StepMeta,
) -> mx.array:
    """As `ops.attention_block`; the cache gets its next tail from the kernel, in a ragged step each by a launch."""
    rows = _rows(x)
    exact = _is_exact(x)
    qkv = _project(rows, weights, exact)
    if isinstance(kv, RaggedKV):
        parts = zip(kv.handles, meta.alone, meta.rows, strict=True)
        heads = mx.concatenate(
            [_attend(qkv[own], weights, handle, rope, alone) for handle, alone, own in parts]
        )
    else:
        heads = _attend(qkv, weights, kv, rope, meta)
    return _back(_add(rows, heads, weights.o, weights, exact), x)


def _add(
    rows: mx.array,
    y: mx.array,
    last: Linear,
    weights: AttentionWeights | MLPWeights,
    exact: bool,
) -> mx.array:
    """The residual rows + y times the layer's last weight; in one launch where nothing comes between the two."""
    if weights.post_norm is None and weights.residual_scale == 1.0:
        return qmv_res(y, last, rows, exact=exact)
    return add_residual(rows, qmv_norm(y, None, [last], exact=exact), weights)


def _attend(
    qkv: mx.array, weights: AttentionWeights, kv: Any, rope: Rope | None, meta: StepMeta
) -> mx.array:
    """Heads (B * L, H * D) of raw qkv over one cache, which gets its next tail."""
    shape = (len(meta.starts), weights.num_kv_heads, meta.width, weights.head_dim)
    stored = kv.open_step(_like(shape, qkv.dtype), meta)
    heads, tail = attend(
        qkv,
        stored,
        _place(meta, stored, weights.window),
        num_heads=weights.num_heads,
        num_kv_heads=weights.num_kv_heads,
        head_dim=weights.head_dim,
        scale=weights.scale,
        rope=rope,
        q_norm=weights.q_norm,
        k_norm=weights.k_norm,
        sinks=weights.sinks,
    )
    kv.close_step(tail, meta)
    return heads


@lru_cache(maxsize=16)
def _like(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    return mx.zeros(shape, dtype)


def _place(meta: StepMeta, stored: StoredPlanes, window: int | None) -> Positions:
    """The same positions again for all layers of a step that see as far."""
    windows = [w for w in (window, stored.window) if w is not None]
    return _placed(
        meta.starts,
        meta.lengths,
        stored.tail_starts,
        width=meta.width,
        ring=stored.ring,
        window=min(windows, default=0),
        keep=stored.keep,
        keep_window=window or 0,
        shifts=meta.shifts,
    )


_placed = lru_cache(maxsize=64)(place)  # a ragged step has as many as sequences


def _project(rows: mx.array, weights: AttentionWeights, exact: bool) -> mx.array:
    """Queries, keys and values side by side; one launch where their weights have one format, else a copy joins them."""
    projections = [weights.q, weights.k, weights.v]
    if have_one_format(projections):
        return qmv_norm(rows, weights.norm, projections, exact=exact)
    parts = [qmv_norm(rows, weights.norm, [one], exact=exact) for one in projections]
    return mx.concatenate(parts, axis=-1)


def mlp_block(x: mx.array, weights: MLPWeights) -> mx.array:
    """As `ops.mlp_block`."""
    rows = _rows(x)
    gate, up, activation, exact = weights.gate, weights.up, weights.activation, _is_exact(x)
    inner = qmv_glu(rows, weights.norm, gate, up, activation, exact=exact)
    return _back(_add(rows, inner, weights.down, weights, exact), x)


def _rows(x: mx.array) -> mx.array:
    return x.reshape(-1, x.shape[-1])


def _back(rows: mx.array, x: mx.array) -> mx.array:
    return rows.reshape(*x.shape[:-1], rows.shape[-1])


def _caches(kv: KVHandle | RaggedKV) -> tuple[Any, ...]:
    return kv.handles if isinstance(kv, RaggedKV) else (kv,)


def refuse_attention_block(
    x: mx.array,
    weights: AttentionWeights,
    kv: TailHandle | RaggedKV,
    rope: Rope | None,
    meta: StepMeta,
) -> str | None:
    """Why the kernels cannot run this layer, or None."""
    caches = _caches(kv)
    if not all(hasattr(cache, "open_step") for cache in caches):
        return "the cache has no tail that a kernel may make anew"
    rows = _rows(x)
    projections = (refuse(rows, [one]) for one in (weights.q, weights.k, weights.v))
    refusal = next((found for found in projections if found is not None), None)
    refusal = refusal or refuse_residual(weights.o)
    if refusal is not None:
        return refusal
    width = max(meta.lengths) if meta.is_ragged else meta.width
    kinds = {(*cache.packing, cache.keep) for cache in caches}
    refusals = (
        refuse_attention(
            x.dtype,
            num_heads=weights.num_heads,
            num_kv_heads=weights.num_kv_heads,
            head_dim=weights.head_dim,
            width=width,
            rope=rope,
            bits=bits,
            group_size=group_size,
            keep=keep,
            norms=(weights.q_norm, weights.k_norm),
            softcap=weights.softcap,
        )
        for bits, group_size, keep in sorted(kinds)
    )
    return next((found for found in refusals if found is not None), None)


def _refuse_mlp_block(x: mx.array, weights: MLPWeights) -> str | None:
    if weights.activation not in ACTIVATIONS:
        return f"the activation {weights.activation}; served are {' and '.join(ACTIVATIONS)}"
    refusal = refuse(_rows(x), [weights.gate, weights.up])
    return refusal or refuse_residual(weights.down)


def _has_open_prefix(kv: KVHandle | RaggedKV, meta: StepMeta) -> bool:
    starts = meta.starts if meta.is_ragged else (min(meta.starts),)
    keeps = (getattr(cache, "keep", 0) for cache in _caches(kv))
    return any(start < keep for start, keep in zip(starts, keeps, strict=True))


def leave(op: str, args: tuple[Any, ...]) -> str | None:
    """Why the reference is meant to run this call, or None."""
    if op not in OPS:
        return "it is left to MLX's own kernels"
    x = args[0]
    rows = x.size // x.shape[-1]
    if rows > MAX_ROWS:
        return f"{rows} rows; more than {MAX_ROWS} are left to MLX's own kernels"
    if op == "attention_block" and args[4].axes is not None:
        return "tokens of images, which turn on three axes, are left to MLX's own kernels"
    if op == "attention_block" and _has_open_prefix(args[2], args[4]):
        return "the positions that are always kept are not all stored yet"
    return None


def _describe_attention_block(
    x: mx.array,
    weights: AttentionWeights,
    kv: TailHandle | RaggedKV,
    _rope: Rope | None,
    meta: StepMeta,
) -> str:
    rows, exact, projections = _rows(x), _is_exact(x), [weights.q, weights.k, weights.v]
    names = [describe(rows, projections, exact=exact)]
    if not have_one_format(projections):
        names = [*(describe(rows, [one], exact=exact) for one in projections), "concatenate"]
    is_packed = any(any(cache.packing) for cache in _caches(kv))
    each = " for each sequence" if meta.is_ragged else ""
    attention = f"attn_decode_q{each}" if is_packed else f"attn_decode{each}"
    names.append(f"{attention}, then attn_combine beyond {PART} positions")
    return ", ".join([*names, *_describe_end(rows, weights.o, weights, exact)])


def _describe_end(
    rows: mx.array, last: Linear, weights: AttentionWeights | MLPWeights, exact: bool
) -> list[str]:
    norm = ["rms_norm"] * (weights.post_norm is not None)
    scale = ["multiply"] * (weights.residual_scale != 1.0)
    if norm or scale:
        return [describe(rows, [last], exact=exact), *norm, *scale, "add"]
    return [describe(rows, [last], "res", exact=exact)]


def _describe_mlp_block(x: mx.array, weights: MLPWeights) -> str:
    rows, exact = _rows(x), _is_exact(x)
    glu = describe(rows, [weights.gate, weights.up], "glu", exact=exact)
    return ", ".join([glu, *_describe_end(rows, weights.down, weights, exact)])


def _projection(weights: Linear | HeadWeights) -> Linear:
    return weights.projection if isinstance(weights, HeadWeights) else weights


def _describe_linear(x: mx.array, weights: Linear | HeadWeights) -> str:
    return describe(_rows(x), [_projection(weights)], exact=_is_exact(x))


def _refuse_product(x: mx.array, weights: Linear | HeadWeights) -> str | None:
    return refuse(_rows(x), [_projection(weights)])


Run = Callable[..., mx.array]
# Op -> what runs it, what refuses it, what names its launches.
Ops = Mapping[str, tuple[Run, Callable[..., str | None], Callable[..., str]]]
OPS: Ops = {
    "linear": (linear, _refuse_product, _describe_linear),
    "head": (head, _refuse_product, _describe_linear),
    "attention_block": (attention_block, refuse_attention_block, _describe_attention_block),
    "mlp_block": (mlp_block, _refuse_mlp_block, _describe_mlp_block),
}


def _on_emulator(run: Run) -> Run:
    @wraps(run)
    def emulated(*args: Any) -> mx.array:
        with on(_find_emulator()):
            return run(*args)

    return emulated


EMULATED_OPS: Ops = {op: (_on_emulator(run), no, name) for op, (run, no, name) in OPS.items()}
