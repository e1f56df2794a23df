"""The definition of correct: every op in plain MLX, written once and for reading.

A fast implementation has the same signature and is tested against float64 beside this one. These are also
the only differentiable ops. Nothing here knows which device it runs on. What attention is made of is in
`reference_attention.py`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import mlx.core as mx

from mlx_edge.ops.reference_attention import attention, attention_within, cap, rotate
from mlx_edge.ops.types import (
    Activation,
    AttentionWeights,
    Dense,
    Embedding,
    HeadWeights,
    KVHandle,
    Linear,
    MLPWeights,
    MoEWeights,
    Norm,
    Packed,
    Quantized,
    RaggedKV,
    Rope,
    StepMeta,
)

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


def glu(gate: mx.array, up: mx.array, activation: Activation) -> mx.array:
    """activation(gate) * up, elementwise (Shazeer 2020)."""
    if activation == "silu":
        return gate * mx.sigmoid(gate) * up
    if activation == "swiglu_oai":  # gpt-oss: clamped, a steeper sigmoid, and one more than up
        gate, up = mx.minimum(gate, 7.0), mx.clip(up, -7.0, 7.0)
        return gate * mx.sigmoid(1.702 * gate) * (up + 1)
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
    h = x if weights.norm is None else rms_norm(x, weights.norm)
    q = _project_heads(h, weights.q, weights.q_norm, weights.head_dim)
    k = _project_heads(h, weights.k, weights.k_norm, weights.head_dim)
    v = _project_heads(h, weights.v, None, weights.head_dim)
    if isinstance(kv, RaggedKV):
        parts = zip(kv.handles, meta.alone, meta.rows, strict=True)
        heads = [
            _attend_alone((q[:, :, own], k[:, :, own], v[:, :, own]), weights, handle, rope, alone)
            for handle, alone, own in parts
        ]
        y = mx.concatenate(heads, axis=2)
    else:
        y = _attend_alone((q, k, v), weights, kv, rope, meta)
    return add_residual(x, linear(merge_heads(y), weights.o), weights)


def _project_heads(h: mx.array, weights: Linear, norm: Norm | None, head_dim: int) -> mx.array:
    """Heads (B, H, L, D) of h (B, L, E), each normed by itself, or all together where the norm is as wide."""
    y = linear(h, weights)
    is_wide = norm is not None and norm.weight.size > head_dim
    if norm is not None and is_wide:
        y = rms_norm(y, norm)
    heads = split_heads(y, head_dim)
    return heads if norm is None or is_wide else rms_norm(heads, norm)


def add_residual(
    x: mx.array, y: mx.array, weights: AttentionWeights | MLPWeights | MoEWeights
) -> mx.array:
    """The residual x and a layer's output y, normed and scaled as the layer wants it."""
    if weights.post_norm is not None:
        y = rms_norm(y, weights.post_norm)
    return x + (y if weights.residual_scale == 1.0 else y * weights.residual_scale)


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
    return attention(
        q,
        segments,
        meta,
        scale=weights.scale,
        window=weights.window,
        softcap=weights.softcap,
        sinks=weights.sinks,
    )


def mlp_block(x: mx.array, weights: MLPWeights) -> mx.array:
    """x (B, L, E) + down(activation(gate(norm(x))) * up(norm(x)))."""
    h = x if weights.norm is None else rms_norm(x, weights.norm)
    h = glu(linear(h, weights.gate), linear(h, weights.up), weights.activation)
    return add_residual(x, linear(h, weights.down), weights)


def moe_block(x: mx.array, weights: MoEWeights) -> mx.array:
    """x (B, L, E) + the outputs of each row's `top_k` likeliest experts, weighted (Shazeer et al. 2017).

    The weights are the router's softmax over all experts; over the chosen ones where they are normalized.
    """
    h = x if weights.norm is None else rms_norm(x, weights.norm)
    scores = linear(h, weights.router)
    chosen = mx.argpartition(-scores, weights.top_k - 1, axis=-1)[..., : weights.top_k]
    shares = mx.take_along_axis(scores, chosen, axis=-1).astype(mx.float32)
    if weights.is_normalized:
        shares = mx.softmax(shares, axis=-1)
    else:
        shares = mx.exp(shares - mx.logsumexp(scores.astype(mx.float32), axis=-1, keepdims=True))
    rows = h[..., None, None, :]  # (B, L, 1, 1, E), times the experts of (B, L, top_k)
    gate, up = (_expert_products(rows, w, chosen, weights) for w in (weights.gate, weights.up))
    inner = glu(gate, up, weights.activation)
    y = _expert_products(inner, weights.down, chosen, weights)[..., 0, :]  # (B, L, top_k, E)
    return add_residual(x, (y * shares[..., None].astype(y.dtype)).sum(axis=-2), weights)


def _expert_products(
    x: mx.array, stacked: Linear, chosen: mx.array, weights: MoEWeights
) -> mx.array:
    """x (B, L, 1 or top_k, 1, columns) times the rows of each chosen expert (B, L, top_k)."""
    stacked = _restore(stacked)

    def apart(array: mx.array) -> mx.array:
        return array.reshape(weights.num_experts, -1, *array.shape[1:])

    if isinstance(stacked, Dense):
        by_expert = apart(stacked.weight).astype(x.dtype).swapaxes(-1, -2)
        y = mx.gather_mm(x, by_expert, rhs_indices=chosen)
    else:
        scales, offsets = _affine_in(x.dtype, stacked)
        y = mx.gather_qmm(
            x,
            apart(stacked.weight),
            apart(scales),
            None if offsets is None else apart(offsets),
            rhs_indices=chosen,
            transpose=True,
            group_size=stacked.group_size,
            bits=stacked.bits,
            mode=stacked.mode,
        )
    if stacked.bias is None:
        return y
    return y + apart(stacked.bias).astype(y.dtype)[chosen][..., None, :]


def embed(tokens: mx.array, weights: Embedding) -> mx.array:
    """The table's rows (B, L, E) for int32 tokens (B, L), scaled."""
    rows = _look_up(tokens, _restore(weights.table))
    # The factor is rounded to the rows' own dtype, as it was in training.
    return rows if weights.scale == 1.0 else rows * mx.array(weights.scale, rows.dtype)


def _look_up(tokens: mx.array, table: Dense | Quantized) -> mx.array:
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
    logits = linear(rms_norm(x, weights.norm), weights.projection)
    if weights.scale != 1.0:
        logits = logits * weights.scale
    return cap(logits, weights.softcap)


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
        attention_within,
        glu,
        embed,
        head,
        attention_block,
        mlp_block,
        moe_block,
        log_softmax,
        argmax,
    )
}
