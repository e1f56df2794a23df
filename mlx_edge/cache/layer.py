"""The KV cache of one layer: a body that nothing writes while it is read, and a short tail.

MLX holds an array that was an input until the step that read it is done, so writing into it before then would
copy all of it. A step therefore writes only the tail, which has room for a whole step beside what waits there; a
full tail is merged into the body, and so is a long chunk of a prompt, when the next step begins and those in flight
have ended. What a step brought can so be forgotten until then: rejected drafts never reach the body.

The body is a ring when the cache has a window: a position's slot is its number modulo the ring's size, nothing
is ever moved, and the positions tell attention who sees whom. The first `keep` positions then stay apart and
are always seen. Knows no models; `prepare_step` must be called before each step.
"""

from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING, Protocol

import mlx.core as mx

from mlx_edge.cache.lengths import TAIL, CacheLengths, each_row, merged
from mlx_edge.cache.quantized import QuantizedRows
from mlx_edge.cache.rows import Planes, Row, RowFormat, join, make_room, take, write
from mlx_edge.cache.saved import PARTS, CacheState
from mlx_edge.errors import InvalidRequestError
from mlx_edge.ops import Segment, StepMeta, StoredPlanes

if TYPE_CHECKING:  # slow to import, and not needed where the CPU kernels have the cache
    import numpy as np
    from numpy.typing import NDArray

GROWTH = 256  # positions; the capacity of a body without a window is a multiple of it


class BodyWriter(Protocol):
    """A cache whose steps may have to wait for those in flight."""

    @property
    def writes_body(self) -> bool:
        """Whether the next step begins by writing what steps in flight may read."""


class KVCache(CacheLengths):
    """Keys and values of one layer: all of them, or those in a window."""

    def __init__(
        self,
        *,
        capacity: int = 0,
        window: int | None = None,
        keep: int = 0,
        row_format: RowFormat | None = None,
        float_until: int = 0,
    ) -> None:
        """Room for `capacity` positions is allocated at once; `window` is how many a query sees, the first `keep`
        not counted; rows are floats until `float_until` positions are stored, then in `row_format`."""
        super().__init__(window=window, keep=keep, row_format=row_format, float_until=float_until)
        self.num_growths = 0  # how often the body was re-allocated because it was too short
        self._capacity = capacity
        # Beside the window's past, one tail: positions may be forgotten across a merge.
        self._ring = None if window is None else -(-(window - 1) // TAIL) * TAIL + TAIL
        # Per row of the batch: positions that lie in the body, before the tail's first.
        self._tail_starts: tuple[int, ...] = ()
        self._oldest: tuple[int, ...] = ()  # the first that the body still has: a ring overwrites
        self._body: Planes = ()
        self._tail: Planes = ()
        self._prefix: Planes = ()
        self._chunk: Planes = ()  # a long step's rows, not yet merged; the tail ends where they start
        self._chunk_starts: tuple[int, ...] = ()

    @property
    def arrays(self) -> list[mx.array]:
        """The arrays to evaluate after a step."""
        return [*self._body, *self._tail, *self._prefix, *self._chunk]

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return sum(a.nbytes for a in self.arrays)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the positions held: what one step of attention reads."""
        per_position = sum(p.nbytes // (p.shape[1] * p.shape[3]) for p in self._tail)
        limit = None if self._ring is None else self._ring + TAIL + self.keep
        held = (o if limit is None else min(o, limit) for o in self._offsets)
        return per_position * sum(held)

    @property
    def packing(self) -> tuple[int, int]:
        """Bits and group size of the rows that the next step stores; 0 and 0 for floats."""
        coming = self._wanted_format if self._is_due else self.row_format
        return (coming.bits, coming.group_size) if isinstance(coming, QuantizedRows) else (0, 0)

    def reserve(self, capacity: int) -> None:
        """Let the body hold `capacity` positions, as far as its window goes, when it is next allocated or grown."""
        self._capacity = max(self._capacity, capacity)

    @property
    def writes_body(self) -> bool:
        """Whether the next step begins by writing the body."""
        fills = (merged(o + 1) > s for o, s in zip(self._offsets, self._tail_starts, strict=True))
        return bool(self._chunk) or any(fills)

    def extend(self, keys: mx.array, values: mx.array, meta: StepMeta) -> Sequence[Segment]:
        """Store keys and values (B, K, L, D) at the step's positions; return all segments to attend to.

        Raises: InvalidRequestError when the positions do not follow those stored.
        """
        starts = self._open(meta)
        new = self.row_format.encode(mx.stack([keys, values]))
        self._make_tail(new, len(starts))
        self._offsets = tuple(s + n for s, n in zip(starts, meta.lengths, strict=True))
        self._write_prefix(new, starts)
        if meta.width > TAIL:
            self._chunk, self._chunk_starts = new, starts
            return [*self._stored_segments(starts), self._segment(new, starts, self._offsets)]
        for row, (begin, start, end) in each_row(self._tail_starts, starts, self._offsets):
            if end > start:
                self._tail = write(self._tail, take(new, 0, end - start, row), start - begin, row)
        return self._stored_segments(self._offsets)

    def open_step(self, like: mx.array, meta: StepMeta) -> StoredPlanes:
        """What is stored before a step of at most TAIL positions, whose rows are like `like` (B, K, L, D).

        For a kernel that reads the tail and makes the next one, which `close_step` takes: nothing that a step in flight
        reads is written.

        Raises: InvalidRequestError when the positions do not follow those stored.
        """
        starts = self._open(meta)
        if not self._tail:
            shape = (2, *like.shape[:2], 1, like.shape[3])
            self._make_tail(self.row_format.encode(mx.zeros(shape, like.dtype)), len(starts))
        bits, group_size = self.packing
        return StoredPlanes(
            self._body,
            self._tail,
            self._prefix,
            self._tail_starts,
            ring=self._ring or 0,
            window=self.window,
            keep=self.keep,
            bits=bits,
            group_size=group_size,
        )

    def close_step(self, tail: Planes, meta: StepMeta) -> None:
        """Take the tail that a step has made; its positions count as stored."""
        self._tail = tail
        self._offsets = tuple(s + n for s, n in zip(meta.starts, meta.lengths, strict=True))

    def trim(self, count: int | Sequence[int]) -> None:
        """Forget the newest `count` positions, or so many of each row: the cache is as if they had never come.

        Those of the newest step can always be forgotten, at most `num_trimmable`. A cache without a window goes back
        as far as one likes; one with a window by TAIL positions at least, unless a chunk has just overwritten them.

        Raises: InvalidRequestError for what cannot be forgotten; the cache stays as it was.
        """
        offsets = self._offsets_without(count)
        if any(o < s for o, s in zip(offsets, self._chunk_starts, strict=bool(self._chunk))):
            self._settle()
        self._check_trim(offsets)
        starts = tuple(min(s, merged(o)) for s, o in zip(self._tail_starts, offsets, strict=True))
        for row, (begin, end, held) in each_row(starts, offsets, self._tail_starts):
            if begin < min(held, end):
                slot = begin if self._ring is None else begin % self._ring
                self._tail = write(
                    self._tail, take(self._body, slot, slot + end - begin, row), 0, row
                )
        if starts != self._tail_starts:
            mx.eval(self._tail)  # else the next merge would find its body held, and copy it
        self._offsets, self._tail_starts = offsets, starts

    def fork(self, length: int | None = None) -> "KVCache":
        """A cache of the first `length` positions, of all when None: both go on as if the other were not there.

        Both `nbytes` count the arrays, which they share until one writes a body: then it copies it, once.

        Raises: InvalidRequestError for what `trim` could not go back to.
        """
        counts = self._counts_beyond(length)
        if self._chunk:
            self._settle()  # else each would merge it, into a body of its own
        twin = copy(self)
        twin.num_growths = 0
        twin.trim(counts)
        mx.eval(twin.arrays)
        return twin

    def state(self) -> CacheState:
        """What is held, to be stored; the cache goes on as if nobody had asked. Waits for steps in flight."""
        self._settle()
        held = {"prefix": self._prefix, "body": self._body, "tail": self._tail}
        rows = tuple(
            {part: take(held[part], 0, n, row) for part, n in self.held_slots(offset).items() if n}
            for row, offset in enumerate(self._offsets)
        )
        return CacheState(self._facts(), rows)

    @staticmethod
    def from_state(state: CacheState) -> "KVCache":
        """A cache that goes on where `state` was taken; its planes must have the shapes that `state` gives them."""
        facts = state.facts
        cache = KVCache(
            window=facts.window,
            keep=facts.keep,
            row_format=facts.row_format,
            float_until=facts.float_until,
        )
        cache.row_format, cache._offsets = facts.current_format, facts.offsets
        cache._tail_starts = tuple(map(merged, facts.offsets))
        # Of a ring only what is seen is sure to be in a state.
        cache._oldest = (0,) * len(facts.offsets) if cache.window is None else cache._tail_starts
        tail = next(planes for _, part, planes in state.planes() if part == "tail")
        like = tuple(mx.concatenate([p] * len(facts.offsets), axis=1) for p in tail)
        cache._tail = make_room(like, 2 * TAIL)
        cache._prefix = make_room(like, cache.keep) if cache.keep else ()
        if cache.offset > TAIL:
            cache._make_body(merged(cache.offset))
        held = {"prefix": cache._prefix, "body": cache._body, "tail": cache._tail}
        for row, part, planes in state.planes():
            held[part] = write(held[part], planes, 0, row)
        cache._prefix, cache._body, cache._tail = (held[part] for part in PARTS)
        return cache

    def held_slots(self, offset: int) -> dict[str, int]:
        """How many slots each part has in use, in a row with `offset` positions stored."""
        middle = merged(offset)
        body = middle if self._ring is None else min(middle, self._ring)
        return {"prefix": min(self.keep, offset), "body": body, "tail": offset - middle}

    def _check_trim(self, offsets: tuple[int, ...]) -> None:
        """Refuse what a ring no longer holds, and floats that are packed by now."""
        for start, oldest, offset in zip(self._tail_starts, self._oldest, offsets, strict=True):
            needed = 0 if self.window is None else max(0, offset - self.window + 1)
            if merged(offset) < start and oldest > min(needed, merged(offset)):
                raise InvalidRequestError(
                    f"a cache with a window of {self.window} cannot go back to position {offset}: "
                    f"it holds those from {oldest}; process the text anew"
                )
        self._check_format_at(offsets)

    def _settle(self) -> None:
        """Merge what can be merged, as the next step would begin by doing. Waits for steps in flight."""
        mx.synchronize()
        self._merge(tuple(map(merged, self._offsets)))

    def _open(self, meta: StepMeta) -> tuple[int, ...]:
        """Begin a step: merge what the one before left to merge. Returns where the step's rows start."""
        starts = self._starts_of(meta)
        if self.writes_body:
            lengths = zip(starts, meta.lengths, strict=True)
            self._merge(tuple(merged(start + min(length, 1)) for start, length in lengths))
        self._convert()
        return starts

    def _make_tail(self, like: Planes, batch_size: int) -> None:
        if self._tail:
            return
        self._tail = make_room(like, 2 * TAIL)
        self._prefix = make_room(like, self.keep) if self.keep else ()
        self._tail_starts = self._oldest = (0,) * batch_size

    def _convert(self) -> None:
        """Give all rows the wanted format, once enough of them are stored."""
        if not self._is_due:
            return
        wanted = self.row_format = self._wanted_format
        self._body, self._tail, self._prefix = (
            wanted.encode(planes[0]) if planes else ()
            for planes in (self._body, self._tail, self._prefix)
        )

    def _merge(self, middles: tuple[int, ...]) -> None:
        """Move positions before `middles` from tail and chunk into the body; the rest is the new tail."""
        tail_ends = self._chunk_starts if self._chunk else self._offsets
        spans = (self._tail_starts, middles, tail_ends, self._offsets)
        tail: Planes = ()  # a new one: the rows that stay are read from the old one, which is so held
        for row, (begin, middle, tail_end, end) in each_row(*spans):
            rows = take(self._tail, 0, tail_end - begin, row)
            if end > tail_end:
                rows = join(rows, take(self._chunk, 0, end - tail_end, row))
            if middle > begin:
                first = begin if self._ring is None else max(begin, middle - self._ring)
                self._make_body(middle)
                self._write_body(take(rows, first - begin, middle - begin), first, row)
            if end > middle:
                tail = tail or make_room(self._tail, 2 * TAIL)
                tail = write(tail, take(rows, middle - begin, end - begin), 0, row)
        self._tail = tail or self._tail
        if self._ring is not None:
            held = (middle - self._ring for middle in middles)
            self._oldest = tuple(map(max, self._oldest, held))
        self._tail_starts, self._chunk, self._chunk_starts = middles, (), ()

    def _make_body(self, length: int) -> None:
        """Allocate or grow the body so that `length` positions fit, or the ring's share of them."""
        held = self._body[0].shape[3] if self._body else 0
        if self._ring is not None:
            length = min(length, self._ring)
        if held >= length:
            return
        needed = -(-max(self._capacity, length, held + held // 2) // GROWTH) * GROWTH
        room = make_room(self._tail, needed if self._ring is None else min(needed, self._ring))
        self.num_growths += bool(self._body)
        self._body = write(room, self._body, 0) if self._body else room

    def _write_body(self, rows: Planes, position: int, row: Row) -> None:
        slot = position if self._ring is None else position % self._ring
        count = rows[0].shape[3]
        until_end = count if self._ring is None else min(count, self._ring - slot)
        self._body = write(self._body, take(rows, 0, until_end), slot, row)
        if until_end < count:
            self._body = write(self._body, take(rows, until_end, count), 0, row)

    def _write_prefix(self, new: Planes, starts: tuple[int, ...]) -> None:
        for row, (start, end) in each_row(starts, self._offsets):
            if start < min(self.keep, end):
                rows = take(new, 0, min(self.keep, end) - start, row)
                self._prefix = write(self._prefix, rows, start, row)

    def _prefix_segments(self) -> list[Segment]:
        ends = tuple(min(self.keep, end) for end in self._offsets)
        if max(ends) == 0:
            return []
        return [self._segment(self._prefix, (0,) * len(ends), ends, is_prefix=True)]

    def _stored_segments(self, tail_ends: tuple[int, ...]) -> list[Segment]:
        """Prefix, body and tail, as far as they hold something, the tail up to `tail_ends`."""
        segments = self._prefix_segments()
        if max(self._tail_starts) > 0:
            segments.append(self._body_segment())
        if max(e - s for s, e in zip(self._tail_starts, tail_ends, strict=True)) > 0:
            segments.append(self._segment(self._tail, self._tail_starts, tail_ends))
        return segments

    def _segment(
        self,
        planes: Planes,
        starts: tuple[int, ...],
        ends: tuple[int, ...],
        *,
        is_prefix: bool = False,
    ) -> Segment:
        """Planes whose slot i holds position starts[b] + i, up to ends[b]."""
        import numpy as np

        length = max(e - s for s, e in zip(starts, ends, strict=True))
        slots = np.arange(length)
        rows = [
            np.where(slots < end - start, start + slots, -1)
            for _, (start, end) in each_row(starts, ends)
        ]
        return self._make_segment(take(planes, 0, length), np.stack(rows), is_prefix=is_prefix)

    def _body_segment(self) -> Segment:
        import numpy as np

        ring = self._ring
        longest = max(self._tail_starts)
        length = longest if ring is None else min(ring, longest)
        slots = np.arange(length)
        rows = []
        for _, (end,) in each_row(self._tail_starts):
            # The newest position below `end` that has this slot.
            held = slots if ring is None else slots + (end - 1 - slots) // ring * ring
            rows.append(np.where(held < end, held, -1))
        return self._make_segment(take(self._body, 0, length), np.stack(rows), is_prefix=False)

    def _make_segment(
        self,
        planes: Planes,
        positions: "NDArray[np.int64]",
        *,
        is_prefix: bool,
    ) -> Segment:
        if not is_prefix and self.keep:
            positions[positions < self.keep] = -1
        is_held = positions >= 0
        keys, values = self.row_format.split(planes)
        return Segment(
            keys,
            values,
            mx.array(positions, dtype=mx.int32),
            first=int(positions[is_held].min(initial=1 << 30)),
            last=int(positions.max(initial=-1)),
            has_gaps=not is_held.all(),
            window=None if is_prefix else self.window,
        )


def prepare_step(caches: Sequence[BodyWriter]) -> None:
    """Make the step's writes safe: wait for steps in flight when it will write a body.

    Called once per step, before any layer runs; a wait every TAIL positions when decoding. It waits for this
    thread's steps. Where another thread's still runs, MLX sees that the body is read and copies it: slower, not wrong.
    """
    if any(cache.writes_body for cache in caches):
        mx.synchronize()
