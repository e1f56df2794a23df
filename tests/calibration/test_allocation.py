"""The knapsack against trying everything, its promises over random tables, and targets that cannot be met."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_edge.calibration import allocation
from mlx_edge.calibration.allocation import (
    Option,
    allocate,
    bits_per_weight,
    fit_budget,
    fit_damage,
    list_options,
    predicted_kl,
)
from mlx_edge.calibration.sensitivity import Sensitivity
from mlx_edge.errors import InvalidRequestError
from mlx_edge.quant import Packing

quickly = settings(deadline=None, max_examples=60)
PACKINGS = (Packing(64, 2), Packing(64, 4), Packing(32, 4), Packing(64, 8))
OPTIONS = st.builds(
    Option,
    packing=st.none(),
    num_bits=st.integers(1, 40),
    damage=st.integers(0, 20).map(lambda eighths: eighths / 8),  # sums without rounding; ties
)
CHOICES = st.lists(st.lists(OPTIONS, min_size=1, max_size=4), min_size=1, max_size=4)


def make_table(scale: float = 1.0, dtype: str = "float16") -> Sensitivity:
    """Three layers; the second can only be packed in groups of 32."""
    return Sensitivity(
        shapes={"a": (64, 128), "b": (32, 96), "c": (256, 64)},
        candidates=PACKINGS,
        damages={
            "a": (0.9 * scale, 0.2 * scale, 0.15 * scale, 0.01 * scale),
            "b": (None, None, 0.3 * scale, None),
            "c": (0.5 * scale, 0.05 * scale, 0.04 * scale, 0.001 * scale),
        },
        dtype=dtype,
        num_tokens=8,
        sha256="",
    )


def total(chosen: list[Option] | tuple[Option, ...]) -> tuple[float, int]:
    """Damage and bits."""
    return sum(option.damage for option in chosen), sum(option.num_bits for option in chosen)


def smallest(choices: list[list[Option]]) -> int:
    return sum(min(option.num_bits for option in choice) for choice in choices)


@quickly
@given(choices=CHOICES, spare=st.integers(0, 100))
def test_a_budget_is_spent_as_well_as_can_be(choices: list[list[Option]], spare: int) -> None:
    budget = smallest(choices) + spare
    within = [total(chosen) for chosen in product(*choices) if total(chosen)[1] <= budget]
    assert total(fit_budget(choices, budget)) == min(within)


@quickly
@given(choices=CHOICES, allowed=st.integers(0, 80))
def test_the_fewest_bits_for_a_damage(choices: list[list[Option]], allowed: int) -> None:
    least = sum(min(option.damage for option in choice) for choice in choices)
    max_damage = least + allowed / 8
    within = [total(chosen)[::-1] for chosen in product(*choices) if total(chosen)[0] <= max_damage]
    assert total(fit_damage(choices, max_damage))[::-1] == min(within)


@quickly
@given(choices=CHOICES, spare=st.integers(0, 100))
def test_rounded_sizes_still_keep_both_bounds(choices: list[list[Option]], spare: int) -> None:
    budget = smallest(choices) + spare
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "MAX_CELLS", 5)
        assert total(fit_budget(choices, budget))[1] <= budget
        assert total(fit_damage(choices, 10.0 * len(choices)))[0] <= 10.0 * len(choices)


@quickly
@given(choices=CHOICES, spare=st.integers(0, 100), more=st.integers(0, 100))
def test_a_larger_budget_is_never_worse(choices: list[list[Option]], spare: int, more: int) -> None:
    budget = smallest(choices) + spare
    assert total(fit_budget(choices, budget + more))[0] <= total(fit_budget(choices, budget))[0]


@pytest.mark.parametrize("target", [4.2, 4.5, 5.0, 7.99, 8.5, 15.9])
def test_the_real_bits_of_an_allocation_keep_to_the_target(target: float) -> None:
    table = make_table()
    chosen = allocate(table, target_bpw=target)
    assert list(chosen) == list(table.shapes)
    assert bits_per_weight(chosen, table.shapes, 16) <= target
    assert chosen["b"] in (None, Packing(32, 4))


def test_bits_are_counted_with_scales_and_floats() -> None:
    options = list_options(make_table(dtype="float32"))
    assert [option.num_bits for option in options["a"]] == [
        64 * 128 * 32,
        64 * 128 * 2 + 64 * 2 * 64,
        64 * 128 * 4 + 64 * 2 * 64,
        64 * 128 * 4 + 64 * 4 * 64,
        64 * 128 * 8 + 64 * 2 * 64,
    ]
    assert [option.packing for option in options["b"]] == [None, Packing(32, 4)]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ({"target_bpw": 16}, {"a": None, "b": None, "c": None}),
        ({"target_bpw": 1e300}, {"a": None, "b": None, "c": None}),
        ({"max_kl": 0.0}, {"a": None, "b": None, "c": None}),
        ({"max_kl": 9.0}, {"a": Packing(64, 2), "b": Packing(32, 4), "c": Packing(64, 2)}),
        ({"max_kl": 0.02}, {"a": Packing(64, 8), "b": None, "c": Packing(64, 8)}),
    ],
)
def test_targets_at_the_ends(target: dict[str, float], expected: dict[str, Packing | None]) -> None:
    assert allocate(make_table(), **target) == expected


def test_equal_damages_take_the_smaller_size() -> None:
    table = make_table(scale=0.0)
    least = {"a": Packing(64, 2), "b": Packing(32, 4), "c": Packing(64, 2)}
    assert allocate(table, target_bpw=16) == least


def test_the_predicted_damage_is_the_sum_over_layers() -> None:
    packings = {"a": Packing(64, 4), "b": None, "c": Packing(64, 8)}
    assert predicted_kl(make_table(), packings) == pytest.approx(0.2 + 0.001)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({}, "either target_bpw or max_kl"),
        ({"target_bpw": 4.5, "max_kl": 0.1}, "either target_bpw or max_kl"),
        ({"target_bpw": 2.6}, r"target_bpw is 2.6; .* down to 2\.7\d* bits per weight"),
        ({"target_bpw": float("nan")}, "target_bpw is nan"),
        ({"target_bpw": -1.0}, "target_bpw is -1"),
        ({"max_kl": -0.1}, "max_kl is -0.1"),
        ({"max_kl": float("nan")}, "max_kl is nan"),
    ],
)
def test_what_cannot_be_had_is_refused(target: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        allocate(make_table(), **target)


def test_the_size_of_a_real_model_is_solved_exactly_and_soon() -> None:
    shapes = {"embed": (151936, 1024)}
    for index in range(28):
        shapes |= {f"{index}.{n}": (1024, 1024) for n in "qkvo"}
        shapes |= {f"{index}.up": (3072, 1024), f"{index}.down": (1024, 3072)}
    damages = {n: tuple(2.0**-p.bits * (1 + i % 5) for p in PACKINGS) for i, n in enumerate(shapes)}
    table = Sensitivity(shapes, PACKINGS, damages, "float16", 8, "")
    chosen = allocate(table, target_bpw=4.5)
    assert 4.49 <= bits_per_weight(chosen, shapes, 16) <= 4.5
