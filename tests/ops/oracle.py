"""The ops in float64 numpy over dequantized weights: what every implementation is measured against."""

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
    """x (B, H, L, D), positions (B, L)."""
    angle = positions[:, None, :, None] / f64(rope.periods)
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
) -> np.ndarray:
    """q (B, H, L, D), keys and values (B, K, S, D), positions (B, L) and (B, S)."""
    group = q.shape[1] // keys.shape[1]
    keys, values = (np.repeat(a, group, axis=1) for a in (keys, values))
    scores = np.einsum("bhld,bhsd->bhls", q, keys) * scale
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    seen = (distance >= 0) & (key_positions[:, None, :] >= 0)
    if window is not None:
        seen &= distance < window
    scores = np.where(seen[:, None], scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0))
    total = weights.sum(-1, keepdims=True)
    return np.einsum("bhls,bhsd->bhld", weights / np.where(total > 0, total, 1), values)


def glu(gate: np.ndarray, up: np.ndarray, activation: str) -> np.ndarray:
    if activation == "silu":
        return gate / (1 + np.exp(-gate)) * up
    inner = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
    return 0.5 * gate * (1 + np.tanh(inner)) * up


def heads(x: np.ndarray, head_dim: int) -> np.ndarray:
    return x.reshape(*x.shape[:2], -1, head_dim).transpose(0, 2, 1, 3)


def attention_block(
    x: np.ndarray,
    weights: ops.AttentionWeights,
    rope: ops.Rope | None,
    past: tuple[np.ndarray, np.ndarray] | None,
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """The block on x (B, L, E) after `past` keys and values; returns them with the new ones."""
    h = rms_norm(x, weights.norm)
    q, k, v = (heads(linear(h, w), weights.head_dim) for w in (weights.q, weights.k, weights.v))
    if weights.q_norm is not None:
        q = rms_norm(q, weights.q_norm)
    if weights.k_norm is not None:
        k = rms_norm(k, weights.k_norm)
    start = 0 if past is None else past[0].shape[2]
    positions = np.broadcast_to(np.arange(start, start + x.shape[1]), x.shape[:2])
    if rope is not None:
        q, k = rotate(q, rope, positions), rotate(k, rope, positions)
    if past is not None:
        k, v = (np.concatenate([old, new], axis=2) for old, new in zip(past, (k, v), strict=True))
    stored = np.broadcast_to(np.arange(k.shape[2]), (x.shape[0], k.shape[2]))
    y = attention(q, k, v, positions, stored, weights.scale, weights.window)
    return x + linear(y.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1), weights.o), (k, v)


def mlp_block(x: np.ndarray, weights: ops.MLPWeights) -> np.ndarray:
    h = rms_norm(x, weights.norm)
    h = glu(linear(h, weights.gate), linear(h, weights.up), weights.activation)
    return x + linear(h, weights.down)


def embed(tokens: np.ndarray, weights: ops.Embedding) -> np.ndarray:
    return matrix(weights.table)[tokens]


def head(x: np.ndarray, weights: ops.HeadWeights) -> np.ndarray:
    return linear(rms_norm(x, weights.norm), weights.projection)
