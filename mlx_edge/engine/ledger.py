"""Memory for the scheduler: promises from the budget, for which what is stored gives way. Imports no MLX."""

from typing import Protocol

from mlx_edge.engine.memory.budget import MemoryBudget

PREFIXES = "prefixes"  # what the prefix cache holds, as an owner
FEATURES = "features"  # of images, kept for the next request with the same


class Evictable(Protocol):
    """A store that gives memory back when it is needed elsewhere."""

    @property
    def nbytes(self) -> int:
        """What it holds."""

    def evict(self, nbytes: int) -> int:
        """Free at least so much if there is as much."""


class Ledger:
    """A budget and the stores in it, which give way to requests; without a budget everything is granted."""

    def __init__(
        self,
        budget: MemoryBudget | None,
        prefixes: Evictable | None,
        features: Evictable | None = None,
    ) -> None:
        self.budget = budget
        stores = {FEATURES: features, PREFIXES: prefixes}  # the first gives way first
        self._stores = {name: store for name, store in stores.items() if store is not None}

    def reserve(self, owner: int, nbytes: int) -> bool:
        """Promise it, if need be in place of what is stored; False when those that run have too much."""
        if self.budget is None or self.budget.reserve(owner, nbytes):
            return True
        missing = nbytes - self.budget.of(owner) - self.budget.free
        if missing > sum(self.budget.of(name) for name in self._stores):
            return False
        for name, store in self._stores.items():
            missing = nbytes - self.budget.of(owner) - self.budget.free
            if missing > 0:
                store.evict(missing)
                self._count(name)
        return self.budget.reserve(owner, nbytes)

    def release(self, owner: int) -> None:
        """Take a promise back."""
        if self.budget is not None:
            self.budget.release(owner)

    def count_prefixes(self) -> None:
        """The prefixes have changed: those that do not fit beside the promises are evicted."""
        self._count(PREFIXES)

    def count_features(self) -> None:
        """The same for the features of images."""
        self._count(FEATURES)

    def _count(self, name: str) -> None:
        store = self._stores.get(name)
        if self.budget is None or store is None:
            return
        while not self.budget.reserve(name, store.nbytes):
            room = self.budget.free + self.budget.of(name)
            if not store.evict(store.nbytes - room):
                self.budget.reserve(name, room)  # the rest is on its way to the disk
                return
