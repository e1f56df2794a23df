"""Which stored texts begin like a new one, and which did once: token prefixes, without what is stored for them.

Tokens are kept as big-endian bytes: their order is that of the tokens, and so the texts that begin most like a new
one are its neighbours in a sorted list. Knows no caches and no files.
"""

import hashlib
from bisect import bisect_left, bisect_right, insort
from collections.abc import Hashable, Iterator, Sequence
from typing import Generic, TypeVar

import numpy as np

Entry = TypeVar("Entry")

TOKEN_BYTES = 4
MIN_TOKENS = 32  # shorter prefixes are processed as fast as they are found
_FIRST_COMPARED = 1024  # tokens; then twice as many each time


def pack_tokens(tokens: Sequence[int]) -> bytes:
    """The tokens as big-endian int32."""
    return np.asarray(tokens, dtype=">i4").tobytes()


def count_common(first: bytes, second: bytes) -> int:
    """With how many equal tokens two texts begin."""
    # Equal bytes are equal tokens in any byte order.
    left, right = np.frombuffer(first, np.uint32), np.frombuffer(second, np.uint32)
    length = min(left.size, right.size)
    begin, end = 0, _FIRST_COMPARED
    while begin < length:
        end = min(end, length)
        differs = left[begin:end] != right[begin:end]
        if differs.any():
            return begin + int(differs.argmax())
        begin, end = end, 2 * end
    return length


class PrefixIndex(Generic[Entry]):
    """Entries by their tokens, each text once; found by what they have in common with another text."""

    def __init__(self) -> None:
        self._texts: list[bytes] = []  # sorted
        self._entries: dict[bytes, Entry] = {}

    def __len__(self) -> int:
        return len(self._texts)

    def get(self, tokens: bytes) -> Entry | None:
        """The entry of exactly these tokens."""
        return self._entries.get(tokens)

    def add(self, tokens: bytes, entry: Entry) -> None:
        """Put an entry there, in place of one of the same tokens."""
        if tokens not in self._entries:
            insort(self._texts, tokens)
        self._entries[tokens] = entry

    def remove(self, tokens: bytes) -> None:
        """Take an entry away."""
        del self._entries[tokens]
        del self._texts[bisect_left(self._texts, tokens)]

    def matches(self, tokens: bytes) -> Iterator[tuple[int, list[Entry]]]:
        """How many first tokens are in common, and the entries of which that is so, the shortest first.

        Begins with those that have most in common. Of entries with nothing in common only the nearest are told.
        """
        middle = bisect_left(self._texts, tokens)
        before = self._walk(tokens, range(middle - 1, -1, -1))
        after = self._walk(tokens, range(middle, len(self._texts)))
        left, right = next(before, None), next(after, None)
        while left or right:
            common = max(side[0] for side in (left, right) if side)
            alike = []
            while left and left[0] == common:
                alike.append(left[1])
                left = next(before, None)
            while right and right[0] == common:
                alike.append(right[1])
                right = next(after, None)
            yield common, [self._entries[text] for text in sorted(alike, key=len)]

    def prefixes_of(self, tokens: bytes) -> list[Entry]:
        """The entries with which `tokens` begin, one of the same tokens too."""
        places = range(bisect_right(self._texts, tokens) - 1, -1, -1)
        near = [text for _, text in self._walk(tokens, places) if tokens.startswith(text)]
        return [self._entries[text] for text in reversed(near)]

    def _walk(self, tokens: bytes, places: range) -> Iterator[tuple[int, bytes]]:
        """The texts there, until one has nothing in common. What is in common never grows on the way."""
        common, shared = len(tokens) // TOKEN_BYTES, tokens
        for place in places:
            text = self._texts[place]
            if not text.startswith(shared):
                common = count_common(tokens, text)
                shared = tokens[: common * TOKEN_BYTES]
            yield common, text
            if not common:
                return


class LostPrefixes:
    """Which prefixes were stored once, and why they are not any more: blocks of tokens, by their hashes."""

    def __init__(self, max_blocks: int = 1 << 14) -> None:
        """Of more than `max_blocks` blocks of MIN_TOKENS tokens the oldest are forgotten."""
        self._max_blocks = max_blocks
        self._reasons: dict[bytes, str] = {}

    def remember(self, tokens: bytes, kind: Hashable, reason: str) -> None:
        """These tokens are not stored any more."""
        for _, digest in _hash_blocks(tokens, kind):
            self._reasons.pop(digest, None)
            self._reasons[digest] = reason
            if len(self._reasons) > self._max_blocks:
                del self._reasons[next(iter(self._reasons))]

    def find(self, tokens: bytes, kind: Hashable, above: int) -> tuple[int, str] | None:
        """How many first tokens, more than `above`, were stored once, and why they are not any more."""
        if not self._reasons:
            return None
        found = None
        for length, digest in _hash_blocks(tokens, kind):
            if length > above and digest in self._reasons:
                found = length, self._reasons[digest]
        return found


def _hash_blocks(tokens: bytes, kind: Hashable) -> Iterator[tuple[int, bytes]]:
    """For every whole block the number of tokens up to its end, and their hash."""
    digest = hashlib.blake2b(str(hash(kind)).encode(), digest_size=8)
    step = MIN_TOKENS * TOKEN_BYTES
    for end in range(step, len(tokens) + 1, step):
        digest.update(tokens[end - step : end])
        yield end // TOKEN_BYTES, digest.copy().digest()
