"""What every cache of a layer knows: how many positions each row of a batch has stored, and in which format.

Rows stay floats until `float_until` positions are stored; then all take the wanted format at once. Knows no memory:
where rows lie, and what else cannot be forgotten, is said by the caches (`layer.py`, `paged.py`).
"""

from collections.abc import Sequence

from mlx_edge.cache.rows import FloatRows, Row, RowFormat
from mlx_edge.cache.saved import CacheFacts
from mlx_edge.errors import InvalidRequestError
from mlx_edge.ops import StepMeta

TAIL = 32  # positions that a step may always take back; a longer step is a chunk of a prompt


class CacheLengths:
    """Lengths, limits and format of one layer's cache."""

    def __init__(
        self,
        *,
        window: int | None,
        keep: int,
        row_format: RowFormat | None,
        float_until: int,
    ) -> None:
        """As the caches' own arguments."""
        self.window = window
        self.keep = keep if window is not None else 0
        self._wanted_format = row_format or FloatRows()
        self._float_until = float_until
        self.row_format: RowFormat = FloatRows() if float_until else self._wanted_format
        self._offsets: tuple[int, ...] = ()  # positions stored, per row of the batch
        self.first_image: int | None = (
            None  # where the first image of the sequence stands, once it is stored
        )

    @property
    def offset(self) -> int:
        """Positions stored, in the longest row."""
        return max(self._offsets, default=0)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Positions stored in each row of the batch; empty before the first step."""
        return self._offsets

    @property
    def holds_images(self) -> bool:
        """Whether RoPE's turns may differ from positions here: only whoever knows the images can go on."""
        return self.first_image is not None and self.offset > self.first_image

    @property
    def num_trimmable(self) -> int:
        """How many positions the next step may bring that `trim` could make as if they had never come."""
        return min(TAIL, self.num_until_packed or TAIL)

    @property
    def num_until_packed(self) -> int:
        """How many positions are still to be stored before the rows are packed; 0 where there is no such moment ahead.

        A chunk of a prompt ends there, or else what is computed would depend on where the prompt was cut.
        """
        return max(0, self._float_until - self.offset) if self._gets_packed else 0

    @property
    def _gets_packed(self) -> bool:
        return self._wanted_format != FloatRows()

    @property
    def _is_due(self) -> bool:
        """Whether the rows should have the wanted format, and have not."""
        # Asked of each cache in each step: one object is the same format, without a comparison.
        if self.row_format is self._wanted_format:
            return False
        return self.row_format != self._wanted_format and self.offset >= self._float_until

    def _facts(self) -> CacheFacts:
        is_float = self.row_format == FloatRows()
        return CacheFacts(
            self.window, self.keep, self._wanted_format, self._float_until, is_float, self._offsets
        )

    def _starts_of(self, meta: StepMeta) -> tuple[int, ...]:
        """Where the step's rows begin.

        Raises: InvalidRequestError when the positions do not follow those stored.
        """
        starts = self._offsets or (0,) * len(meta.starts)
        if meta.starts != starts:
            raise InvalidRequestError(
                f"a step of rows from positions {meta.starts} does not follow the {starts} that are stored"
            )
        return starts

    def _offsets_without(self, count: int | Sequence[int]) -> tuple[int, ...]:
        """The lengths without the newest `count` positions, or so many of each row.

        Raises: InvalidRequestError for more than are stored.
        """
        counts = (count,) * len(self._offsets) if isinstance(count, int) else tuple(count)
        offsets = tuple(o - c for o, c in zip(self._offsets, counts, strict=True))
        if min(counts, default=0) < 0 or min(offsets, default=0) < 0:
            raise InvalidRequestError(
                f"{count} positions cannot be forgotten; {self._offsets} are stored"
            )
        return offsets

    def _counts_beyond(self, length: int | None) -> tuple[int, ...]:
        """How many positions of each row stand behind its first `length`; None for as many as are stored.

        Raises: InvalidRequestError where a row has fewer.
        """
        if length is None:
            return (0,) * len(self._offsets)
        if not 0 <= length <= min(self._offsets, default=0):
            raise InvalidRequestError(
                f"a fork of the first {length} positions; {min(self._offsets, default=0)} are stored"
            )
        return tuple(offset - length for offset in self._offsets)

    def _check_format_at(self, offsets: tuple[int, ...]) -> None:
        """Refuse to go back to where rows were floats, when they are packed by now."""
        is_packed = self._gets_packed and self.row_format == self._wanted_format
        if is_packed and max(offsets, default=0) < self._float_until <= self.offset:
            raise InvalidRequestError(
                f"the cache is packed from position {self._float_until} on and cannot go back to "
                f"{max(offsets)}, where rows were floats; process the text anew"
            )


def each_row(*columns: tuple[int, ...]) -> list[tuple[Row, tuple[int, ...]]]:
    """The values of each row of the batch; where all rows are alike, of the whole batch at once."""
    rows = list(zip(*columns, strict=True))
    return [(None, rows[0])] if len(set(rows)) == 1 else list(enumerate(rows))


def merged(offset: int) -> int:
    """Positions that lie in the body at rest once `offset` are stored; a full tail waits for the next step."""
    return max(0, offset - 1) // TAIL * TAIL
