"""The prefix cache: what was computed for a text, for the next one that begins like it.

An entry is a text's tokens and a fork of the caches that hold them. A new text gets a fork of the entry that shares
most of its beginning, cut to what is shared; its last token is always left to be processed, for its logits. Entries
give way by least recent use. Whatever is not found is explained. Knows no requests and no scheduling; files are
`prefix_disk.py`'s. To be used by the one thread that runs the model.
"""

import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, cast

from mlx_edge.cache import AnyKVCache
from mlx_edge.cache.lengths import TAIL
from mlx_edge.engine.prefix.disk import DiskStats, Place, PrefixDisk
from mlx_edge.engine.prefix.index import (
    MIN_TOKENS,
    TOKEN_BYTES,
    LostPrefixes,
    PrefixIndex,
    pack_tokens,
)
from mlx_edge.engine.prefix.search import Cache, Found, Search, first_clause
from mlx_edge.errors import InvalidRequestError

MIN_SAVED_TOKENS = 128  # shorter entries are computed about as fast as a file is read

_MAX_TRIES = 4  # forks of entries that share equally much; the shortest have moved on least


@dataclass(frozen=True)
class PrefixStats:
    """What is held, and what was done since the start; lookups are hits or misses."""

    entries: int
    nbytes: int  # pages that several entries share are counted for each
    limit_bytes: int
    hits: int
    misses: int
    hit_tokens: int
    evictions: int
    too_large: int  # not stored
    disk: DiskStats | None


@dataclass(eq=False)
class _Entry(Generic[Cache]):
    tokens: bytes
    kind: Hashable
    caches: list[Cache]
    place: Place | None  # on the disk
    was_saved: bool = False
    nbytes: int = 0
    used_s: float = field(default_factory=time.time)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) // TOKEN_BYTES


class PrefixCache(Generic[Cache]):
    """Entries in memory within `limit_bytes`, and in files if there is a disk tier.

    A `kind` is hashable and tells all that the caches' content depends on beside the tokens: model, row format,
    window. With a disk tier its repr must be alike in every process, and the caches those of the disk tier's model.
    """

    def __init__(self, limit_bytes: int, disk: PrefixDisk | None = None) -> None:
        self.limit_bytes = limit_bytes
        self._disk = disk
        self._indices: dict[Hashable, PrefixIndex[_Entry[Cache]]] = {}  # by kind
        self._entries: dict[_Entry[Cache], None] = {}  # the least recently used first
        self._nbytes = 0
        self._lost = LostPrefixes()
        self._saving: tuple[_Entry[Cache], Iterator[None]] | None = None  # by `save_some`
        self._hits = self._misses = self._hit_tokens = self._evictions = self._too_large = 0

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the entries hold, those on their way to the disk too.

        What entries share with one another, or with sequences that run, is counted for each: never too little.
        """
        return self._nbytes + (self._disk.pending_bytes if self._disk else 0)

    @property
    def stats(self) -> PrefixStats:
        """A snapshot; with a disk tier it lists the folder."""
        return PrefixStats(
            len(self._entries),
            self.nbytes,
            self.limit_bytes,
            self._hits,
            self._misses,
            self._hit_tokens,
            self._evictions,
            self._too_large,
            self._disk.stats if self._disk else None,
        )

    def lookup(
        self, tokens: Sequence[int], kind: Hashable, images: Sequence[range] = ()
    ) -> Found[Cache]:
        """The longest beginning of `tokens` that is stored, but for their last token.

        `images` are the places of images, which are found whole or not at all.
        What is on the disk alone is read now, by the thread that calls (`PrefixDisk.load`).
        """
        search: Search[Cache] = Search(pack_tokens(tokens), kind, len(tokens) - 1, images)
        if search.limit >= MIN_TOKENS:
            self._search_memory(search)
            if search.num_tokens < search.limit:
                self._search_disk(search)
        is_hit = search.caches is not None
        self._hits += is_hit
        self._misses += not is_hit
        self._hit_tokens += search.num_tokens
        miss = None if search.num_tokens == search.limit else self._explain(search)
        return Found(search.caches, search.num_tokens, miss)

    def store(self, tokens: Sequence[int], caches: Sequence[Cache], kind: Hashable) -> None:
        """Keep what `caches` hold of `tokens`, as a fork; the steps that brought them must have been evaluated.

        The same tokens again count as a use. A longer entry takes the place of those that it can serve for. Texts below
        MIN_TOKENS, entries larger than the limit and caches that cannot be forked are not stored.
        """
        packed = pack_tokens(tokens)
        if len(tokens) < MIN_TOKENS or self._is_served(packed, kind):
            return
        try:
            forks = [cache.fork(len(tokens)) for cache in caches]
        except InvalidRequestError as error:
            self._lost.remember(packed, kind, f"not kept: {first_clause(error)}")
            return
        self._keep(self._make_entry(packed, kind, forks))

    def evict(self, nbytes: int) -> int:
        """Free at least `nbytes` of entries if there are so many, the least recently used first; returns what it was.

        Nothing is written to the disk, which would need memory first: what is not there yet (`save_some`) is lost.
        """
        before = self._nbytes
        while self._entries and before - self._nbytes < nbytes:
            self._evict_one(to_disk=False)
        return before - self._nbytes

    def save_some(self) -> bool:
        """Have entries written that are not on the disk yet, those first that would be evicted first.

        A call reads out one layer of one entry: for when the thread has nothing else to do. False when all is done.
        """
        if self._saving is None:
            self._saving = self._begin_saving()
        if self._saving is None:
            return False
        for _ in self._saving[1]:
            return True
        self._saving = None
        return True

    def close(self, timeout_s: float = 30.0) -> None:
        """Have all entries written that are worth it, the latest used first, and wait for at most `timeout_s`."""
        if self._disk is None:
            return
        self._saving = None
        deadline = time.monotonic() + timeout_s
        for entry in reversed(self._entries):
            if time.monotonic() > deadline:
                break
            if self._should_save(entry) and not self._is_saved(entry):
                self._save(entry, wait_s=max(0.0, deadline - time.monotonic()))
        self._disk.close(max(0.0, deadline - time.monotonic()))
        for entry in self._entries:
            if entry.place is not None:
                self._disk.touch(entry.place, entry.used_s)

    def _search_memory(self, search: Search[Cache]) -> None:
        index = self._indices.get(search.kind)
        if index is None:
            return
        for common, alike in index.matches(search.tokens):
            if search.nearest is None:
                search.nearest = search.describe(common, alike[-1].num_tokens)
            if search.cut(common) < MIN_TOKENS:
                return
            for entry in alike[:_MAX_TRIES]:
                if search.try_fork(entry.caches, common):
                    self._use(entry)
                    return

    def _search_disk(self, search: Search[Cache]) -> None:
        if self._disk is None:
            return
        for common, stored in list(self._disk.find(search.tokens, search.kind)):
            length = search.cut(common)
            if length < search.num_tokens + MIN_TOKENS:
                return
            search.nearest = search.describe(common, stored.num_tokens)
            if stored.is_windowed and stored.num_tokens - length > TAIL:
                search.refuse(length, "on disk, with a window that has moved on")
                continue
            caches = cast("list[Cache] | None", self._disk.load(stored))
            if caches is None:
                search.refuse(length, "their file was broken or gone")
                continue
            entry = self._make_entry(stored.place.tokens, search.kind, caches)
            entry.was_saved = True
            self._keep(entry)
            if search.try_fork(entry.caches, common):
                return

    def _explain(self, search: Search[Cache]) -> str:
        """Why not more was found, in one line."""
        if search.limit < MIN_TOKENS:
            return f"the prompt has {search.limit + 1} tokens, prefixes below {MIN_TOKENS} are not stored"
        if self.limit_bytes == 0:
            return "the prefix cache is switched off (0 bytes)"
        if search.refusal:
            return search.refusal
        if search.shared > search.limit:
            return "the prompt ends in an image, which is read whole"
        if lost := self._lost.find(search.tokens, search.kind, search.num_tokens):
            return f"{lost[0]} tokens or more were computed before, but {lost[1]}"
        if elsewhere := self._find_elsewhere(search):
            return (
                f"{elsewhere} tokens are stored, but with other cache options or for another model"
            )
        if search.nearest is None:
            return "the prefix cache is empty" + (" for these options" if self._entries else "")
        return search.nearest

    def _find_elsewhere(self, search: Search[Cache]) -> int:
        """How many first tokens are stored in caches of another kind, if it is more than was found."""
        others = (index for kind, index in self._indices.items() if kind != search.kind)
        commons = (next(index.matches(search.tokens), (0,))[0] for index in others)
        longest = min(max(commons, default=0), search.limit)
        return longest if longest >= max(MIN_TOKENS, search.num_tokens + 1) else 0

    def _is_served(self, tokens: bytes, kind: Hashable) -> bool:
        """Whether an entry that is there already holds all of these tokens; that is then a use of it."""
        for common, alike in self._indices.get(kind, PrefixIndex()).matches(tokens):
            if common * TOKEN_BYTES < len(tokens):
                return False
            for entry in alike:
                if len(entry.tokens) == len(tokens) or _can_serve(entry, common):
                    self._use(entry)
                    return True
        return False

    def _drop_served_by(self, entry: _Entry[Cache]) -> None:
        index = self._indices.get(entry.kind)
        for other in index.prefixes_of(entry.tokens) if index else ():
            if other.tokens == entry.tokens or _can_serve(entry, other.num_tokens):
                self._remove(other)

    def _make_entry(self, tokens: bytes, kind: Hashable, caches: list[Cache]) -> _Entry[Cache]:
        place = self._disk.place(tokens, kind) if self._disk else None
        entry = _Entry(tokens, kind, caches, place)
        entry.nbytes = len(tokens) + sum(cache.nbytes for cache in caches)
        return entry

    def _keep(self, entry: _Entry[Cache]) -> None:
        if entry.nbytes > self.limit_bytes:
            self._too_large += 1
            reason = f"take {entry.nbytes} bytes, the prefix cache has {self.limit_bytes}"
            self._lost.remember(entry.tokens, entry.kind, reason)
            return
        self._drop_served_by(entry)
        while self._nbytes + entry.nbytes > self.limit_bytes:
            self._evict_one(to_disk=True)
        self._indices.setdefault(entry.kind, PrefixIndex()).add(entry.tokens, entry)
        self._entries[entry] = None
        self._nbytes += entry.nbytes

    def _use(self, entry: _Entry[Cache]) -> None:
        entry.used_s = time.time()
        self._entries[entry] = self._entries.pop(entry)

    def _evict_one(self, *, to_disk: bool) -> None:
        entry = next(iter(self._entries))
        if to_disk and self._should_save(entry) and not self._is_saved(entry):
            self._save(entry, wait_s=0)
        self._lost.remember(entry.tokens, entry.kind, "were evicted")
        self._evictions += 1
        self._remove(entry)

    def _remove(self, entry: _Entry[Cache]) -> None:
        del self._entries[entry]
        if self._saving is not None and self._saving[0] is entry:
            self._saving = None
        self._nbytes -= entry.nbytes
        index = self._indices[entry.kind]
        index.remove(entry.tokens)
        if not index:
            del self._indices[entry.kind]

    def _should_save(self, entry: _Entry[Cache]) -> bool:
        return self._disk is not None and entry.num_tokens >= MIN_SAVED_TOKENS

    def _begin_saving(self) -> tuple[_Entry[Cache], Iterator[None]] | None:
        for entry in self._entries:
            if self._should_save(entry) and not entry.was_saved:
                assert self._disk is not None
                assert entry.place is not None
                caches = cast("list[AnyKVCache]", entry.caches)
                if self._disk.has_room(caches):
                    entry.was_saved = True
                    return entry, self._disk.save_by_layers(entry.place, caches, entry.used_s)
        return None

    def _is_saved(self, entry: _Entry[Cache]) -> bool:
        return self._disk is not None and entry.place is not None and self._disk.holds(entry.place)

    def _save(self, entry: _Entry[Cache], *, wait_s: float) -> bool:
        assert self._disk is not None
        assert entry.place is not None
        caches = cast("list[AnyKVCache]", entry.caches)
        entry.was_saved = self._disk.save(entry.place, caches, entry.used_s, wait_s=wait_s)
        return entry.was_saved


def _can_serve(entry: _Entry[Cache], length: int) -> bool:
    """Whether whatever an entry of the first `length` tokens serves for, this longer one does too."""
    if any(cache.window is not None for cache in entry.caches):
        return False
    try:  # without windows the layers are alike
        entry.caches[0].fork(length)
    except InvalidRequestError:
        return False
    return True
