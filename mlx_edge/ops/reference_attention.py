"""The definition of correct for attention: rotation, scores and their mix, in plain MLX.

The rest of the reference is in `reference.py`. Nothing here knows a weight, a layer or a device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import mlx.core as mx

from mlx_edge.ops.types import PackedRows, Rope, Segment, StepMeta

SCORE_ELEMENTS = (
    1 << 24
)  # scores held at once; longer prompts go through attention in blocks of queries


def rotate(x: mx.array, rope: Rope, meta: StepMeta) -> mx.array:
    """Rotary position embedding of x (B, H, L, D) at the step's positions (Su et al. 2021)."""
    if meta.axes is not None:
        return _rotate_by_axes(x, rope, meta.axes)
    y = mx.fast.rope(
        x,
        rope.dims,
        traditional=rope.is_interleaved,
        base=None,
        scale=1.0,
        offset=meta.turns_array,
        freqs=rope.periods,
    )
    if rope.magnitude == 1.0:
        return y
    return mx.concatenate([y[..., : rope.dims] * rope.magnitude, y[..., rope.dims :]], axis=-1)


def _rotate_by_axes(x: mx.array, rope: Rope, axes: mx.array) -> mx.array:
    """Each run of pairs by the position on its own axis (Wang et al. 2024, M-RoPE); axes (3, B, L)."""
    runs = rope.sections or (rope.dims // 2,)
    turns = [mx.repeat(axes[i][..., None], run, axis=-1) for i, run in enumerate(runs)]
    angles = mx.concatenate(turns, axis=-1).astype(mx.float32) / rope.periods  # (B, L, dims / 2)
    cos, sin = (f(angles)[:, None] * rope.magnitude for f in (mx.cos, mx.sin))
    turned, rest = x[..., : rope.dims].astype(mx.float32), x[..., rope.dims :]
    if rope.is_interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        pairs = mx.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)
        turned = pairs.reshape(*x.shape[:-1], rope.dims)
    else:
        a, b = mx.split(turned, 2, axis=-1)
        turned = mx.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return mx.concatenate([turned.astype(x.dtype), rest], axis=-1)


def attention(
    q: mx.array,
    segments: Sequence[Segment],
    meta: StepMeta,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Softmax attention of q (B, H, L, D) over all segments together: (B, H, L, D).

    A query at position p sees the keys at positions p - window < position <= p. Padding rows give zeros.
    """
    num_stored = sum(segment.keys.shape[2] for segment in segments)
    rows = max(1, SCORE_ELEMENTS // (q.shape[0] * q.shape[1] * num_stored))
    rule = _ScoreRule(scale, window, softcap, sinks)
    blocks = [
        _attend(q[:, :, i : i + rows], segments, meta.positions[:, i : i + rows], meta, rule)
        for i in range(0, meta.width, rows)
    ]
    return blocks[0] if len(blocks) == 1 else mx.concatenate(blocks, axis=2)


@dataclass(frozen=True)
class _ScoreRule:
    """What becomes of a score before the softmax."""

    scale: float
    window: int | None
    softcap: float | None
    sinks: mx.array | None  # (H,)


def _attend(
    q: mx.array,
    segments: Sequence[Segment],
    positions: mx.array,  # (B, L)
    meta: StepMeta,
    rule: _ScoreRule,
) -> mx.array:
    batch, heads, length, dim = q.shape
    kv_heads = segments[0].keys.shape[1]
    # The query heads of a group stand under their kv head, so that keys are read once: (B, K, H / K * L, D).
    grouped = (q * rule.scale).reshape(batch, kv_heads, -1, dim)
    scores = []
    is_masked = any(_needs_mask(segment, meta, rule.window) for segment in segments)
    for segment in segments:
        score = cap(_times_rows(grouped, segment.keys), rule.softcap)
        if is_masked:
            score = score.reshape(batch, kv_heads, -1, length, score.shape[-1])
            seen = visible(positions, segment.positions, _narrower(rule.window, segment.window))
            seen = seen[:, None, None]
            score = mx.where(seen, score, mx.array(-mx.inf, score.dtype))
            score = score.reshape(batch, kv_heads, -1, score.shape[-1])
        scores.append(score)
    num_segments = len(scores)
    if rule.sinks is not None:  # one score more, whose value is zeros
        sinks = rule.sinks.reshape(1, kv_heads, -1, 1).astype(q.dtype)
        sinks = mx.repeat(sinks, length, axis=2)
        scores.append(mx.broadcast_to(sinks, (*scores[0].shape[:-1], 1)))
    weights = mx.softmax(mx.concatenate(scores, axis=-1), axis=-1, precise=True)
    if is_masked:  # a row that sees nothing is padding: zeros, not the nan of an empty softmax
        weights = mx.where(mx.isnan(weights), mx.array(0, weights.dtype), weights)
    ends = list(accumulate(score.shape[-1] for score in scores))
    parts = mx.split(weights, ends[:-1], axis=-1)[:num_segments]
    y = sum(_mix_rows(part, segment.values) for part, segment in zip(parts, segments, strict=True))
    assert isinstance(y, mx.array)
    return y.reshape(batch, heads, length, dim)


def cap(scores: mx.array, softcap: float | None) -> mx.array:
    """softcap * tanh(scores / softcap), or the scores as they are."""
    return scores if softcap is None else softcap * mx.tanh(scores / softcap)


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


def attention_within(
    q: mx.array, k: mx.array, v: mx.array, lengths: Sequence[int], *, scale: float
) -> mx.array:
    """Softmax attention of q (H, L, D) over k and v (H, L, D), each run of `lengths` over itself alone: (H, L, D).

    In both directions, without a cache: the patches of an image, or of a window of one.
    """
    ends = list(accumulate(lengths))
    queries, keys, values = (mx.split(x, ends[:-1], axis=1) for x in (q, k, v))
    parts = zip(queries, keys, values, strict=True)
    return mx.concatenate([_attend_within(a, b, c, scale) for a, b, c in parts], axis=1)


def _attend_within(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    rows = max(1, SCORE_ELEMENTS // (k.shape[0] * k.shape[1]))
    blocks = [
        mx.fast.scaled_dot_product_attention(
            q[None, :, i : i + rows], k[None], v[None], scale=scale
        )
        for i in range(0, q.shape[1], rows)
    ]
    return mx.concatenate(blocks, axis=2)[0]
