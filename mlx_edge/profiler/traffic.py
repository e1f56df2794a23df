"""How many bytes one op call must move: its weights and inputs read once, its cache read, its results written.

Counted from the arrays among its arguments and results, so it is the least that any implementation moves: what an
op writes for itself and reads again is not in it. Knows no op's mathematics, only which ones read rows by number,
and of a cache only what it says itself: `stored_bytes` (positions that attention reads), else `nbytes` (reserved,
which may be more).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import mlx.core as mx

GATHERS = frozenset(("embed",))  # the first argument holds the numbers of the rows that are read


@dataclass(frozen=True)
class Operands:
    """What an op call is given."""

    arrays: tuple[mx.array, ...]  # each once
    caches: tuple[Any, ...]
    weights: tuple[
        Any, ...
    ] = ()  # in a layout of their own, which say how large they are: `weight_bytes`

    @staticmethod
    def of(*values: object) -> "Operands":
        """All arrays and caches among the values, in records and sequences too."""
        found = list(_walk(values))
        arrays = {id(value): value for value in found if isinstance(value, mx.array)}
        others = {id(value): value for value in found if not isinstance(value, mx.array)}
        weights = [value for value in others.values() if hasattr(value, "weight_bytes")]
        caches = [value for value in others.values() if not hasattr(value, "weight_bytes")]
        return Operands(tuple(arrays.values()), tuple(caches), tuple(weights))

    @property
    def stored_bytes(self) -> int:
        """Bytes that the caches hold."""
        return sum(getattr(cache, "stored_bytes", cache.nbytes) for cache in self.caches)

    @property
    def is_exact(self) -> bool:
        """Whether every cache says how much of it is in use."""
        return all(hasattr(cache, "stored_bytes") for cache in self.caches)

    def evaluate(self) -> None:
        """Wait until all of it is computed."""
        mx.eval([*self.arrays, *(a for cache in self.caches for a in getattr(cache, "arrays", ()))])


def _walk(value: object) -> Iterator[object]:
    if isinstance(value, mx.array):
        yield value
    elif isinstance(value, str | bytes | int | float | None):
        return
    elif hasattr(value, "weight_bytes"):
        yield value
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _walk(getattr(value, field.name))
    elif isinstance(value, Mapping):
        yield from _walk(tuple(value.values()))
    elif isinstance(value, Sequence):
        for item in value:
            yield from _walk(item)
    elif hasattr(value, "nbytes"):
        yield value


def bytes_moved(op: str, operands: Operands, results: Operands, stored_before: int) -> int:
    """Bytes read and written by a call that has run; `stored_before` is what its caches held before it."""
    stored = operands.stored_bytes
    written = sum(array.nbytes for array in results.arrays) + max(0, stored - stored_before)
    return _bytes_read(op, operands) + stored + written


def _bytes_read(op: str, operands: Operands) -> int:
    arrays = operands.arrays
    sizes = [(array.shape, array.nbytes) for array in arrays]
    sizes += [(weight.shape, weight.weight_bytes) for weight in operands.weights]
    if op not in GATHERS or not arrays:
        return sum(num_bytes for _, num_bytes in sizes)
    rows = [min(arrays[0].size, shape[0]) * (size // max(1, shape[0])) for shape, size in sizes[1:]]
    return arrays[0].nbytes + sum(rows)
