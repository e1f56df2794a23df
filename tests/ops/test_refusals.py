"""What a backend does not serve it refuses in words: a field that only some families have is never passed over."""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest

from mlx_edge import ops
from mlx_edge.cache import KVCache
from mlx_edge.ops import cpu, metal
from tests.metal.layers import make_layer, make_linear

X = mx.zeros((1, 2, 64))
WIDE = ops.Norm(mx.ones((256,)), 1e-5)


def refuse_attention(**fields: Any) -> str | None:
    attention, _, rope = make_layer()
    step = ops.StepMeta.uniform(0, batch_size=1, width=2)
    return metal.refuse_attention_block(X, replace(attention, **fields), KVCache(), rope, step)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"softcap": 50.0}, "scores capped at 50"),
        ({"q_norm": WIDE}, "a norm over all heads together"),
        ({"k_norm": WIDE}, "one over each, of 64, is served"),
    ],
)
def test_metal_refuses_what_its_attention_has_not(fields: dict[str, Any], said: str) -> None:
    assert said in str(refuse_attention(**fields))


def test_metal_serves_the_rest() -> None:
    post = ops.Norm(mx.ones((64,)), 1e-5)
    assert refuse_attention(norm=None, post_norm=post, residual_scale=0.5) is None
    assert refuse_attention(sinks=mx.zeros((4,))) is None


def test_metal_refuses_another_activation() -> None:
    _, mlp, _ = make_layer()
    refuse = metal.OPS["mlp_block"][1]
    assert refuse(X, mlp) is None
    said = refuse(X, replace(mlp, activation="swiglu_oai"))
    assert said == "the activation swiglu_oai; served are silu and gelu_tanh"


def test_metal_leaves_images_experts_and_runs_to_mlx() -> None:
    attention, _, rope = make_layer()
    step = replace(
        ops.StepMeta.uniform(0, batch_size=1, width=2), axes=mx.zeros((3, 1, 2), mx.int32)
    )
    assert "images" in str(metal.leave("attention_block", (X, attention, KVCache(), rope, step)))
    for op in ("moe_block", "attention_within", "embed"):
        assert metal.leave(op, (X,)) == "it is left to MLX's own kernels"


needs_cpu = pytest.mark.skipif(
    not ops.uses_cpu_kernels(), reason="the CPU kernels are not here or not asked for"
)


@needs_cpu
def test_cpu_refuses_runs_that_it_has_no_room_for() -> None:
    refuse = cpu.OPS["attention_within"][1]
    rows = mx.zeros((2, 5, 64))
    assert refuse(rows, rows, rows, (5,), scale=1.0) is None
    half = rows.astype(mx.float16)
    assert refuse(half, half, half, (5,), scale=1.0) == "activations are not float32"
    wide = mx.zeros((2, 5, 257))
    assert "at most 256" in str(refuse(wide, wide, wide, (5,), scale=1.0))
    for lengths in ((4,), (4, 2), (5, 0), (-1, 6)):
        with pytest.raises(ValueError, match="lengths"):
            cpu.attention_within(rows, rows, rows, lengths, scale=1.0)


@needs_cpu
def test_cpu_refuses_packed_experts_that_begin_inside_a_block() -> None:
    from mlx_edge.models.packing import pack_weight

    router, floats = make_linear(3, 64, bits=0), make_linear(3 * 64, 40, bits=0)
    gate, up = make_linear(3 * 40, 64), make_linear(3 * 40, 64)
    weights = ops.MoEWeights(
        ops.Norm(mx.ones((64,)), 1e-5),
        *(pack_weight(w) for w in (router, gate, up, floats)),  # type: ignore[arg-type]
        num_experts=3,
        top_k=2,
    )
    choice = ops.choose("moe_block", X, weights)
    assert choice.backend.name == "reference"
    assert "packed experts of 40 rows; multiples of 16 are served" in str(choice)
    assert ops.moe_block(X, weights).shape == X.shape
