"""What the loops ask of a language model, whoever defined it: `Decoder`, or a model of mlx-lm behind the bridge.

The shapes of types, and steps of many sequences for models that can and for those that cannot take them together.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

import mlx.core as mx

from mlx_edge.cache import QuantizedRows, RowFormat
from mlx_edge.errors import InvalidRequestError
from mlx_edge.weights import LoadReport

if TYPE_CHECKING:  # it stands on numpy and the tower, which models of text can do without
    from mlx_edge.models.vision.prompt import ImagePrompt
    from mlx_edge.models.vision.tower import VisionTower


class LayerCache(Protocol):
    """What one layer remembers of a sequence."""

    @property
    def offset(self) -> int:
        """Positions stored."""

    @property
    def arrays(self) -> list[mx.array]:
        """The arrays to evaluate after a step."""

    @property
    def num_trimmable(self) -> int:
        """How many positions the next step may bring that `trim` could take back; 0 where it cannot."""

    @property
    def num_until_packed(self) -> int:
        """How many positions are still to be stored before rows are packed; 0 where there is no such moment ahead."""

    def reserve(self, capacity: int) -> None:
        """Room for `capacity` positions will be needed."""

    def trim(self, count: int) -> None:
        """Forget the newest `count` positions, as if they had never come.

        Raises: InvalidRequestError for more than can be forgotten.
        """

    def fork(self, length: int | None = None) -> Self:
        """A cache of the first `length` positions, of all when None; both go on by themselves.

        Raises: InvalidRequestError where the cache cannot be forked, or cannot go back so far.
        """


class ModelLimits(Protocol):
    """What a prompt must keep to."""

    @property
    def model_type(self) -> str:
        """The architecture's name in `config.json`."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""

    @property
    def context_size(self) -> int:
        """Positions that the model was made for."""


# A model takes back the caches that it made, and no others.
Cache = TypeVar("Cache", bound=LayerCache)


class LanguageModel(Protocol[Cache]):
    """Tokens in, logits out, with a cache per layer."""

    @property
    def config(self) -> ModelLimits:
        """The model's limits."""

    @property
    def load_report(self) -> LoadReport:
        """How the weights came here."""

    def __call__(
        self,
        tokens: mx.array,
        cache: Sequence[Cache] | None = None,
        *,
        logits_to_keep: int | None = None,
    ) -> mx.array:
        """Logits (B, L, V) of the int32 tokens (B, L) that follow what the cache holds; they are stored in it.

        `logits_to_keep` asks for those of the last columns alone.
        """

    def check_unchanged(self) -> None:
        """Raises ModelFormatError when a file was changed that weights are still read from."""

    def make_cache(
        self,
        capacity: int = 0,
        *,
        max_kv_size: int | None = None,
        row_format: RowFormat | None = None,
        float_until: int = 0,
    ) -> list[Cache]:
        """An empty cache; InvalidRequestError for an option that this model cannot serve."""


Cache_contra = TypeVar("Cache_contra", bound=LayerCache, contravariant=True)


class Forward(Protocol[Cache_contra]):
    """A step of one sequence: a model, or one that has been told of the sequence's images."""

    def __call__(
        self, tokens: mx.array, cache: Sequence[Cache_contra], *, logits_to_keep: int | None = None
    ) -> mx.array:
        """As `LanguageModel.__call__`."""


def find_tower(model: LanguageModel[Any]) -> "VisionTower | None":
    """What reads images; None for a model of text alone, and for another definition's."""
    return getattr(model, "vision", None)


def check_reads_images(model: LanguageModel[Any], has_images: bool) -> None:
    """Raise InvalidRequestError for images to a model that cannot see."""
    if has_images and find_tower(model) is None:
        raise InvalidRequestError(
            f"this model reads text only ({model.config.model_type}); leave the images out, "
            "or load a model with vision"
        )


def refuse_places(model: LanguageModel[Any], tokens: mx.array) -> None:
    """Raise InvalidRequestError for a prompt with a place for an image, where only text is read."""
    tower = find_tower(model)
    if tower is not None and (tokens == tower.config.image_token_id).any().item():
        raise InvalidRequestError(
            f"the prompt has a place for an image (token {tower.config.image_token_id}), and here is only text read; "
            "use generate or the engine"
        )


def tell_images(model: LanguageModel[Cache], images: "ImagePrompt | None") -> Forward[Cache]:
    """The model's step over a sequence with these images; the model itself where there are none.

    Raises: InvalidRequestError for images to a model that cannot see.
    """
    check_reads_images(model, images is not None)
    return model if images is None else partial(model, images=images)  # type: ignore[call-arg]


class CacheOptions(Protocol):
    """How keys and values are kept, in mlx-lm's words: a command's flags, or an engine's settings."""

    @property
    def max_kv_size(self) -> int | None:
        """Positions kept; None for all."""

    @property
    def kv_bits(self) -> int | None:
        """Of packed rows; None for floats."""

    @property
    def kv_group_size(self) -> int:
        """Elements of a packed row that share a scale."""

    @property
    def quantized_kv_start(self) -> int:
        """Positions that are stored as floats first."""


def make_cache_of(model: LanguageModel[Cache], options: CacheOptions) -> list[Cache]:
    """The empty cache that the options ask for; InvalidRequestError for one that the model cannot serve."""
    if options.kv_bits is None:
        return model.make_cache(max_kv_size=options.max_kv_size)
    return model.make_cache(
        max_kv_size=options.max_kv_size,
        row_format=QuantizedRows(options.kv_bits, options.kv_group_size),
        float_until=options.quantized_kv_start,
    )


def run_sequences(
    model: LanguageModel[Cache],
    tokens: mx.array,
    caches: Sequence[Sequence[Cache]],
    lengths: Sequence[int],
    logits_to_keep: Sequence[int],
    images: "Sequence[ImagePrompt | None]" = (),
) -> mx.array:
    """Logits (sum(logits_to_keep), V) of many sequences: as `Decoder.run_sequences`, for a model without it one by one.

    Sequence i brings `lengths[i]` of the int32 tokens (T,), which follow what `caches[i]` holds and are stored there;
    its last `logits_to_keep[i]` have logits; `images[i]` describes it, if there are images in it.

    Raises: InvalidRequestError for numbers that do not fit together, one cache for two sequences, or images to a
    model that cannot see.
    """
    check_reads_images(model, any(own is not None for own in images))
    together: Any = getattr(model, "run_sequences", None)
    if together is not None:
        told = {"images": images} if images else {}
        logits: mx.array = together(tokens, caches, lengths, logits_to_keep, **told)
        return logits
    find_kept_rows(tokens.size, caches, lengths, logits_to_keep)
    parts, begin = [], 0
    for cache, length, kept in zip(caches, lengths, logits_to_keep, strict=True):
        own = tokens[None, begin : begin + length]
        begin += length
        last = model(own, cache, logits_to_keep=max(1, kept))[0]
        parts.append(last[last.shape[0] - kept :])
    return mx.concatenate(parts)


def row_is_exact(model: LanguageModel[Cache]) -> str | None:
    """None when a row's bits never depend on the other rows of its step; else in words why they may."""
    if not hasattr(model, "row_exactness"):
        return (
            "a definition of mlx-lm computes each sequence by itself, "
            "with bits that depend on how many tokens it brings to a step"
        )
    reason: str | None = model.row_exactness
    return reason


def find_kept_rows(
    num_tokens: int,
    caches: Sequence[Sequence[LayerCache]],
    lengths: Sequence[int],
    logits_to_keep: Sequence[int],
) -> list[int]:
    """The rows of a step of many sequences that have logits: the last `logits_to_keep[i]` of each.

    Raises: InvalidRequestError for numbers that do not fit together, or one cache for two sequences.
    """
    if not 0 < len(caches) == len(lengths) == len(logits_to_keep):
        raise InvalidRequestError(
            f"a step of {len(caches)} caches, {len(lengths)} lengths and {len(logits_to_keep)} logits_to_keep; "
            "expected as many of each, and at least one"
        )
    if len({id(cache[0]) for cache in caches}) < len(caches):
        raise InvalidRequestError("one cache stands for two sequences of a step; fork it first")
    kept: list[int] = []
    end = 0
    for length, count in zip(lengths, logits_to_keep, strict=True):
        end += length
        if not 0 <= count <= length or length < 1:
            raise InvalidRequestError(
                f"a sequence of {length} tokens with logits of {count}; expected at least one token, and no more logits"
            )
        kept += range(end - count, end)
    if end != num_tokens:
        raise InvalidRequestError(f"{num_tokens} tokens for sequences of {end} together")
    return kept
