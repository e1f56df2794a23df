"""A model of which one layer at a time is in memory, in float32: for calibration and for measures of damage.

A text goes through it layer by layer, all rows through the first, then all through the second: what must be held is a
layer and the hidden states. Quantized weights are taken for the values that they stand for. Computes with the reference
ops, so that everything can be watched and differentiated; no cache, no generation.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from mlx_edge import ops
from mlx_edge.models.assembly import Assembler
from mlx_edge.models.config import ModelConfig
from mlx_edge.models.decoder import Layer, feed_forward
from mlx_edge.models.linears import find_linears, replace_linears
from mlx_edge.models.tensors import find_prefix, stored_name
from mlx_edge.quant import dequantize
from mlx_edge.runtime import connect_blas
from mlx_edge.weights import Checkpoint

BLOCK_TOKENS = 2048  # that go through a layer at once
Watcher = Callable[[str, mx.array], None]  # name of a linear, and the x (..., E) that meets it


@dataclass(frozen=True)
class _Text:
    """A KV handle for a text that comes in one piece: what comes is all there is."""

    def extend(self, keys: mx.array, values: mx.array, meta: ops.StepMeta) -> Sequence[ops.Segment]:
        return [ops.Segment(keys, values, meta.positions[:1], 0, meta.width - 1)]


class LayerwiseModel:
    """The embedding, the layers and the head of a checkpoint, each read when it is asked for."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig) -> None:
        """Reads nothing yet; `checkpoint` must stay open."""
        connect_blas()
        self.checkpoint = checkpoint
        self.config = config

    @property
    def num_layers(self) -> int:
        """Layers, those of the embedding and the head not counted."""
        return self.config.num_layers

    def _assembler(self) -> Assembler:
        return Assembler(self.checkpoint, self.config, lambda x: x.astype(mx.float32))

    def read_layer(self, index: int) -> Layer:
        """One layer in float32, every linear dense."""
        layer = self._assembler().layer(index)
        dense = {name: as_dense(linear) for name, linear in self.find_linears(layer, index).items()}
        return replace_linears(layer, self.config, index, dense)

    def find_linears(self, layer: Layer, index: int) -> dict[str, ops.Linear]:
        """The linears of a layer by name, in the order of their use."""
        return find_linears(layer, self.config, index)

    @property
    def is_tied(self) -> bool:
        """Whether the token table is the head, too."""
        if self.config.is_tied is not None:
            return self.config.is_tied
        family, names = self.config.family, self.checkpoint.names()
        head = stored_name(family.head, find_prefix(names, family.embedding))
        return f"{head}.weight" not in names

    def read_table(self) -> ops.Dense:
        """The token table (V, E) in float32."""
        return as_dense(self._assembler().embedding().table)

    def embed(self, rows: mx.array) -> mx.array:
        """Hidden states (R, L, E) float32 of token rows (R, L)."""
        hidden = embed_with(self.read_table(), rows, self.config)
        mx.eval(hidden)
        return hidden

    def run_layer(
        self, layer: Layer, index: int, hidden: mx.array, watch: Watcher | None = None
    ) -> mx.array:
        """Hidden states (R, L, E) after the layer; `watch` sees what goes into each of its linears."""
        if watch is None:
            return self._run_blocks(layer, hidden)
        names = {id(linear): name for name, linear in self.find_linears(layer, index).items()}
        with ops.watch_inputs(lambda linear, x: watch(names[id(linear)], x)):
            return self._run_blocks(layer, hidden)

    def _run_blocks(self, layer: Layer, hidden: mx.array) -> mx.array:
        rows = max(1, BLOCK_TOKENS // hidden.shape[1])
        blocks = []
        for start in range(0, hidden.shape[0], rows):
            blocks.append(forward_layer(layer, hidden[start : start + rows]))
            mx.eval(blocks[-1])
        return mx.concatenate(blocks)

    def read_head(self) -> ops.HeadWeights:
        """The final norm and the head in float32, dense."""
        assembler = self._assembler()
        head = assembler.head(assembler.embedding())
        return replace(head, projection=as_dense(head.projection))

    def logits(self, hidden: mx.array) -> Iterator[mx.array]:
        """Logits (r, L, V) float32 of the last layer's hidden states (R, L, E), some rows at a time, in order."""
        head = self.read_head()
        elements = hidden.shape[1] * self.config.vocab_size
        rows = max(1, (1 << 25) // elements)
        for start in range(0, hidden.shape[0], rows):
            with ops.reference():
                yield ops.head(hidden[start : start + rows], head)

    def run(self, rows: mx.array, on_layer: Callable[[int], Any] = lambda _index: None) -> mx.array:
        """The last layer's hidden states (R, L, E) of token rows (R, L); `on_layer` hears of each that is done."""
        hidden = self.embed(rows)
        for index in range(self.num_layers):
            hidden = self.run_layer(self.read_layer(index), index, hidden)
            on_layer(index)
        return hidden


def embed_with(table: ops.Linear, rows: mx.array, config: ModelConfig) -> mx.array:
    """Hidden states (R, L, E) of token rows (R, L) in a token table (V, E). Differentiable."""
    with ops.reference():
        return ops.embed(rows, ops.Embedding(table, config.scales.embedding))


def forward_layer(layer: Layer, hidden: mx.array) -> mx.array:
    """Hidden states (R, L, E) after one layer, for rows that each begin a text. Differentiable."""
    meta = ops.StepMeta.uniform(0, batch_size=hidden.shape[0], width=hidden.shape[1])
    with ops.reference():
        hidden = ops.attention_block(hidden, layer.attention, _Text(), layer.rope, meta)
        return feed_forward(hidden, layer.mlp)


def as_dense(linear: ops.Linear) -> ops.Dense:
    """The float32 values of a weight."""
    if isinstance(linear, ops.Packed):
        linear = linear.restore()
    if isinstance(linear, ops.Quantized):
        return ops.Dense(dequantize(linear), linear.bias, linear.input_scale)
    return linear
