"""What the CPU kernels hold of our records: a layer, a step, a norm, made once and dropped with ours.

Knows the extension's constructors, and neither its ops nor whether it is here.
"""

import weakref
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_edge.ops.types import (
    AttentionWeights,
    HeadWeights,
    Linear,
    MLPWeights,
    MoEWeights,
    Norm,
    Packed,
    Rope,
    StepMeta,
)


class Records:
    """The kernels' records of ours, made at their first use and dropped with them."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Any, ...]] = {}

    def get(self, ours: Any, make: Callable[..., Any], *others: Any) -> Any:
        """`make(ours, *others)`, the same one again for the same records."""
        known = self._made.get(id(ours))
        if known is not None and all(a is b for a, b in zip(known[1:], others, strict=True)):
            return known[0]
        record = make(ours, *others)
        if known is None:
            weakref.finalize(ours, self._made.pop, id(ours), None)
        self._made[id(ours)] = (record, *others)
        return record


def make_norm(norm: Norm, ext: Any) -> Any:
    """The kernels' norm, in float32."""
    return ext.Norm(norm.weight.astype(mx.float32).tolist(), norm.eps)


def _norm_or_none(norm: Norm | None, ext: Any) -> Any:
    return None if norm is None else make_norm(norm, ext)


def _rope(rope: Rope, ext: Any) -> Any:
    axes = [axis for axis, run in enumerate(rope.sections) for _ in range(run)]
    return ext.Rope(rope.periods.tolist(), rope.dims, rope.is_interleaved, rope.magnitude, axes)


def make_attention_layer(weights: AttentionWeights, ext: Any, rope: Rope | None) -> Any:
    """The kernels' attention layer, of packed weights, and the rotation that goes with it."""
    return ext.AttentionLayer(
        norm=_norm_or_none(weights.norm, ext),
        q=handle_of(weights.q),
        k=handle_of(weights.k),
        v=handle_of(weights.v),
        o=handle_of(weights.o),
        num_heads=weights.num_heads,
        num_kv_heads=weights.num_kv_heads,
        head_dim=weights.head_dim,
        scale=weights.scale,
        q_norm=_norm_or_none(weights.q_norm, ext),
        k_norm=_norm_or_none(weights.k_norm, ext),
        rope=None if rope is None else _rope(rope, ext),
        window=weights.window or 0,
        post_norm=_norm_or_none(weights.post_norm, ext),
        residual_scale=weights.residual_scale,
        softcap=weights.softcap or 0.0,
        sinks=[] if weights.sinks is None else weights.sinks.astype(mx.float32).tolist(),
    )


def make_mlp_layer(weights: MLPWeights, ext: Any) -> Any:
    """The kernels' feed-forward layer, of packed weights."""
    return ext.MLPLayer(
        _norm_or_none(weights.norm, ext),
        handle_of(weights.gate),
        handle_of(weights.up),
        handle_of(weights.down),
        getattr(ext.Activation, weights.activation),
        _norm_or_none(weights.post_norm, ext),
        weights.residual_scale,
    )


def make_moe_layer(weights: MoEWeights, ext: Any) -> Any:
    """The kernels' layer of experts, of packed weights."""
    return ext.MoELayer(
        norm=_norm_or_none(weights.norm, ext),
        router=handle_of(weights.router),
        gate=handle_of(weights.gate),
        up=handle_of(weights.up),
        down=handle_of(weights.down),
        num_experts=weights.num_experts,
        top_k=weights.top_k,
        is_normalized=weights.is_normalized,
        activation=getattr(ext.Activation, weights.activation),
        post_norm=_norm_or_none(weights.post_norm, ext),
        residual_scale=weights.residual_scale,
    )


def make_head_layer(weights: HeadWeights, ext: Any) -> Any:
    """The kernels' norm and projection to logits."""
    return ext.HeadLayer(
        make_norm(weights.norm, ext),
        handle_of(weights.projection),
        weights.scale,
        weights.softcap or 0.0,
    )


def handle_of(weights: Linear) -> Any:
    """The kernels' own record of a packed weight."""
    assert isinstance(weights, Packed)
    return weights.handle


def make_step_record(meta: StepMeta, ext: Any) -> Any:
    """Where the rows of a step stand; `meta.axes` is computed by now, or is now."""
    turns = [] if meta.axes is None else meta.axes.reshape(-1).tolist()
    return ext.Step(
        list(meta.starts), list(meta.lengths), meta.width, meta.is_ragged, list(meta.shifts), turns
    )
