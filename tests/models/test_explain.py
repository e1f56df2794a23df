"""What serves each op, in words."""

import pytest

import mlx_edge
from mlx_edge import ops
from mlx_edge.models.explain import explain_kernels
from mlx_edge.ops import metal


def test_the_reference_explains_itself() -> None:
    with ops.use("reference"):
        model, _ = mlx_edge.load()
        lines = list(explain_kernels(model, rows=(1, 2)))
    assert lines[0] == "steps of 1 row:"
    assert lines[1] == "  embed: embed runs on reference"
    assert lines[2] == "  attention_block of layer 0 to layer 3: attention_block runs on reference"
    assert len(lines) == 10


def test_the_metal_kernels_name_their_launches() -> None:
    if metal.missing_for_emulator():
        pytest.skip(f"no emulated GPU: {metal.missing_for_emulator()}")
    with ops.use("emulated"):
        model, _ = mlx_edge.load()
        lines = list(explain_kernels(model, rows=(1, 8, 32)))
    text = "\n".join(lines)
    assert (
        "runs on emulated (qmv_norm, attn_decode, then attn_combine beyond 256 positions, qmv_res)"
        in text
    )
    assert "runs on emulated (qmv_glu, qmv_res)" in text
    assert (
        "32 rows; more than 16 are left to MLX's own kernels; mlp_block runs on reference" in text
    )


def test_a_tower_is_explained_beside_the_text() -> None:
    model, _ = mlx_edge.load("pocket-vision")
    with ops.use("reference"):
        lines = list(explain_kernels(model, rows=(1,)))
    assert lines[-4:] == [
        "an image of 256 patches:",
        "  linear of the patches: linear runs on reference",
        "  attention_within of block 0 to block 3: attention_within runs on reference",
        "  mlp_block of block 0 to block 3: mlp_block runs on reference",
    ]
