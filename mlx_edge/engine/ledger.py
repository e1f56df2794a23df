"""Memory for the scheduler: promises from the budget, for which stored prefixes give way. Imports no MLX."""

from typing import Protocol

from mlx_edge.engine.budget import MemoryBudget

PREFIXES = "prefixes"  # what the prefix cache holds, as an owner


class Evictable(Protocol):
    """A store that gives memory back when it is needed elsewhere."""

    @property
    def nbytes(self) -> int:
        """What it holds."""

    def evict(self, nbytes: int) -> int:
        """Free at least so much if there is as much."""


class Ledger:
    """A budget and the prefixes in it; without a budget everything is granted."""

    def __init__(self, budget: MemoryBudget | None, prefixes: Evictable | None) -> None:
        self.budget, self._prefixes = budget, prefixes

    def reserve(self, owner: int, nbytes: int) -> bool:
        """Promise it, if need be in place of stored prefixes; False when those that run have too much."""
        if self.budget is None or self.budget.reserve(owner, nbytes):
            return True
        missing = nbytes - self.budget.free
        if self._prefixes is None or missing > self.budget.of(PREFIXES):
            return False
        self._prefixes.evict(missing)
        self.count_prefixes()
        return self.budget.reserve(owner, nbytes)

    def release(self, owner: int) -> None:
        """Take a promise back."""
        if self.budget is not None:
            self.budget.release(owner)

    def count_prefixes(self) -> None:
        """The prefixes have changed: those that do not fit beside the promises are evicted."""
        if self.budget is None or self._prefixes is None:
            return
        while not self.budget.reserve(PREFIXES, self._prefixes.nbytes):
            room = self.budget.free + self.budget.of(PREFIXES)
            if not self._prefixes.evict(self._prefixes.nbytes - room):
                self.budget.reserve(PREFIXES, room)  # the rest is on its way to the disk
                return
