"""THE decoder: every family of models is this loop over two blocks per layer.

Knows the order of the blocks and where the new tokens stand; all mathematics is in the ops, all names are in
`families.py`, how the weights got here is in `assembly.py`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import mlx.core as mx

from mlx_edge import ops
from mlx_edge.cache import MAX_HEAD_DIM, AnyKVCache, KVCache, PagedKVCache, RowFormat, prepare_step
from mlx_edge.errors import InvalidRequestError
from mlx_edge.models.config import ModelConfig
from mlx_edge.models.interface import find_kept_rows
from mlx_edge.ops import uses_cpu_kernels
from mlx_edge.ops.cpu import describe as describe_cpu
from mlx_edge.weights import Checkpoint, LoadReport

KEPT_PREFIX = 4  # positions that a cache of limited size never drops, as in mlx-lm


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

    def __call__(
        self,
        tokens: mx.array,
        cache: Sequence[AnyKVCache] | None = None,
        *,
        lengths: Sequence[int] | None = None,
        logits_to_keep: int | None = None,
    ) -> mx.array:
        """Logits (B, L, V) of the int32 tokens (B, L) that follow what the cache holds; they are stored in it.

        `lengths` says how many tokens of each row are real; the others are padding on the right, are not stored,
        and have logits without meaning. `logits_to_keep` asks for those of the last columns alone.
        """
        if cache is None:
            cache = self.make_cache()
        batch_size, width = tokens.shape
        prepare_step(cache)
        starts = cache[0].offsets or (0,) * batch_size
        meta = ops.StepMeta(starts, tuple(lengths or (width,) * batch_size), width)
        x = ops.embed(tokens, self.embedding)
        for layer, kv in zip(self.layers, cache, strict=True):
            x = ops.attention_block(x, layer.attention, kv, layer.rope, meta)
            x = ops.mlp_block(x, layer.mlp)
        if logits_to_keep is not None and logits_to_keep < width:
            x = x[:, width - logits_to_keep :]
        return ops.head(x, self.head)

    def run_sequences(
        self,
        tokens: mx.array,
        caches: Sequence[Sequence[AnyKVCache]],
        lengths: Sequence[int],
        logits_to_keep: Sequence[int],
    ) -> mx.array:
        """Logits (sum(logits_to_keep), V) of many sequences in one pass, without padding.

        Sequence i brings `lengths[i]` of the int32 tokens (T,), which follow what `caches[i]` holds and are stored
        there; its last `logits_to_keep[i]` have logits. Where `row_exactness` has no objection, a sequence's logits
        have the bits of `__call__` on it alone.

        Raises: InvalidRequestError for numbers that do not fit together, or one cache for two sequences.
        """
        kept = find_kept_rows(tokens.size, caches, lengths, logits_to_keep)
        prepare_step([kv for cache in caches for kv in cache])
        meta = ops.StepMeta.ragged([cache[0].offset for cache in caches], lengths)
        x = ops.embed(tokens[None], self.embedding)
        for layer, *handles in zip(self.layers, *caches, strict=True):
            kv = ops.RaggedKV(tuple(handles))
            x = ops.attention_block(x, layer.attention, kv, layer.rope, meta)
            x = ops.mlp_block(x, layer.mlp)
        if not kept:
            return mx.zeros((0, self.head.projection.shape[0]), x.dtype)
        if len(kept) < tokens.size:
            x = x[:, mx.array(kept)]
        return ops.head(x, self.head)[0]

    @property
    def row_exactness(self) -> str | None:
        """Why the bits of a token's logits may depend on the other tokens of its step; None when they never do."""
        if ops.uses_metal_kernels():
            return "steps of more than 16 tokens are left to MLX's own kernels, whose bits depend on how many there are"
        if not uses_cpu_kernels():
            return "MLX's own kernels compute it, whose bits depend on how many tokens a step has"
        if not all(isinstance(weight, ops.Packed) for weight in self._linears()):
            return "some weights are left to MLX's own kernels, whose bits depend on how many tokens a step has"
        if any(layer.attention.head_dim > MAX_HEAD_DIM for layer in self.layers):
            return f"heads larger than {MAX_HEAD_DIM} are left to MLX's own kernels"
        return None

    def _linears(self) -> Iterator[ops.Linear]:
        for layer in self.layers:
            attention, mlp = layer.attention, layer.mlp
            yield from (attention.q, attention.k, attention.v, attention.o)
            yield from (mlp.gate, mlp.up, mlp.down)
        yield self.head.projection

    def check_unchanged(self) -> None:
        """Raises ModelFormatError when a file was replaced or changed that weights are still read from."""
        self.checkpoint.check_unchanged()

    @property
    def _row_dtype(self) -> mx.Dtype:
        """In which the CPU kernels store keys and values: halves, but for a checkpoint of whole floats."""
        norm = self.checkpoint.entry(f"{self.config.family.final_norm}.weight")
        return mx.float32 if norm.dtype == "F32" else mx.float16

    def make_cache(
        self,
        capacity: int = 0,
        *,
        max_kv_size: int | None = None,
        row_format: RowFormat | None = None,
        float_until: int = 0,
    ) -> list[AnyKVCache]:
        """An empty cache per layer, with room reserved for `capacity` positions.

        A layer that sees a window keeps no more than that. `max_kv_size` limits the others too: to the first
        KEPT_PREFIX positions and the newest. `row_format` is how rows are stored once there are `float_until` of them.

        Raises: InvalidRequestError when `max_kv_size` leaves no room beside the kept prefix.
        """
        limit = None if max_kv_size is None else max_kv_size - KEPT_PREFIX
        if limit is not None and limit < 1:
            raise InvalidRequestError(
                f"max_kv_size is {max_kv_size}, expected more than the {KEPT_PREFIX} positions always kept"
            )

        def make(layer: ops.AttentionWeights) -> AnyKVCache:
            window = layer.window
            is_limited = limit is not None and (window is None or window > limit)
            options: dict[str, Any] = {
                "window": limit if is_limited else window,
                "keep": KEPT_PREFIX if is_limited else 0,
                "row_format": row_format,
                "float_until": float_until,
            }
            if (
                isinstance(layer.k, ops.Packed)
                and uses_cpu_kernels()
                and layer.head_dim <= MAX_HEAD_DIM
            ):
                return PagedKVCache(dtype=self._row_dtype, **options)
            return KVCache(capacity=capacity, **options)

        return [make(layer.attention) for layer in self.layers]


def describe_kernels(model: Decoder) -> str:
    """What computes this model, in words."""
    if ops.uses_metal_kernels():
        return "Metal kernels for up to 16 rows, MLX's own for more"
    packed = [weight for weight in find_weights(model) if isinstance(weight, ops.Packed)]
    if not packed or not uses_cpu_kernels():
        return "plain MLX ops"
    parts = [f"CPU kernels ({describe_cpu()})"]
    for precision in sorted({weight.precision for weight in packed if weight.is_quantized}):
        parts.append(f"{precision} activations for quantized weights")
    caches = {cache.dtype for cache in model.make_cache() if isinstance(cache, PagedKVCache)}
    parts += [f"keys and values in {str(dtype).removeprefix('mlx.core.')}" for dtype in caches]
    return ", ".join(parts)


def find_arrays(part: object) -> Iterator[mx.array]:
    """Every array of a model, or of a part of one, in the order of its records."""
    return (found for found in find_weights(part) if isinstance(found, mx.array))


def find_weights(part: object) -> Iterator[mx.array | ops.Packed]:
    """Every array and every packed weight of a model, or of a part of one, in the order of its records."""
    if isinstance(part, mx.array | ops.Packed):
        yield part
    elif isinstance(part, tuple):
        for item in part:
            yield from find_weights(item)
    elif is_dataclass(part):
        for field in fields(part):
            yield from find_weights(getattr(part, field.name))
