"""What the loop asks of a language model, whoever defined it: `Decoder`, or a model of mlx-lm behind the bridge.

Shapes of types alone; nothing here runs.
"""

from collections.abc import Sequence
from typing import Protocol, TypeVar

import mlx.core as mx

from mlx_edge.cache import RowFormat
from mlx_edge.weights import LoadReport


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

    def reserve(self, capacity: int) -> None:
        """Room for `capacity` positions will be needed."""

    def trim(self, count: int) -> None:
        """Forget the newest `count` positions, as if they had never come.

        Raises: InvalidRequestError for more than can be forgotten.
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
