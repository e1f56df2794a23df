"""Samplers against numpy: what each filter keeps, and that a seed replays."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_edge.decoding.sampling import (
    exclude_top_choices,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    make_sampler,
)
from mlx_edge.errors import InvalidRequestError


def logprobs_of(probabilities: list[float]) -> mx.array:
    return mx.log(mx.array([probabilities]))


def kept(logprobs: mx.array) -> set[int]:
    return set(np.flatnonzero(np.isfinite(np.array(logprobs[0]))).tolist())


PROBABILITIES = [0.1, 0.4, 0.05, 0.25, 0.2]  # ranks: 1, 3, 4, 0, 2


@pytest.mark.parametrize(
    ("top_p", "wanted"),
    [(0.01, {1}), (0.39, {1}), (0.41, {1, 3}), (0.84, {1, 3, 4}), (0.9, {0, 1, 3, 4})],
)
def test_top_p_keeps_the_fewest_that_reach_it(top_p: float, wanted: set[int]) -> None:
    assert kept(keep_top_p(logprobs_of(PROBABILITIES), top_p)) == wanted


@pytest.mark.parametrize(("min_p", "at_least", "wanted"), [(0.6, 1, {1, 3}), (1.0, 3, {1, 3, 4})])
def test_min_p_is_relative_to_the_likeliest(min_p: float, at_least: int, wanted: set[int]) -> None:
    assert kept(keep_min_p(logprobs_of(PROBABILITIES), min_p, at_least)) == wanted


@pytest.mark.parametrize(("top_k", "wanted"), [(1, {1}), (3, {1, 3, 4}), (9, {0, 1, 2, 3, 4})])
def test_top_k_keeps_that_many(top_k: int, wanted: set[int]) -> None:
    assert kept(keep_top_k(logprobs_of(PROBABILITIES), top_k)) == wanted


def test_top_k_of_equals_keeps_the_first() -> None:
    assert kept(keep_top_k(mx.zeros((1, 6)), 2)) == {0, 1}


@pytest.mark.parametrize(
    ("threshold", "special", "wanted"),
    [
        (0.22, (), {0, 2, 3, 4}),  # 0.4 goes, 0.25 is the least likely above the threshold
        (0.15, (), {0, 2, 4}),
        (0.15, (1,), {0, 1, 2, 4}),
        (0.45, (), {0, 1, 2, 3, 4}),  # none above
        (0.3, (), {0, 1, 2, 3, 4}),  # one above
        (0.0, (), {2}),
    ],
)
def test_xtc_leaves_the_least_likely_of_the_top(
    threshold: float, special: tuple[int, ...], wanted: set[int]
) -> None:
    assert kept(exclude_top_choices(logprobs_of(PROBABILITIES), threshold, special)) == wanted


def test_xtc_keeps_equals() -> None:
    assert kept(exclude_top_choices(logprobs_of([0.3, 0.3, 0.4]), 0.2)) == {0, 1}


@pytest.mark.filterwarnings("ignore")
def test_xtc_drops_what_mlx_lms_does() -> None:
    from mlx_lm.sample_utils import apply_xtc

    rng = np.random.default_rng(7)
    for threshold in (0.02, 0.1, 0.3):
        for special in ([], [2, 17]):
            row = mx.array(rng.normal(0, 2, (1, 50)), dtype=mx.float32)
            row = row - mx.logsumexp(row, axis=-1, keepdims=True)
            wanted = apply_xtc(row, 1.0, threshold, special)
            assert mx.array_equal(exclude_top_choices(row, threshold, special), wanted)


def test_xtc_comes_as_often_as_asked_and_for_each_row_alone() -> None:
    rows = mx.broadcast_to(logprobs_of([0.6, 0.4]), (4000, 2))
    for probability in (0.0, 0.25, 1.0):
        draws = make_sampler(1.0, xtc_probability=probability, seed=5)(rows)
        wanted = 0.4 * (1 - probability) + probability  # the first goes, where it is used
        assert abs(draws.mean().item() - wanted) < 0.04  # five standard errors


def test_xtc_stands_between_min_p_and_top_k() -> None:
    row = mx.broadcast_to(logprobs_of(PROBABILITIES), (300, 5))
    # min-p leaves 1, 3, 4; XTC (all three above) leaves 4; top-k of 1 would have left 1.
    sampler = make_sampler(1, min_p=0.5, top_k=1, xtc_probability=1, xtc_threshold=0.2, seed=1)
    assert set(sampler(row).tolist()) == {4}


def test_xtc_off_changes_no_seeded_draw() -> None:
    rows = mx.zeros((50, 100))
    plain, off = (make_sampler(1.0, seed=9, **o) for o in ({}, {"xtc_threshold": 0.3}))
    assert plain(rows).tolist() == off(rows).tolist()


def test_xtc_special_tokens_beyond_the_vocabulary_are_refused() -> None:
    sampler = make_sampler(1.0, xtc_probability=1.0, xtc_special_tokens=[5])
    with pytest.raises(InvalidRequestError, match="token 5; the vocabulary has 5"):
        sampler(logprobs_of(PROBABILITIES))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-20, 5, width=32), min_size=1, max_size=40),
    st.floats(0.05, 0.95),
    st.floats(0.05, 1),
    st.integers(1, 50),
)
def test_filters_always_keep_the_likeliest_unchanged(
    logits: list[float], top_p: float, min_p: float, top_k: int
) -> None:
    row = mx.array([logits])
    row = row - mx.logsumexp(row, axis=-1, keepdims=True)
    for found in (keep_top_p(row, top_p), keep_min_p(row, min_p), keep_top_k(row, top_k)):
        assert found.max().item() == row.max().item()
        survivors = np.isfinite(np.array(found))
        assert np.array_equal(np.array(found)[survivors], np.array(row)[survivors])


def test_temperature_zero_is_greedy() -> None:
    assert make_sampler(0.0)(logprobs_of(PROBABILITIES)).tolist() == [1]


def test_seed_replays_and_seeds_differ() -> None:
    row = mx.zeros((1, 1000))

    def draw(seed: int) -> list[int]:
        sampler = make_sampler(1.0, seed=seed)
        return [sampler(row).item() for _ in range(20)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_draws_follow_the_tempered_distribution() -> None:
    row = mx.broadcast_to(logprobs_of(PROBABILITIES), (20000, 5))
    for temp in (0.5, 1.0, 2.0):
        counts = np.bincount(np.array(make_sampler(temp, seed=3)(row)), minlength=5) / 20000
        wanted = np.array(PROBABILITIES) ** (1 / temp)
        assert np.abs(counts - wanted / wanted.sum()).max() < 0.02  # over five standard errors


@pytest.mark.parametrize(
    "options",
    [
        {"temp": -1},
        {"temp": float("nan")},
        {"temp": 1, "top_p": 0},
        {"temp": 1, "top_p": 1.5},
        {"temp": 1, "min_p": -0.1},
        {"temp": 1, "min_tokens_to_keep": 0},
        {"temp": 1, "top_k": -3},
        {"temp": 1, "seed": -1},
        {"temp": 1, "xtc_probability": 1.1},
        {"temp": 1, "xtc_probability": -0.1},
        {"temp": 1, "xtc_threshold": 0.6},
        {"temp": 0, "xtc_threshold": -0.1},
        {"temp": 1, "xtc_special_tokens": [-1]},
    ],
    ids=str,
)
def test_values_outside_their_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InvalidRequestError, match="expected"):
        make_sampler(**options)
