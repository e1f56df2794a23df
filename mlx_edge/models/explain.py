"""Which implementation serves each op of a model on this machine, and why those before it do not.

Asks `ops.choose` with what the model's own steps would bring, and computes nothing. Knows no backend by name.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_edge import ops
from mlx_edge.models.decoder import Decoder

if TYPE_CHECKING:  # it stands on numpy, which a model of text can do without
    from mlx_edge.models.vision.tower import VisionTower

ROWS = (1, 4, 32)  # a token, drafts to verify, a prompt
PATCHES = 256
Choice = tuple[str, str, str]  # op, layer, which implementation and why


def explain_kernels(model: Decoder, rows: Sequence[int] = ROWS) -> Iterator[str]:
    """Lines of text: for steps of so many rows, the choice for each op, layers with the same one together.

    Raises: HardwareNotSupportedError when a backend was asked for by name and cannot run an op.
    """
    for width in rows:
        yield f"steps of {width} row{'s' * (width > 1)}:"
        yield from _write(_choices(model, width))
    if model.vision is not None:
        yield f"an image of {PATCHES} patches:"
        yield from _write(_tower_choices(model.vision))


def _write(choices: Iterator[Choice]) -> Iterator[str]:
    for op, names, choice in _group(choices):
        where = f" of {names[0]}" if len(names) == 1 else f" of {names[0]} to {names[-1]}"
        yield f"  {op}{where if names[0] else ''}: {choice}"


def _choices(model: Decoder, width: int) -> Iterator[Choice]:
    """Op, layer and choice in the order in which a step computes them."""
    meta = ops.StepMeta.uniform(0, batch_size=1, width=width)
    tokens = mx.zeros((1, width), mx.int32)
    yield "embed", "", str(ops.choose("embed", tokens, model.embedding))
    x = mx.zeros((1, width, model.config.hidden_size), model.head.norm.weight.dtype)
    layers = list(zip(model.layers, model.make_cache(), strict=True))
    for index, (layer, kv) in enumerate(layers):
        choice = ops.choose("attention_block", x, layer.attention, kv, layer.rope, meta)
        yield "attention_block", f"layer {index}", str(choice)
    for index, (layer, _) in enumerate(layers):
        op = "moe_block" if isinstance(layer.mlp, ops.MoEWeights) else "mlp_block"
        yield op, f"layer {index}", str(ops.choose(op, x, layer.mlp))
    yield "head", "", str(ops.choose("head", x, model.head))


def _tower_choices(tower: "VisionTower") -> Iterator[Choice]:
    config = tower.config
    dtype = tower.blocks[0].norm.weight.dtype
    values = mx.zeros((PATCHES, config.patch_values), dtype)
    yield "linear", "the patches", str(ops.choose("linear", values, tower.patch_embedding))
    heads = mx.zeros((config.num_heads, PATCHES, config.head_dim), dtype)
    x = mx.zeros((1, PATCHES, config.hidden_size), dtype)
    for index, _ in enumerate(tower.blocks):
        choice = ops.choose("attention_within", heads, heads, heads, (PATCHES,), scale=1.0)
        yield "attention_within", f"block {index}", str(choice)
    for index, block in enumerate(tower.blocks):
        yield "mlp_block", f"block {index}", str(ops.choose("mlp_block", x, block.mlp))


def _group(choices: Iterator[Choice]) -> Iterator[tuple[str, list[str], str]]:
    for (op, choice), found in groupby(choices, lambda item: (item[0], item[2])):
        yield op, [layer for _, layer, _ in found], choice
