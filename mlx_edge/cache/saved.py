"""What a layer's cache holds as plain facts and arrays: the state that can be stored and brought back.

A state has only the slots in use, each row of a batch by itself, so that nothing of a longer neighbour and
nothing left over from before is written anywhere. Facts are JSON values; whatever is read from them is checked.
Knows no file and no model: `models/prompt_cache.py` has both.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mlx_edge.cache.quantized import QuantizedRows
from mlx_edge.cache.rows import FloatRows, Planes, RowFormat
from mlx_edge.errors import InvalidRequestError, ModelFormatError

PARTS = ("prefix", "body", "tail")
MAX_ROWS = 1024  # of a batch: a few bytes of facts must not ask for any amount of memory
MAX_POSITION = 1 << 31


@dataclass(frozen=True)
class CacheFacts:
    """All of a layer's cache but its rows."""

    window: int | None
    keep: int
    row_format: RowFormat  # that rows have, or will have from `float_until` positions on
    float_until: int
    is_float: bool  # rows are floats now
    offsets: tuple[int, ...]  # positions stored, per row of the batch

    @property
    def current_format(self) -> RowFormat:
        """The format that the rows have now."""
        return FloatRows() if self.is_float else self.row_format

    def to_json(self) -> dict[str, Any]:
        """The facts as JSON values."""
        packed = self.row_format
        return {
            "window": self.window,
            "keep": self.keep,
            "packed": [packed.bits, packed.group_size]
            if isinstance(packed, QuantizedRows)
            else None,
            "float_until": self.float_until,
            "is_float": self.is_float,
            "offsets": list(self.offsets),
        }

    @staticmethod
    def from_json(value: object) -> "CacheFacts":
        """The facts that `to_json` wrote.

        Raises: ModelFormatError for anything else.
        """
        if not isinstance(value, dict) or set(value) != _KEYS:
            raise ModelFormatError(f"a layer is told by other keys than {', '.join(sorted(_KEYS))}")
        window, offsets = value["window"], value["offsets"]
        if not isinstance(offsets, list) or not 0 < len(offsets) <= MAX_ROWS:
            raise ModelFormatError(f"offsets is no list of 1 to {MAX_ROWS} numbers")
        if not isinstance(value["is_float"], bool):
            raise ModelFormatError("is_float is neither true nor false")
        facts = CacheFacts(
            None if window is None else _number("window", window, 1),
            _number("keep", value["keep"]),
            _read_format(value["packed"]),
            _number("float_until", value["float_until"]),
            value["is_float"],
            tuple(_number("offsets", offset) for offset in offsets),
        )
        if not facts.is_float and isinstance(facts.row_format, FloatRows):
            raise ModelFormatError("is_float is false, but packed says no format")
        return facts


@dataclass(frozen=True)
class CacheState:
    """Facts, and per row of the batch the planes (2, 1, K, S, ...) of each part that holds something."""

    facts: CacheFacts
    rows: tuple[Mapping[str, Planes], ...]

    def planes(self) -> Iterator[tuple[int, str, Planes]]:
        """Row of the batch, part and planes, of all that is held."""
        for row, parts in enumerate(self.rows):
            for part, planes in parts.items():
                yield row, part, planes


_KEYS = {"window", "keep", "packed", "float_until", "is_float", "offsets"}


def _number(name: str, value: object, low: int = 0) -> int:
    # A bool is an int to Python, and not to us.
    if type(value) is not int or not low <= value < MAX_POSITION:
        raise ModelFormatError(f"{name} holds something else than whole numbers from {low}")
    return value


def _read_format(value: object) -> RowFormat:
    if value is None:
        return FloatRows()
    if not isinstance(value, list) or len(value) != 2:
        raise ModelFormatError("packed is neither null nor [bits, group size]")
    try:
        return QuantizedRows(_number("packed", value[0]), _number("packed", value[1]))
    except InvalidRequestError as error:
        raise ModelFormatError(str(error)) from None
