"""The ledger of memory: what is promised to whom, never more than there is.

Whoever may run has reserved all that it can come to need. Knows no models and no machine, imports no MLX, and is used
by one thread, the engine's. Sizes are in bytes.
"""

from collections.abc import Callable, Hashable, Mapping
from types import MappingProxyType

from mlx_edge.errors import MemoryBudgetError

_UNITS = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


class MemoryBudget:
    """So many bytes, of which owners reserve parts; the sum of all parts is at most `total` at any time."""

    def __init__(self, total: int, standing: Mapping[str, int] = MappingProxyType({})) -> None:
        """`standing` is what is always held, by name: the process, the weights, a step's activations.

        Raises: MemoryBudgetError when that alone is too much.
        """
        self.total = total
        self.standing = dict(standing)
        self._fixed = sum(standing.values())
        if self._fixed > total:
            raise MemoryBudgetError(
                f"the model needs {format_size(self._fixed)} before the first request ({describe_parts(standing)}), "
                f"the budget is {format_size(total)}; raise the budget, or take a smaller or more quantized model"
            )
        self._parts: dict[Hashable, int] = {}
        self._reserved = 0

    @property
    def available(self) -> int:
        """What requests can have at most, all together: the total without what is always held."""
        return self.total - self._fixed

    @property
    def reserved(self) -> int:
        """All that is promised, what is always held included."""
        return self._fixed + self._reserved

    @property
    def free(self) -> int:
        """What can still be promised."""
        return self.total - self.reserved

    def of(self, owner: Hashable) -> int:
        """What an owner holds; 0 for one that is not known."""
        return self._parts.get(owner, 0)

    def fits_alone(self, nbytes: int) -> bool:
        """Whether so much could be reserved if nobody else held anything."""
        return nbytes <= self.available

    def reserve(self, owner: Hashable, nbytes: int) -> bool:
        """Promise `nbytes` to an owner, in place of what it held; False, and no change, when too little is free."""
        if nbytes < 0:
            raise ValueError(f"{nbytes} bytes cannot be reserved")
        held = self.of(owner)
        if nbytes - held > self.free:
            return False
        self._parts[owner] = nbytes
        self._reserved += nbytes - held
        return True

    def release(self, owner: Hashable) -> int:
        """Take back what an owner held; returns the bytes, 0 for one that is not known."""
        nbytes = self._parts.pop(owner, 0)
        self._reserved -= nbytes
        return nbytes


def largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest of `low` to `high` that fits, if all smaller ones do; `low` - 1 when none does."""
    low -= 1
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def refuse(
    budget: MemoryBudget, parts: Mapping[str, int], *, largest_max_tokens: int = 0
) -> MemoryBudgetError:
    """The error for a request that would not fit alone; `parts` is what it adds to what stands, by name.

    `largest_max_tokens` is the most with which it would fit; 0 where even the prompt does not.
    """
    needed = sum(budget.standing.values()) + sum(parts.values())
    advice = (
        f"lower max_tokens to {largest_max_tokens}, or raise the budget"
        if largest_max_tokens
        else "shorten the prompt, store keys and values in fewer bits (kv_bits), or raise the budget"
    )
    if parts.get("images"):
        advice = f"send fewer images or lower max_pixels, {advice}"
    return MemoryBudgetError(
        f"the request needs {format_size(needed)} ({describe_parts({**budget.standing, **parts})}), "
        f"the budget is {format_size(budget.total)}; {advice}"
    )


def describe_parts(parts: Mapping[str, int]) -> str:
    """Names with sizes, the largest first; what is nothing is left out."""
    shown = sorted(((size, name) for name, size in parts.items() if size), reverse=True)
    return ", ".join(f"{name} {format_size(size)}" for size, name in shown)


def format_size(nbytes: int) -> str:
    """A size as people read it, three digits in units of 1000: "1.05 GB", "31.4 MB", "300 MB"."""
    for unit, name in _UNITS:
        # What would round up to 1000 of a unit is one of the next.
        if nbytes >= unit - unit // 2000:
            size = nbytes / unit
            return f"{size:.{0 if size >= 99.95 else 1 if size >= 9.995 else 2}f} {name}"
    return f"{nbytes} B"
