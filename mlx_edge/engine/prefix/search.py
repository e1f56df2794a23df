"""One lookup in the prefix cache: what was found so far, and why it is not more. Knows no entries and no files."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

from mlx_edge.errors import InvalidRequestError

SWITCHED_OFF = "the request does not use the prefix cache"


class ForkableCache(Protocol):
    """What one layer remembers of a sequence."""

    @property
    def window(self) -> int | None:
        """How many positions a query sees; None for all."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""

    @property
    def stored_bytes(self) -> int:
        """Bytes of the positions held."""

    def fork(self, length: int | None = None) -> Self:
        """A cache of the first `length` positions that goes on by itself.

        Raises: InvalidRequestError where they are not held any more.
        """


Cache = TypeVar("Cache", bound=ForkableCache)


@dataclass(frozen=True)
class Found(Generic[Cache]):
    """Caches, one per layer, that hold the first `num_tokens` tokens, to go on with; None when there are none.

    `miss` says why it is not more; None when only the last token is left to be processed.
    """

    caches: list[Cache] | None
    num_tokens: int
    miss: str | None


@dataclass
class Search(Generic[Cache]):
    """What a lookup has come to so far."""

    tokens: bytes
    kind: Hashable
    limit: int  # tokens that may be found
    images: Sequence[range] = ()  # tokens that are found together or not at all
    caches: list[Cache] | None = None
    num_tokens: int = 0
    refusal: str | None = None  # why an entry that shares more cannot serve
    nearest: str | None = None  # why the entry that shares most does not share more
    shared: int = 0  # tokens that it shares

    def cut(self, common: int) -> int:
        """How many of the first `common` tokens may be taken: an image only whole, as its numbers tell it only then."""
        length = min(common, self.limit)
        inside = (image.start for image in self.images if image.start < length < image.stop)
        return next(inside, length)

    def describe(self, common: int, num_tokens: int) -> str:
        """Why an entry of `num_tokens` tokens, of which `common` are shared, is of no more use."""
        said, self.shared = describe_nearest(common, num_tokens), max(common, self.shared)
        for number, image in enumerate(self.images, start=1):
            if image.start <= common < image.stop:
                said += f", {'where' if common == image.start else 'within'} image {number}"
                said += " begins" * (common == image.start)
        return said

    def try_fork(self, caches: Sequence[Cache], common: int) -> bool:
        """Take what an entry shares, if it still can be had."""
        length = self.cut(common)
        try:
            self.caches = [cache.fork(length) for cache in caches]
        except InvalidRequestError as error:
            self.refuse(length, first_clause(error))
            return False
        self.num_tokens = length
        return True

    def refuse(self, length: int, why: str) -> None:
        """An entry with so many tokens cannot serve; the first one is that which shares most."""
        self.refusal = self.refusal or f"{length} tokens are stored, but {why}"


def describe_nearest(common: int, num_tokens: int) -> str:
    """Why an entry of `num_tokens` tokens, of which `common` are shared, is of no more use."""
    if common == 0:
        return "no entry begins like this"
    if common == num_tokens:
        return f"the nearest entry ends after {common} tokens"
    return f"the nearest entry differs after {common} tokens"


def first_clause(error: InvalidRequestError) -> str:
    """What was found, without what to do."""
    return str(error).split(";")[0]
