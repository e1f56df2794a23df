"""The weights in a tree of frozen records and tuples: found with their paths, and replaced by others.

Knows the ops' records and nothing of the model around them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal

from mlx_edge import ops


@dataclass(frozen=True)
class FoundWeight:
    """A weight of a model."""

    name: str  # its path
    weight: ops.Linear
    # A table is only looked up in; a router chooses among experts, each of which meets rows of its own.
    role: Literal["linear", "table", "router", "expert"]


def find_weights(model: object) -> list[FoundWeight]:
    """The weights of a model, each once, in the order of its records."""
    found: dict[int, FoundWeight] = {}
    for one in _walk(model, ()):
        known = found.get(id(one.weight))
        if known is None:
            found[id(one.weight)] = one
        elif known.role == "table":  # it is the head, too
            found[id(one.weight)] = replace(known, role=one.role)
    return list(found.values())


def _walk(part: object, path: tuple[str, ...]) -> Iterator[FoundWeight]:
    if isinstance(part, ops.Embedding):
        yield FoundWeight(".".join((*path, "table")), part.table, "table")
    elif isinstance(part, ops.MoEWeights):
        yield FoundWeight(".".join((*path, "router")), part.router, "router")
        for name, weight in (("gate", part.gate), ("up", part.up), ("down", part.down)):
            yield FoundWeight(".".join((*path, name)), weight, "expert")
    elif isinstance(part, ops.Dense | ops.Quantized | ops.Packed):
        yield FoundWeight(".".join(path), part, "linear")
    elif isinstance(part, tuple):
        for index, item in enumerate(part):
            yield from _walk(item, (*path, str(index)))
    elif is_dataclass(part):
        for each in fields(part):
            yield from _walk(getattr(part, each.name), (*path, each.name))


def replace_weights(part: Any, made: Mapping[int, ops.Linear]) -> Any:
    """The tree with other weights in place of those whose ids are named; parts without any are the same objects."""
    if id(part) in made:
        return made[id(part)]
    if isinstance(part, tuple):
        items = [replace_weights(item, made) for item in part]
        is_same = all(a is b for a, b in zip(items, part, strict=True))
        return part if is_same else tuple(items)
    if not is_dataclass(part) or isinstance(part, type):
        return part
    values = {each.name: getattr(part, each.name) for each in fields(part)}
    changed = {name: replace_weights(value, made) for name, value in values.items()}
    changed = {name: value for name, value in changed.items() if value is not values[name]}
    return replace(part, **changed) if changed else part
