"""THE decoder: every family of models is this loop over two blocks per layer.

Knows the order of the blocks and where the new tokens stand; all mathematics is in the ops, all names are in
`families.py`, how the weights got here is in `assembly.py`, what images do to a step in `vision/prompt.py`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_edge import ops
from mlx_edge.cache import MAX_HEAD_DIM, AnyKVCache, KVCache, PagedKVCache, RowFormat, prepare_step
from mlx_edge.errors import InvalidRequestError
from mlx_edge.models.config import ModelConfig
from mlx_edge.models.interface import check_reads_images, find_kept_rows
from mlx_edge.models.tensors import find_prefix, stored_name
from mlx_edge.ops import uses_cpu_kernels
from mlx_edge.ops.cpu import describe as describe_cpu
from mlx_edge.weights import Checkpoint, LoadReport

if TYPE_CHECKING:  # it stands on numpy, which a model of text can do without
    from mlx_edge.models.vision.prompt import ImagePrompt
    from mlx_edge.models.vision.tower import VisionTower

KEPT_PREFIX = 4  # positions that a cache of limited size never drops, as in mlx-lm


@dataclass(frozen=True)
class Layer:
    """The weights of one layer."""

    attention: ops.AttentionWeights
    mlp: ops.MLPWeights | ops.MoEWeights
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
    vision: "VisionTower | None" = None  # of a model that reads images

    def __call__(
        self,
        tokens: mx.array,
        cache: Sequence[AnyKVCache] | None = None,
        *,
        lengths: Sequence[int] | None = None,
        logits_to_keep: int | None = None,
        images: "ImagePrompt | None" = None,
    ) -> mx.array:
        """Logits (B, L, V) of the int32 tokens (B, L) that follow what the cache holds; they are stored in it.

        `lengths` says how many tokens of each row are real; the others are padding on the right, are not stored,
        and have logits without meaning. `logits_to_keep` asks for those of the last columns alone. `images` describes
        the whole sequence of a single row; every step of it needs them, also those behind the images.

        Raises: InvalidRequestError for images to a model of text alone, or to more rows than one, and for a step
        without them on a cache that holds some.
        """
        if cache is None:
            cache = self.make_cache()
        batch_size, width = tokens.shape
        starts = cache[0].offsets or (0,) * batch_size
        meta = ops.StepMeta(starts, tuple(lengths or (width,) * batch_size), width)
        if images is not None and batch_size > 1:
            raise InvalidRequestError(
                f"images for a batch of {batch_size} rows; give each sequence a cache of its own (run_sequences)"
            )
        self._check_images([images], [cache])
        prepare_step(cache)
        x, meta = self._begin(tokens, meta, [images])
        for layer, kv in zip(self.layers, cache, strict=True):
            x = ops.attention_block(x, layer.attention, kv, layer.rope, meta)
            x = feed_forward(x, layer.mlp)
        if logits_to_keep is not None and logits_to_keep < width:
            x = x[:, width - logits_to_keep :]
        return ops.head(x, self.head)

    def run_sequences(
        self,
        tokens: mx.array,
        caches: Sequence[Sequence[AnyKVCache]],
        lengths: Sequence[int],
        logits_to_keep: Sequence[int],
        images: "Sequence[ImagePrompt | None]" = (),
    ) -> mx.array:
        """Logits (sum(logits_to_keep), V) of many sequences in one pass, without padding.

        Sequence i brings `lengths[i]` of the int32 tokens (T,), which follow what `caches[i]` holds and are stored
        there; its last `logits_to_keep[i]` have logits; `images[i]` describes it, if there are images in it. Where
        `row_exactness` has no objection, a sequence's logits have the bits of `__call__` on it alone.

        Raises: InvalidRequestError for numbers that do not fit together, or one cache for two sequences, and for
        images as `__call__`.
        """
        kept = find_kept_rows(tokens.size, caches, lengths, logits_to_keep)
        seen = list(images) or [None] * len(caches)
        self._check_images(seen, caches)
        prepare_step([kv for cache in caches for kv in cache])
        meta = ops.StepMeta.ragged([cache[0].offset for cache in caches], lengths)
        x, meta = self._begin(tokens[None], meta, seen)
        for layer, *handles in zip(self.layers, *caches, strict=True):
            kv = ops.RaggedKV(tuple(handles))
            x = ops.attention_block(x, layer.attention, kv, layer.rope, meta)
            x = feed_forward(x, layer.mlp)
        if not kept:
            return mx.zeros((0, self.head.projection.shape[0]), x.dtype)
        if len(kept) < tokens.size:
            x = x[:, mx.array(kept)]
        return ops.head(x, self.head)[0]

    def _check_images(
        self, images: "Sequence[ImagePrompt | None]", caches: Sequence[Sequence[AnyKVCache]]
    ) -> None:
        """Refuse what would be computed wrongly: images that cannot be seen, and turns that nobody tells."""
        if len(images) != len(caches):
            raise InvalidRequestError(
                f"images of {len(images)} sequences for {len(caches)}; expected one entry for each, None without"
            )
        check_reads_images(self, any(own is not None for own in images))
        if any(own is None and kv[0].holds_images for own, kv in zip(images, caches, strict=True)):
            raise InvalidRequestError(
                "the cache holds images, and the step was told of none; give `images` with every step"
            )
        for own, (kv, *_) in zip(images, caches, strict=True):
            # One layer's cache remembers it for all. Positions that were given up may have been an image's.
            kv.first_image = own.spans[0].start if own is not None and own.spans else None

    def _begin(
        self, tokens: mx.array, meta: ops.StepMeta, images: "Sequence[ImagePrompt | None]"
    ) -> tuple[mx.array, ops.StepMeta]:
        """What goes into the first layer, and where the tokens stand."""
        x = ops.embed(tokens, self.embedding)
        if self.vision is None or not any(own is not None for own in images):
            return x, meta
        from mlx_edge.models.vision.prompt import show_images, turn_step

        return show_images(x, self.vision, meta, images), turn_step(meta, images)

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
            if isinstance(mlp, ops.MoEWeights):
                yield mlp.router
        yield self.head.projection

    def check_unchanged(self) -> None:
        """Raises ModelFormatError when a file was replaced or changed that weights are still read from."""
        self.checkpoint.check_unchanged()

    @property
    def _row_dtype(self) -> mx.Dtype:
        """In which the CPU kernels store keys and values: halves, but for a checkpoint of whole floats."""
        family = self.config.family
        prefix = find_prefix(self.checkpoint.names(), family.embedding)
        norm = self.checkpoint.entry(stored_name(f"{family.final_norm}.weight", prefix))
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


def feed_forward(x: mx.array, mlp: ops.MLPWeights | ops.MoEWeights) -> mx.array:
    """The second half of a layer: one network, or some of many."""
    if isinstance(mlp, ops.MoEWeights):
        return ops.moe_block(x, mlp)
    return ops.mlp_block(x, mlp)


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
