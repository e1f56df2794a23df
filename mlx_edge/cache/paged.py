"""The KV cache of one layer where the CPU kernels run: pages of their own, appended to in place.

The kernels' store has the memory and knows no lengths; this class knows how many positions there are, and that a
step waits for the one before it (its ticket). A position that `trim` forgot is written over by whoever comes next;
nothing is copied but a page that a fork still shares, when it is written. Rows are stored as float16, as float32 for
a float32 checkpoint, or packed; a state that is saved has the shape of `KVCache`'s, so that files are alike.
"""

from collections.abc import Iterator, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_edge.cache.layer import KVCache
from mlx_edge.cache.lengths import TAIL, CacheLengths
from mlx_edge.cache.quantized import QuantizedRows
from mlx_edge.cache.rows import Planes, RowFormat
from mlx_edge.cache.saved import CacheState
from mlx_edge.errors import InvalidRequestError
from mlx_edge.ops import Segment, StepMeta
from mlx_edge.ops.cpu import extension, make_step

if TYPE_CHECKING:  # slow to import, and only needed where rows leave the store or come back
    from numpy.typing import NDArray

PAGE = 64  # positions
MAX_HEAD_DIM = 256  # the largest that the kernels serve

Runs = list[tuple[int, int]]


class PagedKVCache(CacheLengths):
    """Keys and values of one layer in the CPU kernels' store: all of them, or those in a window."""

    def __init__(
        self,
        *,
        dtype: mx.Dtype = mx.float16,
        window: int | None = None,
        keep: int = 0,
        row_format: RowFormat | None = None,
        float_until: int = 0,
    ) -> None:
        """`dtype` is that of float rows, float16 or float32; the rest as for `KVCache`."""
        super().__init__(window=window, keep=keep, row_format=row_format, float_until=float_until)
        self.dtype = dtype
        self.ticket: mx.array | None = None
        self._latest: tuple[int, ...] = ()  # where the furthest step of each row began
        self._store: Any = None
        self._sizes = (0, 0)  # kv heads, head dim

    @property
    def arrays(self) -> list[mx.array]:
        """The array to evaluate after a step."""
        return [] if self.ticket is None else [self.ticket]

    @property
    def nbytes(self) -> int:
        """Bytes of the pages in use, of steps that have run; those that a fork shares count in each of the two."""
        return 0 if self._store is None else int(self._store.bytes)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the positions held: what one step of attention reads."""
        heads, dim = self._sizes
        row_bytes = self.dtype.size * dim
        if isinstance(self.row_format, QuantizedRows):
            packed = self.row_format
            row_bytes = dim * packed.bits // 8 + 8 * dim // packed.group_size
        return 2 * heads * row_bytes * sum(sum(n for _, n in self._held(o)) for o in self._offsets)

    @property
    def writes_body(self) -> bool:
        """False: no step waits for those in flight, since all of them run in order."""
        return False

    def reserve(self, capacity: int) -> None:
        """Nothing: pages come as they are needed."""

    def begin(self, num_heads: int, head_dim: int, meta: StepMeta) -> Any:
        """The kernels' store, into which they put the step's positions; these count as stored from now on.

        Raises: InvalidRequestError when the positions do not follow those stored.
        """
        # Asked of each layer of each sequence in each step: nothing is made that is there already.
        starts = meta.starts
        if starts != self._offsets or self._store is None:
            self._starts_of(meta)
            if self._store is None:
                self._sizes = (num_heads, head_dim)
                self._offsets = starts
                self._store = self._make_store()
        if self.row_format is not self._wanted_format:
            self._convert()
        self._offsets = meta.ends
        latest = self._latest or starts
        self._latest = max(starts, latest) if len(starts) == 1 else tuple(map(max, starts, latest))
        return self._store

    def extend(self, keys: mx.array, values: mx.array, meta: StepMeta) -> Sequence[Segment]:
        """Store keys and values (B, K, L, D); return copies of all that may be attended to: the reference's way.

        Raises: InvalidRequestError when the positions do not follow those stored.
        """
        oldest = min(meta.starts)
        store = self.begin(keys.shape[1], keys.shape[3], meta)
        rows = (keys.astype(mx.float32), values.astype(mx.float32))
        self.ticket = extension().append(*rows, store, self.ticket, make_step(meta))
        first = 0 if self.window is None else max(0, oldest - self.window + 1)
        kept = min(self.keep, self.offset)
        segments = [self._segment(0, kept, window=None)] if kept else []
        if max(first, kept) < self.offset:
            segments.append(self._segment(max(first, kept), self.offset, window=self.window))
        return segments

    def trim(self, count: int | Sequence[int]) -> None:
        """Forget the newest `count` positions, or so many of each row: the cache is as if they had never come.

        Raises: InvalidRequestError for what cannot be forgotten; the cache stays as it was.
        """
        offsets = self._offsets_without(count)
        self._check_at(offsets)
        self._offsets = offsets

    def fork(self, length: int | None = None) -> "PagedKVCache":
        """A cache of the first `length` positions, of all when None: both go on as if the other were not there.

        They share the pages: whoever writes one that the other still holds copies it first. Waits for steps in flight.

        Raises: InvalidRequestError for what `trim` could not go back to.
        """
        offsets = self._offsets_without(self._counts_beyond(length))
        self._check_at(offsets)
        self._settle()
        twin = copy(self)
        twin._offsets, twin.ticket = offsets, None
        if self._store is not None:
            twin._store = self._store.fork(offsets)
        return twin

    def _check_at(self, offsets: tuple[int, ...]) -> None:
        """Refuse to go back to where the window has moved on from, or to floats that are packed by now."""
        for offset, latest in zip(offsets, self._latest, strict=True):
            # The store gives back what lies a page and more before the window of a step's first query.
            if self.window is not None and offset < latest - PAGE and latest >= self.window + PAGE:
                raise InvalidRequestError(
                    f"a cache with a window of {self.window} cannot go back to position {offset}: "
                    f"a step began at {latest}; process the text anew"
                )
        self._check_format_at(offsets)

    def state(self) -> CacheState:
        """What is held, to be stored; the cache goes on as if nobody had asked. Waits for steps in flight."""
        self._settle()
        rows = tuple(
            {
                part: self._read_slots(row, slots)
                for part, slots in self._slots(offset)
                if len(slots)
            }
            for row, offset in enumerate(self._offsets)
        )
        return CacheState(self._facts(), rows)

    @staticmethod
    def from_state(state: CacheState) -> "PagedKVCache":
        """A cache that goes on where `state` was taken; its planes must have the shapes that `state` gives them."""
        facts = state.facts
        plane = next(planes[0] for _, _, planes in state.planes())
        cache = PagedKVCache(
            dtype=plane.dtype if facts.is_float else mx.float16,
            window=facts.window,
            keep=facts.keep,
            row_format=facts.row_format,
            float_until=facts.float_until,
        )
        cache.row_format, cache._offsets = facts.current_format, facts.offsets
        cache._latest = facts.offsets
        packed = cache.row_format
        width = plane.shape[4]
        dim = width * 32 // packed.bits if isinstance(packed, QuantizedRows) else width
        cache._sizes = (plane.shape[2], dim)
        cache._store = cache._make_store()
        for row, offset in enumerate(facts.offsets):
            for part, slots in cache._slots(offset):
                if len(slots):
                    cache._write_slots(row, slots, state.rows[row][part])
        return cache

    def _settle(self) -> None:
        """Wait until all steps so far have been stored.

        Raises: RuntimeError when one has failed; the cache is then of no more use.
        """
        if self.ticket is not None and self.ticket.item():
            raise RuntimeError(f"{extension().FAILURE}: a step on this cache had failed")

    def _make_store(self) -> Any:
        ext = extension()
        formats = {8: ext.KVFormat.int8, 4: ext.KVFormat.int4}
        heads, dim = self._sizes
        shape = (len(self._offsets), heads, dim)
        packed = self.row_format
        if isinstance(packed, QuantizedRows):
            packed.check(dim)
            return ext.KVStore(
                *shape, formats[packed.bits], packed.group_size, self.window or 0, self.keep
            )
        is_half = self.dtype != mx.float32
        kind = ext.KVFormat.f16 if is_half else ext.KVFormat.f32
        return ext.KVStore(*shape, kind, 0, self.window or 0, self.keep)

    def _convert(self) -> None:
        """Give all rows the wanted format, once enough of them are stored."""
        if not self._is_due:
            return
        self._settle()
        old, self.row_format = self._store, self._wanted_format
        self._store = self._make_store()
        for row, offset in enumerate(self._offsets):
            for start, count in self._held(offset):
                keys, values = (self._read(old, row, start, count, half) for half in (False, True))
                self._store.write(row, start, count, keys, values)

    def _held(self, offset: int) -> Runs:
        """Runs (start, count) of the positions that a later query may see, of a row with `offset` of them."""
        if self.window is None:
            return [(0, offset)] if offset else []
        first = max(0, offset - self.window - TAIL)
        kept = [(0, min(self.keep, first))] if min(self.keep, first) else []
        return kept + ([(first, offset - first)] if offset > first else [])

    def _slots(self, offset: int) -> Iterator[tuple[str, Sequence[int]]]:
        """The positions in each part of a `KVCache` that holds the same, in the order of their slots."""
        counts = KVCache(window=self.window, keep=self.keep).held_slots(offset)
        begin = offset - counts["tail"]
        size = counts["body"]
        yield "prefix", range(counts["prefix"])
        # Of a ring each slot has the newest position before the tail that falls on it.
        yield "body", [slot + (begin - 1 - slot) // size * size for slot in range(size)]
        yield "tail", range(begin, offset)

    def _read(self, store: Any, row: int, start: int, count: int, values: bool) -> Any:
        import numpy as np

        heads, dim = self._sizes
        rows = np.empty((heads, count, dim), np.float32)
        store.read(row, start, count, values, rows)
        return rows

    def _read_slots(self, row: int, slots: Sequence[int]) -> Planes:
        """The planes (2, 1, K, S, ...) of these positions; what the store has dropped is zero."""
        import numpy as np

        start = min(slots)
        count = max(slots) - start + 1
        chosen = np.array(slots) - start
        if not isinstance(self.row_format, QuantizedRows):
            halves = [self._read(self._store, row, start, count, half) for half in (False, True)]
            rows = np.stack(halves)[:, None, :, chosen]
            return (mx.array(rows).astype(self.dtype),)
        planes = self._packed_planes(count)
        for half, values in enumerate((False, True)):
            parts = [np.ascontiguousarray(plane[half, 0]) for plane in planes]
            self._store.read_packed(row, start, count, values, *parts)
            for plane, part in zip(planes, parts, strict=True):
                plane[half, 0] = part
        return tuple(mx.array(plane[:, :, :, chosen]) for plane in planes)

    def _packed_planes(self, count: int) -> "list[NDArray[Any]]":
        import numpy as np

        packed = self.row_format
        assert isinstance(packed, QuantizedRows)
        heads, dim = self._sizes
        shape = (2, 1, heads, count)
        groups = dim // packed.group_size
        return [
            np.zeros((*shape, dim * packed.bits // 32), np.uint32),
            np.zeros((*shape, groups), np.float32),
            np.zeros((*shape, groups), np.float32),
        ]

    def _write_slots(self, row: int, slots: Sequence[int], planes: Planes) -> None:
        import numpy as np

        order = np.argsort(slots)
        start, count = min(slots), len(slots)
        if not isinstance(self.row_format, QuantizedRows):
            rows = np.array(planes[0].astype(mx.float32))[:, 0][:, :, order]
            self._store.write(row, start, count, *map(np.ascontiguousarray, rows))
            return
        self._store.prepare(row, start, count)
        for half, values in enumerate((False, True)):
            parts = [np.ascontiguousarray(np.array(plane)[half, 0][:, order]) for plane in planes]
            self._store.write_packed(row, start, count, values, *parts)

    def _segment(self, start: int, end: int, *, window: int | None) -> Segment:
        """Positions from `start` to `end`, copied out of the store."""
        import numpy as np

        rows = extension().read(self._store, self.ticket, start, end - start)
        positions = np.arange(start, end)[None]
        if len(set(self._offsets)) > 1:
            positions = np.where(positions < np.array(self._offsets)[:, None], positions, -1)
        return Segment(
            rows[0],
            rows[1],
            mx.array(positions, dtype=mx.int32),
            first=start,
            last=end - 1,
            has_gaps=bool((positions < 0).any()),
            window=window,
        )
