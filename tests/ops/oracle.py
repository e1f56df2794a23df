"""The ops in float64 numpy over dequantized weights: what every implementation is measured against."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_edge import ops


def small_floats(exponent_bits: int, mantissa_bits: int) -> np.ndarray:
    """Every value of a sign, exponent, mantissa format without infinities, by code (OCP MX 1.0)."""
    codes = np.arange(1 << (1 + exponent_bits + mantissa_bits))
    mantissa = (codes & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    exponent = (codes >> mantissa_bits) & ((1 << exponent_bits) - 1)
    bias = (1 << (exponent_bits - 1)) - 1
    magnitude = np.where(
        exponent > 0, (1 + mantissa) * 2.0 ** (exponent - bias), mantissa * 2.0 ** (1 - bias)
    )
    return np.where(codes >> (exponent_bits + mantissa_bits), -magnitude, magnitude)


E2M1 = small_floats(2, 1)
E4M3 = small_floats(4, 3)
E8M0 = 2.0 ** (np.arange(256) - 127.0)


def f64(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def matrix(weights: ops.Linear) -> np.ndarray:
    """The weight that is meant, (N, E), unpacked here from its bits and not by MLX."""
    if isinstance(weights, ops.Packed):
        return matrix(weights.restore())
    if isinstance(weights, ops.Dense):
        return f64(weights.weight)
    packs = np.array(weights.weight).astype("<u4")
    bits = np.unpackbits(packs.view(np.uint8), axis=-1, bitorder="little")
    digits = bits.reshape(packs.shape[0], -1, weights.bits)
    codes = (digits * (1 << np.arange(weights.bits))).sum(-1)
    grouped = codes.reshape(packs.shape[0], -1, weights.group_size)
    if weights.mode != "affine":
        elements = E4M3 if weights.bits == 8 else E2M1
        scales = E4M3 if weights.mode == "nvfp4" else E8M0
        scaled = elements[grouped] * scales[np.array(weights.scales)][..., None]
        return scaled.reshape(packs.shape[0], -1)
    assert weights.offsets is not None
    scaled = grouped * f64(weights.scales)[..., None] + f64(weights.offsets)[..., None]
    return scaled.reshape(packs.shape[0], -1)


def linear(x: np.ndarray, weights: ops.Linear) -> np.ndarray:
    if isinstance(weights, ops.Packed):
        weights = weights.restore()
    y = x @ matrix(weights).T
    return y if weights.bias is None else y + f64(weights.bias)


def rms_norm(x: np.ndarray, norm: ops.Norm) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + norm.eps) * f64(norm.weight)


def rotate(x: np.ndarray, rope: ops.Rope, positions: np.ndarray) -> np.ndarray:
    """x (B, H, L, D); positions (B, L), or (3, B, L) on three axes."""
    if positions.ndim == 3:
        axes = np.repeat(np.arange(len(rope.sections) or 1), rope.sections or (rope.dims // 2,))
        turns = positions[axes].transpose(1, 2, 0)  # (B, L, dims / 2)
    else:
        turns = positions[..., None]
    angle = turns[:, None] / f64(rope.periods)
    turned = x.copy()
    half = rope.dims // 2
    if rope.is_interleaved:
        first, second = np.arange(0, rope.dims, 2), np.arange(1, rope.dims, 2)
    else:
        first, second = np.arange(half), np.arange(half, rope.dims)
    a, b = x[..., first], x[..., second]
    turned[..., first] = (a * np.cos(angle) - b * np.sin(angle)) * rope.magnitude
    turned[..., second] = (a * np.sin(angle) + b * np.cos(angle)) * rope.magnitude
    return turned


def attention(
    q: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    query_positions: np.ndarray,
    key_positions: np.ndarray,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    sinks: np.ndarray | None = None,
) -> np.ndarray:
    """q (B, H, L, D), keys and values (B, K, S, D), positions (B, L) and (B, S)."""
    group = q.shape[1] // keys.shape[1]
    keys, values = (np.repeat(a, group, axis=1) for a in (keys, values))
    scores = np.einsum("bhld,bhsd->bhls", q, keys) * scale
    scores = cap(scores, softcap)
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    seen = (distance >= 0) & (key_positions[:, None, :] >= 0)
    if window is not None:
        seen &= distance < window
    scores = np.where(seen[:, None], scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    if sinks is not None:
        sinks = np.broadcast_to(sinks[None, :, None, None], top.shape)
        top = np.maximum(top, sinks)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0))
    total = weights.sum(-1, keepdims=True)
    total = total if sinks is None else total + np.exp(sinks - top)
    return np.einsum("bhls,bhsd->bhld", weights / np.where(total > 0, total, 1), values)


def cap(scores: np.ndarray, softcap: float | None) -> np.ndarray:
    return scores if softcap is None else softcap * np.tanh(scores / softcap)


def attention_within(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, lengths: Sequence[int], scale: float
) -> np.ndarray:
    """q, k, v (H, L, D), run by run."""
    runs = []
    for end, length in zip(np.cumsum(lengths), lengths, strict=True):
        own = slice(end - length, end)
        scores = np.einsum("hld,hsd->hls", q[:, own], k[:, own]) * scale
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        runs.append(weights / weights.sum(-1, keepdims=True) @ v[:, own])
    return np.concatenate(runs, axis=1)


def glu(gate: np.ndarray, up: np.ndarray, activation: str) -> np.ndarray:
    if activation == "silu":
        return gate / (1 + np.exp(-gate)) * up
    if activation == "swiglu_oai":
        gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
        return gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
    inner = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
    return 0.5 * gate * (1 + np.tanh(inner)) * up


def heads(x: np.ndarray, head_dim: int) -> np.ndarray:
    return x.reshape(*x.shape[:2], -1, head_dim).transpose(0, 2, 1, 3)


def attention_block(
    x: np.ndarray,
    weights: ops.AttentionWeights,
    rope: ops.Rope | None,
    past: tuple[np.ndarray, np.ndarray] | None,
    turns: np.ndarray | None = None,
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """The block on x (B, L, E) after `past` keys and values; returns them with the new ones. RoPE turns to the
    positions, or to `turns` (B, L) or (3, B, L)."""
    h = x if weights.norm is None else rms_norm(x, weights.norm)
    q, k, v = (linear(h, w) for w in (weights.q, weights.k, weights.v))
    q, k, v = (
        _normed_heads(y, norm, weights.head_dim)
        for y, norm in ((q, weights.q_norm), (k, weights.k_norm), (v, None))
    )
    start = 0 if past is None else past[0].shape[2]
    positions = np.broadcast_to(np.arange(start, start + x.shape[1]), x.shape[:2])
    if rope is not None:
        turns = positions if turns is None else turns
        q, k = rotate(q, rope, turns), rotate(k, rope, turns)
    if past is not None:
        k, v = (np.concatenate([old, new], axis=2) for old, new in zip(past, (k, v), strict=True))
    stored = np.broadcast_to(np.arange(k.shape[2]), (x.shape[0], k.shape[2]))
    sinks = None if weights.sinks is None else f64(weights.sinks)
    rule = (weights.scale, weights.window, weights.softcap, sinks)
    y = attention(q, k, v, positions, stored, *rule)
    y = linear(y.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1), weights.o)
    return _ended(x, y, weights), (k, v)


def _normed_heads(y: np.ndarray, norm: ops.Norm | None, head_dim: int) -> np.ndarray:
    if norm is None:
        return heads(y, head_dim)
    if norm.weight.size == head_dim:
        return rms_norm(heads(y, head_dim), norm)
    return heads(rms_norm(y, norm), head_dim)


def _ended(
    x: np.ndarray, y: np.ndarray, weights: ops.AttentionWeights | ops.MLPWeights | ops.MoEWeights
) -> np.ndarray:
    y = y if weights.post_norm is None else rms_norm(y, weights.post_norm)
    return x + weights.residual_scale * y


def mlp_block(x: np.ndarray, weights: ops.MLPWeights) -> np.ndarray:
    h = x if weights.norm is None else rms_norm(x, weights.norm)
    h = glu(linear(h, weights.gate), linear(h, weights.up), weights.activation)
    return _ended(x, linear(h, weights.down), weights)


def _experts(weights: ops.Linear, num_experts: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each expert's matrix and bias."""
    if isinstance(weights, ops.Packed):
        weights = weights.restore()
    rows = weights.shape[0]
    bias = np.zeros(rows) if weights.bias is None else f64(weights.bias)
    return list(
        zip(np.split(matrix(weights), num_experts), np.split(bias, num_experts), strict=True)
    )


def moe_block(x: np.ndarray, weights: ops.MoEWeights) -> np.ndarray:
    """Every row goes through every expert; those that were not chosen have no share."""
    h = x if weights.norm is None else rms_norm(x, weights.norm)
    scores = linear(h, weights.router)
    order = np.argsort(-scores, axis=-1, kind="stable")
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    chosen = np.zeros_like(shares)
    np.put_along_axis(chosen, order[..., : weights.top_k], 1.0, axis=-1)
    total = (shares * chosen if weights.is_normalized else shares).sum(-1, keepdims=True)
    shares = shares * chosen / total
    y = np.zeros_like(x)
    parts = (_experts(w, weights.num_experts) for w in (weights.gate, weights.up, weights.down))
    for index, (gate, up, down) in enumerate(zip(*parts, strict=True)):
        inner = glu(h @ gate[0].T + gate[1], h @ up[0].T + up[1], weights.activation)
        y += shares[..., index : index + 1] * (inner @ down[0].T + down[1])
    return _ended(x, y, weights)


def embed(tokens: np.ndarray, weights: ops.Embedding) -> np.ndarray:
    return matrix(weights.table)[tokens] * weights.scale


def head(x: np.ndarray, weights: ops.HeadWeights) -> np.ndarray:
    logits = linear(rms_norm(x, weights.norm), weights.projection) * weights.scale
    return cap(logits, weights.softcap)
