"""Stored rows: the arrays in which keys and values of positions lie, whatever their format.

A format turns new rows (2, B, K, L, D), keys first, into planes: arrays (2, B, K, L, ...) that share their
first four axes. All that a cache does with planes is to write and to take positions; what they hold is the
format's business. Knows no positions and no windows.
"""

from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from mlx_edge.ops import PackedRows

Planes = tuple[mx.array, ...]
Row = int | None  # one row of the batch, or all of them


class RowFormat(Protocol):
    """How rows are stored."""

    def encode(self, rows: mx.array) -> Planes:
        """The planes of new rows (2, B, K, L, D)."""
        ...

    def split(self, planes: Planes) -> tuple[mx.array | PackedRows, mx.array | PackedRows]:
        """Keys and values (B, K, S, D), as attention takes them."""
        ...


@dataclass(frozen=True)
class FloatRows:
    """Rows as they come."""

    def encode(self, rows: mx.array) -> Planes:
        """One plane: the rows."""
        return (rows,)

    def split(self, planes: Planes) -> tuple[mx.array, mx.array]:
        """Two views."""
        (rows,) = planes
        return keys_of(rows), values_of(rows)


def keys_of(plane: mx.array) -> mx.array:
    """The keys' half as a view; an index would gather, and so copy."""
    return plane[:1].squeeze(0)


def values_of(plane: mx.array) -> mx.array:
    """The values' half as a view."""
    return plane[1:].squeeze(0)


def make_room(like: Planes, length: int) -> Planes:
    """Empty planes for `length` positions."""
    return tuple(mx.zeros((*p.shape[:3], length, p.shape[4]), p.dtype) for p in like)


def take(planes: Planes, begin: int, end: int, row: Row = None) -> Planes:
    """Positions from `begin` to `end`."""
    if row is None:
        return tuple(p[:, :, :, begin:end] for p in planes)
    return tuple(p[:, row : row + 1, :, begin:end] for p in planes)


def join(first: Planes, second: Planes) -> Planes:
    """The positions of `first`, then those of `second`."""
    return tuple(mx.concatenate([a, b], axis=3) for a, b in zip(first, second, strict=True))


def write(target: Planes, rows: Planes, position: int, row: Row = None) -> Planes:
    """`target` with `rows` from `position` on; in place when nobody else holds it."""
    start = mx.array([position] if row is None else [row, position])
    axes = (3,) if row is None else (1, 3)
    return tuple(mx.slice_update(t, r, start, axes=axes) for t, r in zip(target, rows, strict=True))
