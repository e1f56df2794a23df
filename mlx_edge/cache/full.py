"""The full KV cache of one layer: a body that nothing writes while it is read, and a short tail.

MLX holds an array that was an input until the step that read it is done, so writing into it before then would
copy all of it. A step therefore writes only the tail, the newest at most TAIL positions; when the tail is full
it is merged into the body, after the steps in flight have ended. Where that happens depends on the position
alone, never on how the prompt was cut. Knows nothing of models; `prepare_step` must be called before each step.
"""

from collections.abc import Sequence

import mlx.core as mx

from mlx_edge.errors import InvalidRequestError
from mlx_edge.ops import Segment, StepMeta

TAIL = 32  # positions; a tail covers [n * TAIL, (n + 1) * TAIL)
GROWTH = 256  # positions; the body's capacity is a multiple of it


class KVCache:
    """All keys and values of one layer, growing with the sequence."""

    def __init__(self, *, capacity: int = 0) -> None:
        """Reserve room for `capacity` positions, so that the body need not grow (and be copied) until then."""
        self._capacity = capacity
        self._body: mx.array | None = None  # (2, B, K, S, D): keys, values
        self._tail: mx.array | None = None  # (2, B, K, TAIL, D)
        self.offset = 0  # positions stored
        self.num_growths = 0  # how often the body was re-allocated because it was too short

    @property
    def merged(self) -> int:
        """Positions that lie in the body; the rest are in the tail. A full tail waits for the next step."""
        return _merged_after(self.offset)

    @property
    def arrays(self) -> list[mx.array]:
        """The arrays to evaluate after a step."""
        return [a for a in (self._body, self._tail) if a is not None]

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return sum(a.nbytes for a in self.arrays)

    @property
    def body(self) -> mx.array | None:
        """The body (2, B, K, S, D), or None before the first merge."""
        return self._body

    def reserve(self, capacity: int) -> None:
        """Let the body hold `capacity` positions when it is next allocated or grown."""
        self._capacity = max(self._capacity, capacity)

    def writes_body(self, num_new: int) -> bool:
        """Whether storing `num_new` more positions writes the body."""
        return _merged_after(self.offset + num_new) > self.merged

    def extend(self, keys: mx.array, values: mx.array, meta: StepMeta) -> Sequence[Segment]:
        """Store keys and values (B, K, L, D) at the step's positions; return body and tail as segments."""
        start, width = self.offset, meta.width
        if any(s != start for s in meta.starts) or any(n != width for n in meta.lengths):
            raise InvalidRequestError(
                f"a step of rows at positions {meta.starts} with {meta.lengths} tokens does not fit a cache "
                f"that holds {start} positions in every row; give all rows the same length"
            )
        new = mx.stack([keys, values])
        old_merged = self.merged
        self.offset = start + width
        if self._tail is None:
            self._tail = mx.zeros((*new.shape[:3], TAIL, new.shape[4]), new.dtype)
        if self.merged == old_merged:
            self._tail = _write(self._tail, new, start - old_merged)
        else:
            self._merge(new, old_merged, start)
        return self._segments()

    def _merge(self, new: mx.array, old_merged: int, start: int) -> None:
        """Move the tail and as much of `new` as fills whole tails into the body; the rest is the new tail."""
        assert self._tail is not None
        if start > old_merged:
            new = mx.concatenate([self._tail[:, :, :, : start - old_merged], new], axis=3)
        split = self.merged - old_merged
        self._body = _write(self._room(new), new[:, :, :, :split], old_merged)
        # Not a slice of `new`, which would keep the whole chunk alive, nor the old tail, which is an input above.
        tail = mx.zeros((*new.shape[:3], TAIL, new.shape[4]), new.dtype)
        self._tail = _write(tail, new[:, :, :, split:], 0)

    def _room(self, like: mx.array) -> mx.array:
        """The body, allocated or grown so that it holds `merged` positions."""
        held = 0 if self._body is None else self._body.shape[3]
        if self._body is not None and held >= self.merged:
            return self._body
        needed = max(self._capacity, self.merged, held + held // 2)
        shape = (*like.shape[:3], -(-needed // GROWTH) * GROWTH, like.shape[4])
        room = mx.zeros(shape, like.dtype)
        if self._body is None:
            return room
        self.num_growths += 1
        return _write(room, self._body, 0)

    def _segments(self) -> list[Segment]:
        assert self._tail is not None
        merged, stored = self.merged, self.offset
        segments = []
        if merged:
            assert self._body is not None
            segments.append(_segment(self._body, 0, merged))
        segments.append(_segment(self._tail, merged, stored))
        return segments


def _merged_after(offset: int) -> int:
    return max(0, offset - 1) // TAIL * TAIL


def _write(target: mx.array, rows: mx.array, position: int) -> mx.array:
    return mx.slice_update(target, rows, mx.array([position]), axes=(3,))


def _segment(store: mx.array, first: int, end: int) -> Segment:
    length = end - first
    return Segment(
        store[0, :, :, :length],
        store[1, :, :, :length],
        mx.arange(first, end, dtype=mx.int32)[None],
        first,
        end - 1,
    )


def prepare_step(caches: Sequence[KVCache], num_new: int) -> None:
    """Make the step's writes safe: wait for steps in flight when it will write a body.

    Called once per step, before any layer runs; a wait every TAIL positions when decoding.
    """
    if any(cache.writes_body(num_new) for cache in caches):
        mx.synchronize()
