"""The op set: all that a model may ask of the hardware, and the only door to it.

Two blocks per layer (`attention_block`, `mlp_block`) beside `embed` and `head`; each of their inner steps is
an op too. The signatures are final: three backends meet here. Which implementation runs is decided in
`select.py`, what is correct in `reference.py`; the records that they take are in `types.py`.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import mlx.core as mx

from mlx_edge.ops.cpu import explain, is_failure
from mlx_edge.ops.reference import watch_inputs
from mlx_edge.ops.select import (
    choose,
    observe,
    run,
    use,
    uses_cpu_kernels,
    uses_metal_kernels,
)
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
    PackedRows,
    PagedHandle,
    Precision,
    Quantized,
    RaggedKV,
    Rope,
    Segment,
    StepMeta,
    StoredPlanes,
    TailHandle,
)

__all__ = [
    "Activation",
    "AttentionWeights",
    "Dense",
    "Embedding",
    "HeadWeights",
    "KVHandle",
    "Linear",
    "MLPWeights",
    "MoEWeights",
    "Norm",
    "Packed",
    "PackedRows",
    "PagedHandle",
    "Precision",
    "Quantized",
    "RaggedKV",
    "Rope",
    "Segment",
    "StepMeta",
    "StoredPlanes",
    "TailHandle",
    "argmax",
    "attention",
    "attention_block",
    "attention_within",
    "choose",
    "embed",
    "explain",
    "glu",
    "head",
    "is_failure",
    "linear",
    "log_softmax",
    "mlp_block",
    "moe_block",
    "observe",
    "reference",
    "rms_norm",
    "rotate",
    "use",
    "uses_cpu_kernels",
    "uses_metal_kernels",
    "watch_inputs",
]


def reference() -> AbstractContextManager[None]:
    """Inside, every op is the plain MLX one: the only ones with gradients."""
    return use("reference")


def linear(x: mx.array, weights: Linear) -> mx.array:
    """x (..., E) to (..., N): x @ weight.T + bias."""
    y: mx.array = run("linear", x, weights)
    return y


def rms_norm(x: mx.array, norm: Norm) -> mx.array:
    """Root-mean-square norm over the last axis."""
    y: mx.array = run("rms_norm", x, norm)
    return y


def rotate(x: mx.array, rope: Rope, meta: StepMeta) -> mx.array:
    """Rotary position embedding of x (B, H, L, D)."""
    y: mx.array = run("rotate", x, rope, meta)
    return y


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
    """Softmax attention of q (B, H, L, D) over all segments together: (B, H, L, D)."""
    options = {"scale": scale, "window": window, "softcap": softcap, "sinks": sinks}
    y: mx.array = run("attention", q, segments, meta, **options)
    return y


def attention_within(
    q: mx.array, k: mx.array, v: mx.array, lengths: Sequence[int], *, scale: float
) -> mx.array:
    """Softmax attention of q over k and v (H, L, D), each run of `lengths` over itself, both ways: (H, L, D)."""
    y: mx.array = run("attention_within", q, k, v, lengths, scale=scale)
    return y


def glu(gate: mx.array, up: mx.array, activation: Activation) -> mx.array:
    """activation(gate) * up, elementwise."""
    y: mx.array = run("glu", gate, up, activation)
    return y


def embed(tokens: mx.array, weights: Embedding) -> mx.array:
    """Rows of the token table: int32 (B, L) to (B, L, E)."""
    y: mx.array = run("embed", tokens, weights)
    return y


def head(x: mx.array, weights: HeadWeights) -> mx.array:
    """Logits (B, L, V) of the hidden states x (B, L, E), the final norm included."""
    y: mx.array = run("head", x, weights)
    return y


def attention_block(
    x: mx.array,
    weights: AttentionWeights,
    kv: KVHandle | RaggedKV,
    rope: Rope | None,
    meta: StepMeta,
) -> mx.array:
    """One attention layer with its norm and residual: (B, L, E) to (B, L, E); stores the new positions in kv.

    In a ragged step (1, L, E): each sequence stores in its own of the caches in `kv`, and sees no other.
    """
    y: mx.array = run("attention_block", x, weights, kv, rope, meta)
    return y


def mlp_block(x: mx.array, weights: MLPWeights) -> mx.array:
    """One feed-forward layer with its norm and residual: (B, L, E) to (B, L, E)."""
    y: mx.array = run("mlp_block", x, weights)
    return y


def moe_block(x: mx.array, weights: MoEWeights) -> mx.array:
    """One mixture-of-experts layer with its norm and residual: (B, L, E) to (B, L, E)."""
    y: mx.array = run("moe_block", x, weights)
    return y


def log_softmax(x: mx.array) -> mx.array:
    """Log-probabilities of the logits x (..., V)."""
    y: mx.array = run("log_softmax", x)
    return y


def argmax(x: mx.array) -> mx.array:
    """Index of the largest of x (..., V), the first of equals: (...) int32."""
    y: mx.array = run("argmax", x)
    return y
