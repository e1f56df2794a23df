"""The loop on a tiny random model: greedy tokens, chunks of prefill, limits."""

from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_edge.cache import QuantizedRows
from mlx_edge.decoding.loop import generate_step
from mlx_edge.errors import InvalidRequestError
from mlx_edge.models.decoder import Decoder
from mlx_edge.models.load import load_model
from tests.models.tiny import CONFIGS, make_model, save_model

PROMPT = mx.array([5, 9, 100, 3, 77, 77, 2, 130, 0, 41], dtype=mx.int32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    config: dict[str, Any] = {**CONFIGS["qwen3"], "max_position_embeddings": 100}
    return load_model(save_model(make_model(config), config, tmp_path_factory.mktemp("tiny")))


def tokens_of(model: Decoder, prompt: mx.array = PROMPT, **options: Any) -> list[int]:
    return [token for token, _ in generate_step(prompt, model, **options)]


def test_greedy_tokens_are_the_argmax_of_the_whole_sequence(model: Decoder) -> None:
    found = tokens_of(model, max_tokens=50)
    sequence = mx.concatenate([PROMPT, mx.array(found, dtype=mx.int32)])
    logits = model(sequence[None])[0]
    wanted = mx.argmax(logits, axis=-1)[PROMPT.size - 1 : -1]
    assert found == wanted.tolist()


@pytest.mark.parametrize("step_size", [1, 3, 5, 10, 64])
def test_chunks_of_prefill_change_no_token(model: Decoder, step_size: int) -> None:
    wanted = tokens_of(model, max_tokens=30)
    assert tokens_of(model, max_tokens=30, prefill_step_size=step_size) == wanted


@pytest.mark.parametrize("float_until", [1, 6, 9, 10, 30])
@pytest.mark.parametrize("step_size", [1, 4, 7])
def test_where_a_prompt_is_cut_is_nothing_to_rows_that_get_packed(
    model: Decoder, float_until: int, step_size: int
) -> None:
    def rows(step_size: int, held: int = 0) -> list[list[float]]:
        cache = model.make_cache(row_format=QuantizedRows(4, 32), float_until=float_until)
        if held:  # of a prompt that was begun before
            list(generate_step(PROMPT[:held], model, max_tokens=1, prompt_cache=cache))
        steps = generate_step(
            PROMPT[held:], model, max_tokens=3, prompt_cache=cache, prefill_step_size=step_size
        )
        return [row.tolist() for _, row in steps]

    whole = rows(64)
    np.testing.assert_allclose(rows(step_size), whole, rtol=0, atol=1e-5)
    np.testing.assert_allclose(rows(64, held=5), whole, rtol=0, atol=1e-5)


def test_prompt_cache_continues(model: Decoder) -> None:
    whole = tokens_of(model, max_tokens=20)
    cache = model.make_cache()
    model(PROMPT[None, :4], cache)
    assert tokens_of(model, PROMPT[4:], max_tokens=20, prompt_cache=cache) == whole


def test_logprobs_are_normalised_and_of_their_token(model: Decoder) -> None:
    for token, logprobs in generate_step(PROMPT, model, max_tokens=5):
        assert logprobs.shape == (model.config.vocab_size,)
        assert mx.exp(logprobs).sum().item() == pytest.approx(1, abs=1e-5)
        assert mx.argmax(logprobs).item() == token


def test_processors_see_all_tokens_and_change_the_choice(model: Decoder) -> None:
    seen: list[list[int]] = []

    def never_twice(tokens: mx.array, logits: mx.array) -> mx.array:
        seen.append(tokens.tolist())
        return mx.put_along_axis(logits, tokens[None], mx.array(-mx.inf), axis=-1)

    found = tokens_of(model, max_tokens=20, logits_processors=[never_twice])
    assert not {*found} & {*PROMPT.tolist()}
    assert len({*found}) == 20
    assert seen[0] == PROMPT.tolist()
    assert all(after[:-1] == before for before, after in pairwise(seen))


class Scripted:
    """A constraint that allows the same tokens at every step, and nothing after `length` of them."""

    def __init__(self, allowed: list[int], length: int, vocab_size: int = 131) -> None:
        self.allowed, self.length, self.vocab_size = allowed, length, vocab_size
        self.taken: list[int] = []
        self.events: list[str] = []

    @property
    def is_finished(self) -> bool:
        return len(self.taken) == self.length

    is_accepting = is_finished

    def mask(self) -> Any:
        self.events.append("mask")
        mask = np.zeros(self.vocab_size, np.bool_)
        mask[self.allowed] = True
        return mask

    def advance(self, token: int) -> None:
        self.events.append("advance")
        self.taken.append(token)

    def rollback(self, num_tokens: int) -> None:
        raise AssertionError("the loop takes nothing back")


def test_a_constraint_that_allows_all_changes_no_token(model: Decoder) -> None:
    found = tokens_of(model, max_tokens=30, constraint=Scripted(list(range(131)), 99))
    assert found == tokens_of(model, max_tokens=30)


def test_a_constraint_leaves_only_what_it_allows_and_ends_the_text(model: Decoder) -> None:
    allowed = [3, 50, 51, 99]
    constraint = Scripted(allowed, 7, vocab_size=100)  # a tokenizer smaller than the model's matrix
    found = list(generate_step(PROMPT, model, max_tokens=30, constraint=constraint))
    tokens = [token for token, _ in found]
    assert constraint.taken == tokens and len(tokens) == 7
    sequence = mx.concatenate([PROMPT, mx.array(tokens, dtype=mx.int32)])
    rows = model(sequence[None])[0, PROMPT.size - 1 : -1]
    best = mx.argmax(rows[:, mx.array(allowed)], axis=-1).tolist()
    assert tokens == [allowed[index] for index in best]
    for _, logprobs in found:
        assert {*np.flatnonzero(np.isfinite(np.array(logprobs))).tolist()} == {*allowed}


def test_masks_are_made_while_the_forward_pass_runs(model: Decoder) -> None:
    constraint = Scripted([1, 2], 3)

    class Recording:
        config, make_cache = model.config, model.make_cache

        def __call__(self, *args: Any, **options: Any) -> mx.array:
            constraint.events.append("forward")
            return model(*args)

    recording: Any = Recording()
    assert len(tokens_of(recording, constraint=constraint)) == 3
    assert constraint.events == ["forward", "mask", "advance"] * 3


def test_a_constraint_out_of_the_models_reach_is_an_error(model: Decoder) -> None:
    with pytest.raises(InvalidRequestError, match="none of the model's 131 tokens"):
        tokens_of(model, constraint=Scripted([131, 140], 3, vocab_size=150))
    with pytest.raises(InvalidRequestError, match="the constraint has ended"):
        tokens_of(model, constraint=Scripted([1], 0))


def test_progress_reaches_the_whole_prompt(model: Decoder) -> None:
    calls: list[tuple[int, int]] = []
    tokens_of(
        model,
        max_tokens=1,
        prefill_step_size=4,
        prompt_progress_callback=lambda *a: calls.append(a),
    )
    assert calls == [(0, 10), (4, 10), (8, 10), (10, 10)]


def test_generation_ends_where_the_context_ends(model: Decoder) -> None:
    prompt = mx.ones((95,), mx.int32)
    assert len(tokens_of(model, prompt, max_tokens=50)) == 6  # the last one is not stored


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (mx.zeros((0,), mx.int32), {}, "one token or more"),
        (mx.zeros((2, 3), mx.int32), {}, "one token or more"),
        (mx.ones((101,), mx.int32), {}, "context 100"),
        (mx.array([1, 131]), {}, "token 131; the vocabulary has 131"),
        (mx.array([1, -1]), {}, "token -1"),
        (PROMPT, {"max_tokens": 0}, "max_tokens"),
        (PROMPT, {"prefill_step_size": 0}, "prefill_step_size"),
    ],
    ids=["empty", "matrix", "long", "large", "negative", "none", "step"],
)
def test_requests_that_cannot_be_served(
    model: Decoder, prompt: mx.array, options: dict[str, int], message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        tokens_of(model, prompt, **options)
