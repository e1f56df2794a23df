"""Logits processors: equal to mlx-lm's, one formula each, and nothing outside its range."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_edge.decoding.processors import make_logits_processors
from mlx_edge.errors import InvalidRequestError

TOKENS = [3, 1, 3, 7, 3, 0, 1]  # counts: 3 three times, 1 twice, 0 and 7 once
LOGITS = [1.5, -2.0, 0.25, 4.0, 0.0, -0.5, 3.0, -1.0]


def apply(options: dict[str, Any], tokens: list[int] | None = None) -> list[float]:
    logits = mx.array([LOGITS])
    for process in make_logits_processors(**options):
        logits = process(mx.array(TOKENS if tokens is None else tokens, dtype=mx.int32), logits)
    assert logits.shape == (1, len(LOGITS))
    return logits[0].tolist()


def test_bias_is_added() -> None:
    wanted = list(LOGITS)
    wanted[2] += 5
    wanted[7] -= 100
    assert apply({"logit_bias": {2: 5, 7: -100.0}}) == wanted


def test_repetition_pushes_towards_unlikely_once_a_token() -> None:
    wanted = [x if i not in TOKENS else x * 2 if x < 0 else x / 2 for i, x in enumerate(LOGITS)]
    assert apply({"repetition_penalty": 2.0}) == wanted


def test_presence_counts_once_and_frequency_each_time() -> None:
    counts = np.bincount(TOKENS, minlength=len(LOGITS))
    wanted = np.array(LOGITS) - 0.5 * (counts > 0)
    assert apply({"presence_penalty": 0.5}) == wanted.tolist()
    assert apply({"frequency_penalty": 0.5}) == (np.array(LOGITS) - 0.5 * counts).tolist()
    assert apply({"frequency_penalty": -0.5}) == (np.array(LOGITS) + 0.5 * counts).tolist()


@pytest.mark.parametrize("name", ["repetition", "presence", "frequency"])
def test_only_the_newest_tokens_count(name: str) -> None:
    options = {f"{name}_penalty": 1.5, f"{name}_context_size": 2}
    assert apply(options) == apply(options, TOKENS[-2:])
    assert apply(options) != apply({f"{name}_penalty": 1.5})


def test_nothing_asked_for_is_no_processor() -> None:
    assert make_logits_processors() == []
    assert make_logits_processors({}, 0.0, 20, 0, 20, None) == []


def test_no_tokens_yet_changes_nothing() -> None:
    options = {"repetition_penalty": 2.0, "presence_penalty": 1.0, "frequency_penalty": 1.0}
    assert apply(options, []) == LOGITS


def test_what_was_given_is_not_written_to() -> None:
    logits, tokens = mx.array([LOGITS]), mx.array(TOKENS, dtype=mx.int32)
    for process in make_logits_processors({1: 2.0}, 1.3, 20, 0.5, 20, 0.5):
        process(tokens, logits)
    assert logits[0].tolist() == LOGITS


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"logit_bias": {5: 3.25, 0: -7.5, 99: 0.1}},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.7, "repetition_context_size": 5},
        {"presence_penalty": 0.9},
        {"presence_penalty": -0.9, "presence_context_size": 100},
        {"frequency_penalty": 0.3},
        {"frequency_penalty": 1.1, "frequency_context_size": 3},
        {
            "logit_bias": {1: 1.5},
            "repetition_penalty": 1.1,
            "presence_penalty": 0.2,
            "frequency_penalty": 0.1,
        },
    ],
    ids=str,
)
def test_results_equal_mlx_lms(options: dict[str, Any], dtype: mx.Dtype) -> None:
    from mlx_lm.sample_utils import make_logits_processors as theirs

    rng = np.random.default_rng(5)
    for length in (1, 4, 20, 60):
        tokens = mx.array(rng.integers(0, 100, length), dtype=mx.int32)
        logits = mx.array(rng.normal(0, 4, (1, 100))).astype(dtype)
        found, wanted = logits, logits + 0  # theirs writes into what it is given
        for process in make_logits_processors(**options):
            found = process(tokens, found)
        for process in theirs(**options):
            wanted = process(tokens, wanted)
        assert found.dtype == dtype
        assert mx.array_equal(found, wanted)


@pytest.mark.parametrize(
    "options",
    [
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {"5": 1.0}},
        {"logit_bias": {2**31: 1.0}},
        {"logit_bias": {5: float("inf")}},
        {"logit_bias": {5: "x"}},
        {"repetition_penalty": -1.0},
        {"repetition_penalty": float("nan")},
        {"repetition_penalty": "1"},
        {"presence_penalty": float("inf")},
        {"frequency_penalty": True},
        {"repetition_context_size": 0},
        {"presence_context_size": -5},
        {"frequency_context_size": 2.5},
    ],
    ids=str,
)
def test_values_outside_their_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="expected"):
        make_logits_processors(**options)


def test_a_bias_beyond_the_vocabulary_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="token 8; the vocabulary has 8"):
        apply({"logit_bias": {8: 1.0}})
