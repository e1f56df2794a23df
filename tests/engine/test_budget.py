"""The ledger never promises more than there is, and says in figures why something does not fit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_edge.engine.memory.budget import MemoryBudget, format_size, largest, refuse
from mlx_edge.errors import MemoryBudgetError

OWNERS = st.integers(0, 5)
SIZES = st.integers(0, 120)
ACTIONS = st.lists(st.one_of(st.tuples(OWNERS, SIZES), st.tuples(OWNERS, st.none())), max_size=60)


@given(total=st.integers(10, 200), actions=ACTIONS)
def test_the_sum_of_all_promises_never_exceeds_the_total(
    total: int, actions: list[tuple[int, int | None]]
) -> None:
    budget = MemoryBudget(total, {"weights": 7, "activations": 3})
    held: dict[int, int] = {}
    for owner, size in actions:
        if size is None:
            assert budget.release(owner) == held.pop(owner, 0)
        else:
            others = sum(held.values()) - held.get(owner, 0)
            is_free = 10 + others + size <= total
            assert budget.reserve(owner, size) is is_free
            if is_free:
                held[owner] = size
        assert {owner: budget.of(owner) for owner in held} == held
        assert budget.reserved == 10 + sum(held.values()) <= total
        assert budget.free == total - budget.reserved >= 0


def test_all_that_was_promised_comes_back() -> None:
    budget = MemoryBudget(100, {"weights": 40})
    assert budget.available == 60 and budget.fits_alone(60) and not budget.fits_alone(61)
    assert budget.reserve("a", 60) and not budget.reserve("b", 1)
    assert budget.release("a") == 60 and budget.release("a") == 0
    assert budget.reserve("b", 60) and budget.free == 0


def test_an_owner_that_grows_needs_only_the_difference_and_may_shrink() -> None:
    budget = MemoryBudget(100)
    assert budget.reserve("prefixes", 80) and budget.reserve("prefixes", 100)
    assert budget.reserve("prefixes", 10) and budget.free == 90


def test_a_refused_reservation_leaves_what_was_held() -> None:
    budget = MemoryBudget(100)
    assert budget.reserve("a", 50) and not budget.reserve("a", 101)
    assert budget.of("a") == 50 and budget.free == 50


def test_a_negative_size_is_a_bug_of_the_caller() -> None:
    with pytest.raises(ValueError, match="-1 bytes"):
        MemoryBudget(10).reserve("a", -1)


def test_a_budget_below_the_weights_is_refused_with_its_figures() -> None:
    with pytest.raises(
        MemoryBudgetError, match=r"needs 310 MB .*weights 300 MB, program 10.0 MB.* is 300 MB"
    ):
        MemoryBudget(300_000_000, {"weights": 300_000_000, "program": 10_000_000})


def test_a_refusal_names_need_budget_parts_and_a_way_out() -> None:
    budget = MemoryBudget(300_000_000, {"weights": 50_000_000})
    said = str(refuse(budget, {"KV": 1_000_000_000}, largest_max_tokens=120))
    assert said == (
        "the request needs 1.05 GB (KV 1.00 GB, weights 50.0 MB), the budget is 300 MB; "
        "lower max_tokens to 120, or raise the budget"
    )
    assert "shorten the prompt" in str(refuse(budget, {"KV": 1_000_000_000}))


@given(high=st.integers(0, 300), limit=st.integers(-5, 310))
def test_largest_finds_the_edge(high: int, limit: int) -> None:
    assert largest(lambda n: n <= limit, 1, high) == max(0, min(high, limit))


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (31_400_000, "31.4 MB"),
        (300_000_000, "300 MB"),
        (999_600_000, "1.00 GB"),
        (1_051_000_000, "1.05 GB"),
        (64 << 30, "68.7 GB"),
    ],
)
def test_sizes_read_well(nbytes: int, text: str) -> None:
    assert format_size(nbytes) == text
