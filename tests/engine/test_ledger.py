"""Promises of memory come before stored prefixes, and never exceed the budget."""

from mlx_edge.engine.ledger import FEATURES, PREFIXES, Ledger
from mlx_edge.engine.memory.budget import MemoryBudget


class Shelf:
    """Prefixes of ten bytes each."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes

    def evict(self, nbytes: int) -> int:
        freed = min(self.nbytes, -(-nbytes // 10) * 10)
        self.nbytes -= freed
        return freed


def test_prefixes_give_way_as_far_as_they_must() -> None:
    shelf, budget = Shelf(60), MemoryBudget(100)
    ledger = Ledger(budget, shelf)
    ledger.count_prefixes()
    assert ledger.reserve(1, 30)
    assert shelf.nbytes == 60
    assert ledger.reserve(2, 35)
    assert (shelf.nbytes, budget.of(PREFIXES)) == (30, 30)
    assert not ledger.reserve(3, 36)  # even without prefixes it would be too much
    assert shelf.nbytes == 30
    ledger.release(1)
    assert ledger.reserve(3, 65)
    assert (shelf.nbytes, budget.free) == (0, 0)


def test_features_of_images_give_way_before_prefixes() -> None:
    features, prefixes, budget = Shelf(20), Shelf(40), MemoryBudget(100)
    ledger = Ledger(budget, prefixes, features)
    ledger.count_features()
    ledger.count_prefixes()
    assert ledger.reserve(1, 55)
    assert (features.nbytes, prefixes.nbytes) == (0, 40)
    assert (budget.of(FEATURES), budget.of(PREFIXES)) == (0, 40)
    assert ledger.reserve(2, 25)
    assert (prefixes.nbytes, budget.free) == (20, 0)
    assert not ledger.reserve(3, 21)
    assert ledger.reserve(1, 35)  # a promise that is lowered
    assert ledger.reserve(3, 40)
    assert (prefixes.nbytes, budget.free) == (0, 0)


def test_new_prefixes_take_only_what_is_free() -> None:
    shelf, budget = Shelf(0), MemoryBudget(100)
    ledger = Ledger(budget, shelf)
    assert ledger.reserve(1, 75)
    shelf.nbytes = 60
    ledger.count_prefixes()
    assert (shelf.nbytes, budget.of(PREFIXES)) == (20, 20)


def test_without_a_budget_everything_is_granted() -> None:
    ledger = Ledger(None, None)
    assert ledger.reserve(1, 1 << 60)
    ledger.release(1)
