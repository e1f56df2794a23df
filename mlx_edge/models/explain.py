"""Which implementation serves each op of a model on this machine, and why those before it do not.

Asks `ops.choose` with what the model's own steps would bring, and computes nothing. Knows no backend by name.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

import mlx.core as mx

from mlx_edge import ops
from mlx_edge.models.decoder import Decoder

ROWS = (1, 4, 32)  # a token, drafts to verify, a prompt


def explain_kernels(model: Decoder, rows: Sequence[int] = ROWS) -> Iterator[str]:
    """Lines of text: for steps of so many rows, the choice for each op, layers with the same one together.

    Raises: HardwareNotSupportedError when a backend was asked for by name and cannot run an op.
    """
    for width in rows:
        yield f"steps of {width} row{'s' * (width > 1)}:"
        for op, names, choice in _group(_choices(model, width)):
            where = f" of {names[0]}" if len(names) == 1 else f" of {names[0]} to {names[-1]}"
            yield f"  {op}{where if names[0] else ''}: {choice}"


def _choices(model: Decoder, width: int) -> Iterator[tuple[str, str, str]]:
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


def _group(choices: Iterator[tuple[str, str, str]]) -> Iterator[tuple[str, list[str], str]]:
    for (op, choice), found in groupby(choices, lambda item: (item[0], item[2])):
        yield op, [layer for _, layer, _ in found], choice
