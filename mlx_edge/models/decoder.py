"""THE decoder: every family of models is this loop over two blocks per layer.

Knows the order of the blocks and where the new tokens stand; all mathematics is in the ops, all names are in
`families.py`, how the weights got here is in `assembly.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_edge import ops
from mlx_edge.cache import KVCache, prepare_step
from mlx_edge.models.config import ModelConfig
from mlx_edge.weights import Checkpoint, LoadReport


@dataclass(frozen=True)
class Layer:
    """The weights of one layer."""

    attention: ops.AttentionWeights
    mlp: ops.MLPWeights
    rope: ops.Rope | None


@dataclass(frozen=True)
class Decoder:
    """A loaded language model: tokens in, logits out. Immutable, so that threads may share it."""

    config: ModelConfig
    embedding: ops.Embedding
    layers: tuple[Layer, ...]
    head: ops.HeadWeights
    checkpoint: Checkpoint  # kept, because mapped weights are views of its files
    load_report: LoadReport  # how the weights came here

    def __call__(self, tokens: mx.array, cache: Sequence[KVCache] | None = None) -> mx.array:
        """Logits (B, L, V) of the int32 tokens (B, L) that follow what the cache holds; they are stored in it."""
        if cache is None:
            cache = self.make_cache()
        batch_size, width = tokens.shape
        prepare_step(cache, width)
        meta = ops.StepMeta.uniform(cache[0].offset, batch_size=batch_size, width=width)
        x = ops.embed(tokens, self.embedding)
        for layer, kv in zip(self.layers, cache, strict=True):
            x = ops.attention_block(x, layer.attention, kv, layer.rope, meta)
            x = ops.mlp_block(x, layer.mlp)
        return ops.head(x, self.head)

    def make_cache(self, capacity: int = 0) -> list[KVCache]:
        """An empty cache per layer, with room reserved for `capacity` positions."""
        return [KVCache(capacity=capacity) for _ in self.layers]
