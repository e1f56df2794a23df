"""The KV cache of one layer: a body that nothing writes while it is read, and a short tail.

MLX holds an array that was an input until the step that read it is done, so writing into it before then would
copy all of it. A step therefore writes only the tail, the newest at most TAIL positions; a full tail is merged
into the body, and so is a long chunk of a prompt, when the next step begins and those in flight have ended.

The body is a ring when the cache has a window: a position's slot is its number modulo the ring's size, nothing
is ever moved, and the positions tell attention who sees whom. The first `keep` positions then stay apart and
are always seen. Knows no models; `prepare_step` must be called before each step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_edge.cache.rows import FloatRows, Planes, Row, RowFormat, join, make_room, take, write
from mlx_edge.cache.saved import PARTS, CacheFacts, CacheState
from mlx_edge.errors import InvalidRequestError
from mlx_edge.ops import Segment, StepMeta

TAIL = 32  # positions; a tail covers [n * TAIL, (n + 1) * TAIL)
GROWTH = 256  # positions; the capacity of a body without a window is a multiple of it


@dataclass(frozen=True)
class Chunk:
    """Rows of a long step, not yet merged: row b of the batch holds positions starts[b] to ends[b]."""

    planes: Planes
    starts: tuple[int, ...]
    ends: tuple[int, ...]


class KVCache:
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
        self.window = window
        self.keep = keep if window is not None else 0
        self.num_growths = 0  # how often the body was re-allocated because it was too short
        self._capacity = capacity
        # Rows stay floats until `float_until` positions are stored; then all take the format at once.
        self._wanted_format = row_format or FloatRows()
        self._float_until = float_until
        self.row_format: RowFormat = FloatRows() if float_until else self._wanted_format
        # Beside the window's past, as much as one merge may overwrite while older queries still run.
        self._ring = None if window is None else -(-(window - 1) // TAIL) * TAIL + TAIL
        self._offsets: tuple[int, ...] = ()  # positions stored, per row of the batch
        self._body: Planes = ()
        self._tail: Planes = ()
        self._prefix: Planes = ()
        self._chunk: Chunk | None = None

    @property
    def offset(self) -> int:
        """Positions stored, in the longest row."""
        return max(self._offsets, default=0)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Positions stored in each row of the batch; empty before the first step."""
        return self._offsets

    @property
    def arrays(self) -> list[mx.array]:
        """The arrays to evaluate after a step."""
        chunk = self._chunk.planes if self._chunk else ()
        return [*self._body, *self._tail, *self._prefix, *chunk]

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return sum(a.nbytes for a in self.arrays)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the positions held: what one step of attention reads."""
        per_position = sum(p.nbytes // (p.shape[1] * TAIL) for p in self._tail)
        limit = None if self._ring is None else self._ring + TAIL + self.keep
        held = (o if limit is None else min(o, limit) for o in self._offsets)
        return per_position * sum(held)

    def reserve(self, capacity: int) -> None:
        """Let the body hold `capacity` positions, as far as its window goes, when it is next allocated or grown."""
        self._capacity = max(self._capacity, capacity)

    def writes_body(self, num_new: int) -> bool:
        """Whether a step of `num_new` positions begins by writing the body."""
        is_long = num_new > TAIL
        return self._chunk is not None or (
            not is_long and any(_merged(o + num_new) > _merged(o) for o in self._offsets)
        )

    def extend(self, keys: mx.array, values: mx.array, meta: StepMeta) -> Sequence[Segment]:
        """Store keys and values (B, K, L, D) at the step's positions; return all segments to attend to.

        Raises: InvalidRequestError when the positions do not follow those stored.
        """
        offsets = self._offsets or (0,) * len(meta.starts)
        if meta.starts != offsets:
            raise InvalidRequestError(
                f"a step of rows from positions {meta.starts} does not follow the {offsets} that are stored"
            )
        self._offsets = offsets
        self._flush()
        self._convert()
        new = self.row_format.encode(mx.stack([keys, values]))
        if not self._tail:
            self._tail = make_room(new, TAIL)
            self._prefix = make_room(new, self.keep) if self.keep else ()
        ends = tuple(s + n for s, n in zip(meta.starts, meta.lengths, strict=True))
        chunk = Chunk(new, meta.starts, ends)
        self._store_prefix(chunk)
        self._offsets = ends
        if meta.width <= TAIL:
            self._store(chunk)
            return [*self._prefix_segments(), *self._stored_segments(ends)]
        self._chunk = chunk
        stored = self._stored_segments(meta.starts)
        return [*self._prefix_segments(), *stored, self._segment(new, meta.starts, ends)]

    def state(self) -> CacheState:
        """What is held, to be stored; the cache goes on as if nobody had asked. Waits for steps in flight."""
        mx.synchronize()  # a waiting chunk is merged now, as the next step would begin by doing
        self._flush()
        held = {"prefix": self._prefix, "body": self._body, "tail": self._tail}
        rows = tuple(
            {part: take(held[part], 0, n, row) for part, n in self.held_slots(offset).items() if n}
            for row, offset in enumerate(self._offsets)
        )
        is_float = self.row_format == FloatRows()
        facts = CacheFacts(
            self.window, self.keep, self._wanted_format, self._float_until, is_float, self._offsets
        )
        return CacheState(facts, rows)

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
        tail = next(planes for _, part, planes in state.planes() if part == "tail")
        like = tuple(mx.concatenate([p] * len(facts.offsets), axis=1) for p in tail)
        cache._tail = make_room(like, TAIL)
        cache._prefix = make_room(like, cache.keep) if cache.keep else ()
        if cache.offset > TAIL:
            cache._make_body(_merged(cache.offset))
        held = {"prefix": cache._prefix, "body": cache._body, "tail": cache._tail}
        for row, part, planes in state.planes():
            held[part] = write(held[part], planes, 0, row)
        cache._prefix, cache._body, cache._tail = (held[part] for part in PARTS)
        return cache

    def held_slots(self, offset: int) -> dict[str, int]:
        """How many slots each part has in use, in a row with `offset` positions stored."""
        merged = _merged(offset)
        body = merged if self._ring is None else min(merged, self._ring)
        return {"prefix": min(self.keep, offset), "body": body, "tail": offset - merged}

    def _flush(self) -> None:
        if self._chunk is not None:
            chunk, self._chunk = self._chunk, None
            self._store(chunk)

    def _convert(self) -> None:
        """Give all rows the wanted format, once enough of them are stored."""
        wanted = self._wanted_format
        if self.row_format == wanted or self.offset < self._float_until:
            return
        self.row_format = wanted
        self._body, self._tail, self._prefix = (
            wanted.encode(planes[0]) if planes else ()
            for planes in (self._body, self._tail, self._prefix)
        )

    def _store(self, chunk: Chunk) -> None:
        """Write a chunk into the tail, and what fills whole tails into the body."""
        for row, start, end in self._rows(chunk.starts, chunk.ends):
            if end == start:
                continue
            rows = take(chunk.planes, 0, end - start, row)
            if _merged(end) == _merged(start):
                self._tail = write(self._tail, rows, start - _merged(start), row)
            else:
                self._merge(rows, start, end, row)

    def _merge(self, rows: Planes, start: int, end: int, row: Row) -> None:
        """Move tail and rows into the body, up to the last whole tail; the rest is the new tail."""
        begin, middle = _merged(start), _merged(end)
        if start > begin:
            rows = join(take(self._tail, 0, start - begin, row), rows)
        first = begin if self._ring is None else max(begin, middle - self._ring)
        self._make_body(middle)
        self._write_body(take(rows, first - begin, middle - begin), first, row)
        self._tail = write(self._tail, take(rows, middle - begin, end - begin), 0, row)

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

    def _store_prefix(self, chunk: Chunk) -> None:
        for row, start, end in self._rows(chunk.starts, chunk.ends):
            if start < min(self.keep, end):
                rows = take(chunk.planes, 0, min(self.keep, end) - start, row)
                self._prefix = write(self._prefix, rows, start, row)

    def _rows(self, starts: tuple[int, ...], ends: tuple[int, ...]) -> list[tuple[Row, int, int]]:
        """What to write: the whole batch at once where all rows are alike."""
        spans = _distinct_spans(starts, ends)
        if len(spans) == 1:
            return [(None, *spans[0])]
        return [(row, start, end) for row, (start, end) in enumerate(spans)]

    def _prefix_segments(self) -> list[Segment]:
        ends = tuple(min(self.keep, end) for end in self._offsets)
        if max(ends) == 0:
            return []
        return [self._segment(self._prefix, (0,) * len(ends), ends, is_prefix=True)]

    def _stored_segments(self, ends: tuple[int, ...]) -> list[Segment]:
        """Body and tail, as far as they hold something, when `ends` positions are in them."""
        merged = tuple(_merged(end) for end in ends)
        segments = []
        if max(merged) > 0:
            segments.append(self._body_segment(merged))
        if max(ends) > 0:
            segments.append(self._segment(self._tail, merged, ends))
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
        length = max(e - s for s, e in zip(starts, ends, strict=True))
        slots = np.arange(length)
        rows = [
            np.where(slots < end - start, start + slots, -1)
            for start, end in _distinct_spans(starts, ends)
        ]
        return self._make_segment(take(planes, 0, length), np.stack(rows), is_prefix=is_prefix)

    def _body_segment(self, merged: tuple[int, ...]) -> Segment:
        ring = self._ring
        length = max(merged) if ring is None else min(ring, max(merged))
        slots = np.arange(length)
        rows = []
        for end in merged if len(set(merged)) > 1 else merged[:1]:
            # The newest position below `end` that has this slot.
            held = slots if ring is None else slots + (end - 1 - slots) // ring * ring
            rows.append(np.where(held < end, held, -1))
        return self._make_segment(take(self._body, 0, length), np.stack(rows), is_prefix=False)

    def _make_segment(
        self,
        planes: Planes,
        positions: np.ndarray[tuple[int, int], np.dtype[np.int64]],
        *,
        is_prefix: bool,
    ) -> Segment:
        if not is_prefix and self.keep:
            positions = np.where(positions < self.keep, -1, positions)
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


def _distinct_spans(starts: tuple[int, ...], ends: tuple[int, ...]) -> list[tuple[int, int]]:
    """The rows' spans; a single one where all are alike, since positions broadcast over the batch."""
    spans = list(zip(starts, ends, strict=True))
    return spans[:1] if len(set(spans)) == 1 else spans


def _merged(offset: int) -> int:
    """Positions that lie in the body once `offset` are stored; a full tail waits for the next step."""
    return max(0, offset - 1) // TAIL * TAIL


def prepare_step(caches: Sequence[KVCache], num_new: int) -> None:
    """Make the step's writes safe: wait for steps in flight when it will write a body.

    Called once per step, before any layer runs; a wait every TAIL positions when decoding. It waits for this
    thread's steps. Where another thread's still runs, MLX sees that the body is read and copies it: slower, not wrong.
    """
    if any(cache.writes_body(num_new) for cache in caches):
        mx.synchronize()
