"""What the cache of one layer reserves for a sequence, in bytes: pages of the CPU kernels, or MLX's arrays.

Arithmetic alone: nothing is allocated, no model is needed. The layouts are those of
`cpu_kernels/kv_store.h` (pages) and `cache/layer.py` (a body and a tail); the tests hold these sums
against real caches.
"""

from dataclasses import dataclass, replace
from typing import Protocol

from mlx_edge.cache.layer import GROWTH
from mlx_edge.cache.lengths import TAIL
from mlx_edge.cache.paged import PAGE

LINE = 64  # bytes to which the parts of a page are rounded up
DIMS = 16  # elements to which a row of values is rounded up
SLICE = 256  # rows of a step that go through the CPU kernels at once
ALLOCATION_BYTES = 96  # that the C library adds to a page: its header, and the alignment


@dataclass(frozen=True)
class RowSizes:
    """How one layer stores a position: `kv_heads` keys and values of `head_dim` elements."""

    kv_heads: int
    head_dim: int
    float_bytes: int  # of an element while rows are floats
    bits: int = 0  # of a packed element; 0: rows stay floats
    group_size: int = 0
    scale_bytes: int = 4  # of a scale, and of an offset

    @property
    def floats(self) -> "RowSizes":
        """The same rows before they are packed."""
        return replace(self, bits=0, group_size=0)

    @property
    def row_bytes(self) -> int:
        """One row of one head, without padding."""
        if not self.bits:
            return self.head_dim * self.float_bytes
        return (
            self.head_dim * self.bits // 8 + 2 * self.head_dim // self.group_size * self.scale_bytes
        )

    @property
    def page_bytes(self) -> int:
        """One page of the CPU kernels: keys and values of all heads, with the padding of the planes."""
        dims = round_up(self.head_dim, DIMS)
        bits = self.bits or 8 * self.float_bytes
        groups = self.head_dim // self.group_size if self.bits else 0
        scales = round_up(PAGE * groups * 4, LINE)
        return 2 * self.kv_heads * (round_up(PAGE * dims * bits // 8, LINE) + 2 * scales)


class LayerCacheSizes(Protocol):
    """What a layer's cache reserves."""

    def num_bytes(self, positions: int, step_rows: int) -> int:
        """The most that a sequence of `positions` ever reserves, with steps of at most `step_rows` positions."""


@dataclass(frozen=True)
class PagedSizes:
    """The cache of a layer where the CPU kernels run (`cache/paged.py`)."""

    rows: RowSizes
    window: int | None = None
    keep: int = 0
    float_until: int = 0

    def num_bytes(self, positions: int, step_rows: int) -> int:
        """As `LayerCacheSizes`. Rows that become packed are held in both formats for a moment."""
        if not self.rows.bits or positions <= self.float_until:
            return self._pages(positions, step_rows) * _page(self.rows.floats)
        packed = self._pages(positions, step_rows) * _page(self.rows)
        if not self.float_until:
            return packed
        pages = self._pages(self.float_until, step_rows)  # where a chunk ends
        return max(packed, pages * (_page(self.rows) + _page(self.rows.floats)))

    def _pages(self, positions: int, step_rows: int) -> int:
        everything = -(-positions // PAGE)
        if self.window is None:
            return everything
        # What `KVStore::prepare` leaves: the window behind a slice's first query and the slice, wherever in a page they
        # begin (a chunk shared with another prompt begins anywhere), and a page before them for rejected drafts. Pages
        # that were given back are taken first, so none is spare when the most are held.
        seen = self.window - 1 + min(step_rows, SLICE)
        held = -(-(seen - 1) // PAGE) + 1 + 1
        return min(everything, held + -(-self.keep // PAGE))


@dataclass(frozen=True)
class ArraySizes:
    """The cache of a layer in MLX's arrays (`cache/layer.py`): a body, a tail of 2 * 32, the kept prefix, a chunk."""

    rows: RowSizes
    window: int | None = None
    keep: int = 0
    float_until: int = 0

    def num_bytes(self, positions: int, step_rows: int) -> int:
        """As `LayerCacheSizes`; room for all positions is reserved at once, as the engine does."""
        slots = 2 * (2 * TAIL) + self.keep  # a new tail is made while the old one is read
        if positions > TAIL:
            slots += self._body(positions)
        if step_rows > TAIL:
            slots += min(step_rows, positions)
        is_packed = bool(self.rows.bits) and positions > self.float_until
        stored = self.rows if is_packed else self.rows.floats
        num_bytes = slots * _position(stored)
        if is_packed and self.float_until:  # the floats of the moment at which all become packed
            num_bytes += self._body(positions) * _position(self.rows.floats)
        return num_bytes

    def _body(self, positions: int) -> int:
        whole = round_up(positions, GROWTH)
        if self.window is None:
            return whole
        return min(whole, round_up(self.window - 1, TAIL) + TAIL)


def round_up(size: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-size // step) * step


def _page(rows: RowSizes) -> int:
    return rows.page_bytes + ALLOCATION_BYTES


def _position(rows: RowSizes) -> int:
    return 2 * rows.kv_heads * rows.row_bytes
