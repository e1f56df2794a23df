"""A small layer of every kind that the kernels serve, made of random weights."""

from typing import Any

import mlx.core as mx

from mlx_edge import ops


def make_linear(rows: int, columns: int, *, bits: int = 4, group_size: int = 32) -> ops.Linear:
    """A weight (rows, columns) of the size that keeps activations near one; 0 bits is a float weight."""
    weight = mx.random.normal((rows, columns)) * columns**-0.5
    if bits == 0:
        return ops.Dense(weight)
    return ops.Quantized(
        *mx.quantize(weight, group_size=group_size, bits=bits), group_size=group_size, bits=bits
    )


def make_layer(
    *,
    hidden: int = 64,
    inner: int = 96,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    has_qk_norm: bool = False,
    window: int | None = None,
    bits: int = 4,
    **others: Any,
) -> tuple[ops.AttentionWeights, ops.MLPWeights, ops.Rope]:
    """Attention, feed-forward and rotation of one layer."""

    def norm(size: int) -> ops.Norm:
        return ops.Norm(1 + mx.random.normal((size,)) / 8, 1e-5)

    attention = ops.AttentionWeights(
        norm=norm(hidden),
        q=make_linear(heads * head_dim, hidden, bits=bits),
        k=make_linear(kv_heads * head_dim, hidden, bits=bits),
        v=make_linear(kv_heads * head_dim, hidden, bits=bits),
        o=make_linear(hidden, heads * head_dim, bits=bits),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        q_norm=norm(head_dim) if has_qk_norm else None,
        k_norm=norm(head_dim) if has_qk_norm else None,
        window=window,
        **others,
    )
    mlp = ops.MLPWeights(
        norm(hidden),
        make_linear(inner, hidden, bits=bits),
        make_linear(inner, hidden, bits=bits),
        make_linear(hidden, inner, bits=bits),
    )
    periods = 10000.0 ** (mx.arange(0, head_dim, 2) / head_dim)
    return attention, mlp, ops.Rope(periods, head_dim)
