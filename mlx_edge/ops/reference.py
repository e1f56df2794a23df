"""The definition of correct: every op in plain MLX, written once and for reading.

A fast implementation has the same signature and is tested against float64 beside this one. These are also
the only differentiable ops. Nothing here knows which device it runs on.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import accumulate
from typing import Any

import mlx.core as mx

from mlx_edge.ops.types import (
    Activation,
    AttentionWeights,
    Dense,
    Embedding,
    HeadWeights,
    KVHandle,
    Linear,
    MLPWeights,
    Norm,
    Packed,
    PackedRows,
    Quantized,
    RaggedKV,
    Rope,
    Segment,
    StepMeta,
)

SCORE_ELEMENTS = (
    1 << 24
)  # scores held at once; longer prompts go through attention in blocks of queries

Watcher = Callable[[Linear, mx.array], None]  # a weight's record, and the x (..., E) that meets it
_watcher: ContextVar[Watcher | None] = ContextVar("mlx_edge_watcher", default=None)


@contextmanager
def watch_inputs(watcher: Watcher) -> Iterator[None]:
    """Show `watcher` what goes into every linear of the reference ops inside, in this thread, also within blocks."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def linear(x: mx.array, weights: Linear) -> mx.array:
    """x (..., E) times the transposed weight (N, E), plus its bias: (..., N) in x's dtype."""
    watcher = _watcher.get()
    if watcher is not None:
        watcher(weights, x)
    weights = _restore(weights)
    if weights.input_scale is not None:
        x = round_to_int8(x, weights.input_scale)
    if isinstance(weights, Dense):
        y = x @ weights.weight.astype(x.dtype).T
    else:
        y = mx.quantized_matmul(
            x,
            weights.weight,
            *_affine_in(x.dtype, weights),
            transpose=True,
            group_size=weights.group_size,
            bits=weights.bits,
            mode=weights.mode,
        )
    return y if weights.bias is None else y + weights.bias


def round_to_int8(x: mx.array, scale: float) -> mx.array:
    """x as the nearest of the values scale * code, code in -127 ... 127; in x's dtype."""
    codes = mx.clip(mx.round(x.astype(mx.float32) / scale), -127, 127)
    return (codes * scale).astype(x.dtype)


def _restore(weights: Linear) -> Dense | Quantized:
    return weights.restore() if isinstance(weights, Packed) else weights


def _affine_in(dtype: mx.Dtype, weights: Quantized) -> tuple[mx.array, mx.array | None]:
    """Scales and offsets in the dtype to compute in; those of other modes are codes and stay."""
    if weights.offsets is None:
        return weights.scales, None
    return weights.scales.astype(dtype), weights.offsets.astype(dtype)


def rms_norm(x: mx.array, norm: Norm) -> mx.array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in x's dtype (Zhang and Sennrich 2019)."""
    return mx.fast.rms_norm(x, norm.weight, norm.eps)


def rotate(x: mx.array, rope: Rope, meta: StepMeta) -> mx.array:
    """Rotary position embedding of x (B, H, L, D) at the step's positions (Su et al. 2021)."""
    y = mx.fast.rope(
        x,
        rope.dims,
        traditional=rope.is_interleaved,
        base=None,
        scale=1.0,
        offset=meta.starts_array,
        freqs=rope.periods,
    )
    if rope.magnitude == 1.0:
        return y
    return mx.concatenate([y[..., : rope.dims] * rope.magnitude, y[..., rope.dims :]], axis=-1)


def attention(
    q: mx.array,
    segments: Sequence[Segment],
    meta: StepMeta,
    *,
    scale: float,
    window: int | None = None,
) -> mx.array:
    """Softmax attention of q (B, H, L, D) over all segments together: (B, H, L, D).

    A query at position p sees the keys at positions p - window < position <= p. Padding rows give zeros.
    """
    num_stored = sum(segment.keys.shape[2] for segment in segments)
    rows = max(1, SCORE_ELEMENTS // (q.shape[0] * q.shape[1] * num_stored))
    blocks = [
        _attend(
            q[:, :, i : i + rows], segments, meta.positions[:, i : i + rows], meta, scale, window
        )
        for i in range(0, meta.width, rows)
    ]
    return blocks[0] if len(blocks) == 1 else mx.concatenate(blocks, axis=2)


def _attend(
    q: mx.array,
    segments: Sequence[Segment],
    positions: mx.array,  # (B, L)
    meta: StepMeta,
    scale: float,
    window: int | None,
) -> mx.array:
    batch, heads, length, dim = q.shape
    kv_heads = segments[0].keys.shape[1]
    # The query heads of a group stand under their kv head, so that keys are read once: (B, K, H / K * L, D).
    grouped = (q * scale).reshape(batch, kv_heads, -1, dim)
    scores = []
    is_masked = any(_needs_mask(segment, meta, window) for segment in segments)
    for segment in segments:
        score = _times_rows(grouped, segment.keys)
        if is_masked:
            score = score.reshape(batch, kv_heads, -1, length, score.shape[-1])
            seen = visible(positions, segment.positions, _narrower(window, segment.window))
            seen = seen[:, None, None]
            score = mx.where(seen, score, mx.array(-mx.inf, score.dtype))
            score = score.reshape(batch, kv_heads, -1, score.shape[-1])
        scores.append(score)
    weights = mx.softmax(mx.concatenate(scores, axis=-1), axis=-1, precise=True)
    if is_masked:  # a row that sees nothing is padding: zeros, not the nan of an empty softmax
        weights = mx.where(mx.isnan(weights), mx.array(0, weights.dtype), weights)
    ends = list(accumulate(score.shape[-1] for score in scores))
    parts = mx.split(weights, ends[:-1], axis=-1)
    y = sum(_mix_rows(part, segment.values) for part, segment in zip(parts, segments, strict=True))
    assert isinstance(y, mx.array)
    return y.reshape(batch, heads, length, dim)


def _times_rows(x: mx.array, rows: mx.array | PackedRows) -> mx.array:
    """x (B, K, N, D) times each stored row: (B, K, N, S)."""
    if isinstance(rows, mx.array):
        return x @ rows.swapaxes(-1, -2)
    return _packed_product(x, rows, transpose=True)


def _mix_rows(weights: mx.array, rows: mx.array | PackedRows) -> mx.array:
    """The stored rows weighted by (B, K, N, S) and summed: (B, K, N, D)."""
    if isinstance(rows, mx.array):
        return weights @ rows
    return _packed_product(weights, rows, transpose=False)


def _packed_product(x: mx.array, rows: PackedRows, *, transpose: bool) -> mx.array:
    return mx.quantized_matmul(
        x,
        rows.packs,
        rows.scales,
        rows.offsets,
        transpose=transpose,
        group_size=rows.group_size,
        bits=rows.bits,
    )


def _narrower(first: int | None, second: int | None) -> int | None:
    """The smaller of two windows; None sees everything."""
    return min((w for w in (first, second) if w is not None), default=None)


def _needs_mask(segment: Segment, meta: StepMeta, window: int | None) -> bool:
    """Whether some query does not see some slot; decided on the host, so that decoding builds no mask."""
    first_query, last_query = min(meta.starts), max(meta.starts) + meta.width - 1
    window = _narrower(window, segment.window)
    outside = window is not None and segment.first <= last_query - window
    is_padded = min(meta.lengths) < meta.width
    return segment.has_gaps or is_padded or outside or segment.last > first_query


def visible(queries: mx.array, keys: mx.array, window: int | None) -> mx.array:
    """Which key positions (B, S) each query position (B, L) may attend to: (B, L, S) bool."""
    q, k = queries[:, :, None], keys[:, None, :]
    seen = (k >= 0) & (k <= q)
    return seen if window is None else seen & (k > q - window)


def glu(gate: mx.array, up: mx.array, activation: Activation) -> mx.array:
    """activation(gate) * up, elementwise (Shazeer 2020)."""
    if activation == "silu":
        return gate * mx.sigmoid(gate) * up
    inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
    return 0.5 * gate * (1 + mx.tanh(inner)) * up


def split_heads(x: mx.array, head_dim: int) -> mx.array:
    """(B, L, H * D) to (B, H, L, D)."""
    batch, length, _ = x.shape
    return x.reshape(batch, length, -1, head_dim).transpose(0, 2, 1, 3)


def merge_heads(x: mx.array) -> mx.array:
    """(B, H, L, D) to (B, L, H * D)."""
    batch, _, length, _ = x.shape
    return x.transpose(0, 2, 1, 3).reshape(batch, length, -1)


def attention_block(
    x: mx.array,
    weights: AttentionWeights,
    kv: KVHandle | RaggedKV,
    rope: Rope | None,
    meta: StepMeta,
) -> mx.array:
    """x (B, L, E) + attention over what kv holds and the new positions, which are stored in kv on the way."""
    h = rms_norm(x, weights.norm)
    q, k, v = (
        split_heads(linear(h, w), weights.head_dim) for w in (weights.q, weights.k, weights.v)
    )
    if weights.q_norm is not None:
        q = rms_norm(q, weights.q_norm)
    if weights.k_norm is not None:
        k = rms_norm(k, weights.k_norm)
    if isinstance(kv, RaggedKV):
        parts = zip(kv.handles, meta.alone, meta.rows, strict=True)
        heads = [
            _attend_alone((q[:, :, own], k[:, :, own], v[:, :, own]), weights, handle, rope, alone)
            for handle, alone, own in parts
        ]
        y = mx.concatenate(heads, axis=2)
    else:
        y = _attend_alone((q, k, v), weights, kv, rope, meta)
    return x + linear(merge_heads(y), weights.o)


def _attend_alone(
    heads: tuple[mx.array, mx.array, mx.array],
    weights: AttentionWeights,
    kv: KVHandle,
    rope: Rope | None,
    meta: StepMeta,
) -> mx.array:
    """Rotation, storing and attention of queries, keys and values (B, H or K, L, D) over one cache."""
    q, k, v = heads
    if rope is not None:
        q, k = rotate(q, rope, meta), rotate(k, rope, meta)
    segments = kv.extend(k, v, meta)
    return attention(q, segments, meta, scale=weights.scale, window=weights.window)


def mlp_block(x: mx.array, weights: MLPWeights) -> mx.array:
    """x (B, L, E) + down(activation(gate(norm(x))) * up(norm(x)))."""
    h = rms_norm(x, weights.norm)
    h = glu(linear(h, weights.gate), linear(h, weights.up), weights.activation)
    return x + linear(h, weights.down)


def embed(tokens: mx.array, weights: Embedding) -> mx.array:
    """The table's rows (B, L, E) for int32 tokens (B, L)."""
    table = _restore(weights.table)
    if isinstance(table, Dense):
        return table.weight[tokens]
    return mx.dequantize(
        table.weight[tokens],
        table.scales[tokens],
        None if table.offsets is None else table.offsets[tokens],
        group_size=table.group_size,
        bits=table.bits,
        mode=table.mode,
    )


def head(x: mx.array, weights: HeadWeights) -> mx.array:
    """Logits (B, L, V) of the hidden states x (B, L, E)."""
    return linear(rms_norm(x, weights.norm), weights.projection)


def log_softmax(x: mx.array) -> mx.array:
    """x - log(sum(exp(x))) over the last axis."""
    return x - mx.logsumexp(x, axis=-1, keepdims=True)


def argmax(x: mx.array) -> mx.array:
    """Index of the largest number along the last axis, the first of equals: int32."""
    return mx.argmax(x, axis=-1).astype(mx.int32)


IMPLEMENTATIONS: Mapping[str, Callable[..., Any]] = {
    op.__name__: op
    for op in (
        linear,
        rms_norm,
        rotate,
        attention,
        glu,
        embed,
        head,
        attention_block,
        mlp_block,
        log_softmax,
        argmax,
    )
}
