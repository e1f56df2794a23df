"""Speculative decoding changes how fast a text comes and nothing else: tokens, draws and caches are the loop's."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mlx_edge
from mlx_edge.cache import QuantizedRows
from mlx_edge.decoding.loop import generate_step
from mlx_edge.decoding.processors import make_logits_processors
from mlx_edge.decoding.proposers import DraftModel, PromptLookup, Proposer
from mlx_edge.decoding.sampling import make_sampler
from mlx_edge.decoding.speculation import DraftedStep, speculative_generate_step
from mlx_edge.decoding.stream import describe, generate, stream_generate
from mlx_edge.errors import InvalidRequestError
from mlx_edge.models.bridge import BridgedCache, BridgedConfig, BridgedModel
from mlx_edge.models.decoder import Decoder
from mlx_edge.models.load import load_model
from tests.decoding.test_loop import Scripted
from tests.models.tiny import CONFIGS, make_model, save_model

PROMPT = [5, 9, 100, 3, 77, 77, 2, 130, 0, 41]
LENGTH = 32
CACHES: dict[str, dict[str, Any]] = {
    "full": {},
    "ring": {"max_kv_size": 24},
    "8 bit": {"row_format": QuantizedRows(8, 32)},
    "packed later": {"row_format": QuantizedRows(4, 32), "float_until": 23},
    "packed ring": {"row_format": QuantizedRows(8, 32), "max_kv_size": 20},
}


SMALLER = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}


def load_tiny(folder: Path, seed: int = 0, **changes: Any) -> Decoder:
    config = {**CONFIGS["windows"], "max_position_embeddings": 100, **changes}
    return load_model(save_model(make_model(config, seed), config, folder))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """A model with layers of both kinds: windows of 20, and none."""
    return load_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """A smaller model, with a window."""
    return load_tiny(tmp_path_factory.mktemp("draft"), **SMALLER)


@pytest.fixture(scope="module")
def plain(model: Decoder) -> dict[str, list[int]]:
    """What plain decoding says, per kind of cache."""
    return {
        kind: run_plain(model, prompt_cache=model.make_cache(**c)) for kind, c in CACHES.items()
    }


def array(tokens: Sequence[int]) -> mx.array:
    return mx.array(list(tokens), dtype=mx.int32)


def run_plain(model: Any, prompt: Sequence[int] = PROMPT, **options: Any) -> list[int]:
    options = {"max_tokens": LENGTH, **options}
    return [token for token, _ in generate_step(array(prompt), model, **options)]


def run(
    model: Any, proposer: Proposer, prompt: Sequence[int] = PROMPT, **options: Any
) -> list[DraftedStep]:
    options = {"max_tokens": LENGTH, **options}
    return list(speculative_generate_step(array(prompt), model, proposer, **options))


def tokens_of(steps: Iterable[DraftedStep]) -> list[int]:
    return [step.token for step in steps]


class Told:
    """A proposer that knows the text; `plan` says of each draft how many tokens it has, and which one is wrong."""

    def __init__(self, text: Sequence[int], plan: Sequence[tuple[int, int | None]]) -> None:
        self.text, self.plan, self.calls, self.position = list(text), list(plan), 0, 0
        self.asked: list[int] = []
        self.events: list[str] = []

    @property
    def is_waiting(self) -> bool:
        return not self.plan or self.plan[self.calls % len(self.plan)][0] == 0

    def start(self, prompt: Sequence[int], offset: int) -> None:
        self.events.append(f"start {len(prompt)} at {offset}")

    def take(self, token: int) -> None:
        assert token == self.text[self.position]
        self.position += 1
        self.calls += self.is_waiting  # its turn has come, whether it was asked or not

    def propose(self, limit: int) -> list[int]:
        self.asked.append(limit)
        length, wrong = self.plan[self.calls % len(self.plan)] if self.plan else (0, None)
        self.calls += 1
        drafts = self.text[self.position : self.position + min(limit, length)]
        if wrong is not None and wrong < len(drafts):
            drafts[wrong] = (drafts[wrong] + 1) % 131
        return drafts

    def finish(self) -> None:
        self.events.append("finish")


PLANS = st.lists(
    st.tuples(st.integers(0, 15), st.one_of(st.none(), st.integers(0, 14))), max_size=6
)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(CACHES)), PLANS, st.integers(1, LENGTH))
def test_no_proposer_changes_a_token(
    model: Decoder, plain: dict[str, list[int]], kind: str, plan: Any, max_tokens: int
) -> None:
    proposer = Told(plain[kind], plan)
    cache = model.make_cache(**CACHES[kind])
    steps = run(model, proposer, max_tokens=max_tokens, prompt_cache=cache)
    assert tokens_of(steps) == plain[kind][:max_tokens]
    assert proposer.events == [f"start {len(PROMPT)} at 0", "finish"]
    counts = steps[-1].speculation
    assert counts is not None
    assert sum(step.from_draft for step in steps) == counts.accepted <= counts.drafted
    assert counts.accepted + counts.forward_passes in (max_tokens, max_tokens + 1)


@pytest.mark.parametrize(("length", "passes"), [(0, 32), (1, 16), (7, 4), (15, 2)])
def test_right_drafts_save_forward_passes(
    model: Decoder, plain: dict[str, list[int]], length: int, passes: int
) -> None:
    steps = run(model, Told(plain["full"], [(length, None)]))
    counts = steps[-1].speculation
    # The first pass is the prompt's last token: nothing is drafted for it.
    assert counts is not None and counts.forward_passes in (passes, passes + 1)
    assert counts.accepted == counts.drafted == LENGTH - counts.forward_passes


def test_wrong_drafts_cost_no_pass(model: Decoder, plain: dict[str, list[int]]) -> None:
    counts = run(model, Told(plain["full"], [(5, 0)]))[-1].speculation
    assert counts is not None and (counts.accepted, counts.forward_passes) == (0, LENGTH)


@pytest.mark.parametrize("kind", CACHES)
def test_a_closed_generation_leaves_a_cache_that_goes_on(
    model: Decoder, plain: dict[str, list[int]], kind: str
) -> None:
    wanted = plain[kind]
    for count in (1, 2, 5, 6, 14):
        cache = model.make_cache(**CACHES[kind])
        proposer = Told(wanted, [(6, 4), (0, None), (3, None)])
        steps = speculative_generate_step(array(PROMPT), model, proposer, prompt_cache=cache)
        found = tokens_of(next(steps) for _ in range(count))
        steps.close()
        held = cache[0].offset - len(PROMPT)
        assert found == wanted[:count] and held in (count - 1, count)
        assert proposer.events[-1] == "finish"
        rest = run_plain(model, wanted[held : count + 1], prompt_cache=cache, max_tokens=5)
        assert rest == wanted[count + 1 : count + 6]


def test_a_cancelled_prefill_leaves_whole_steps(model: Decoder) -> None:
    def cancel(done: int, _: int) -> None:
        if done >= 6:
            raise KeyboardInterrupt

    cache = model.make_cache()
    with pytest.raises(KeyboardInterrupt):
        run(
            model,
            PromptLookup(),
            prompt_cache=cache,
            prefill_step_size=3,
            prompt_progress_callback=cancel,
        )
    assert cache[0].offset == 6
    assert run_plain(model, PROMPT[6:], prompt_cache=cache) == run_plain(model)


def test_any_thread_may_go_on(model: Decoder, draft: Decoder, plain: dict[str, list[int]]) -> None:
    for proposer in (DraftModel(draft, 131, 4), Told(plain["full"], [(4, 2), (0, None)])):
        steps = speculative_generate_step(array(PROMPT), model, proposer)
        for wanted in plain["full"][:12]:
            with ThreadPoolExecutor(
                1
            ) as pool:  # it has ended, and its streams with it, by the next token
                assert pool.submit(next, steps).result().token == wanted  # type: ignore[arg-type]
        with ThreadPoolExecutor(1) as pool:
            pool.submit(steps.close).result()


def test_the_context_may_end_within_a_draft(model: Decoder) -> None:
    prompt = [1, 2, 3] * 30
    wanted = run_plain(model, prompt, max_tokens=50)
    assert len(wanted) == 11  # the last one is not stored
    assert tokens_of(run(model, Told(wanted, [(15, None)]), prompt, max_tokens=50)) == wanted


SAMPLERS: dict[str, dict[str, Any]] = {
    "hot": {"temp": 1.5},
    "top-p": {"temp": 0.8, "top_p": 0.9},
    "xtc": {"temp": 1.0, "top_k": 20, "xtc_probability": 0.5, "xtc_threshold": 0.05},
}


@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_seed_gives_the_tokens_of_plain_decoding(model: Decoder, kind: str) -> None:
    plain_sampler, sampler = (make_sampler(**SAMPLERS[kind], seed=7) for _ in range(2))
    for _ in range(2):  # a sampler goes on where it stopped
        wanted = run_plain(model, sampler=plain_sampler, max_tokens=20)
        proposer = Told(wanted, [(4, 2), (7, None), (0, None)])
        assert tokens_of(run(model, proposer, sampler=sampler, max_tokens=20)) == wanted


def test_a_stopped_sampler_has_drawn_as_often_as_in_plain_decoding(model: Decoder) -> None:
    wanted = run_plain(model)

    def count_draws(steps: Any, num_tokens: int, draws: list[int]) -> int:
        for _ in range(num_tokens):
            next(steps)
        steps.close()
        return len(draws)

    for num_tokens in (1, 4, 5, 12):
        found = []
        for plan in (None, [(6, 3), (0, None), (2, None)]):
            draws: list[int] = []

            def sampler(logprobs: mx.array, draws: list[int] = draws) -> mx.array:
                draws.append(0)
                return mx.argmax(logprobs, axis=-1)

            steps: Any = (
                generate_step(array(PROMPT), model, sampler=sampler)
                if plan is None
                else speculative_generate_step(
                    array(PROMPT), model, Told(wanted, plan), sampler=sampler
                )
            )
            found.append(count_draws(steps, num_tokens, draws))
        assert found[0] == found[1]


def test_processors_see_what_they_see_in_plain_decoding(model: Decoder) -> None:
    seen: list[list[int]] = []

    def watch(tokens: mx.array, logits: mx.array) -> mx.array:
        seen.append(tokens.tolist())
        return logits

    processors = [watch, *make_logits_processors(repetition_penalty=1.7, logit_bias={3: 2.0})]
    wanted = run_plain(model, logits_processors=processors)
    first, seen = seen, []
    steps = run(model, Told(wanted, [(5, None), (3, 1), (0, None)]), logits_processors=processors)
    assert tokens_of(steps) == wanted and seen == first
    assert wanted != run_plain(model)


@pytest.mark.parametrize("plan", [[(5, None)], [(5, 2), (0, None)]], ids=["right", "mixed"])
def test_a_constraint_is_kept_and_ends_the_text(model: Decoder, plan: Any) -> None:
    allowed = [3, 50, 51, 99]
    wanted = run_plain(model, constraint=Scripted(allowed, 17))
    constraint = Scripted(allowed, 17)
    cache = model.make_cache()
    steps = run(model, Told(wanted, plan), constraint=constraint, prompt_cache=cache)
    assert tokens_of(steps) == wanted == constraint.taken
    assert cache[0].offset - len(PROMPT) in (16, 17)
    for step in steps:
        assert np.isfinite(np.array(step.logprobs)).sum() == len(allowed)


@pytest.mark.parametrize("num_draft_tokens", [1, 5])
@pytest.mark.parametrize("kind", ["full", "ring", "packed later"])
def test_a_draft_model_changes_no_token(
    model: Decoder, draft: Decoder, plain: dict[str, list[int]], kind: str, num_draft_tokens: int
) -> None:
    for drafting in (draft, model):
        proposer = DraftModel(drafting, 131, num_draft_tokens)
        steps = run(model, proposer, prompt_cache=model.make_cache(**CACHES[kind]))
        assert tokens_of(steps) == plain[kind]
    counts = steps[-1].speculation
    assert counts is not None
    if kind == "full":  # the model drafts for itself
        assert (
            counts.accepted
            == counts.drafted
            >= LENGTH * num_draft_tokens // (num_draft_tokens + 1) - 1
        )


def test_lookup_finds_what_repeats(model: Decoder) -> None:
    cycle = [8, 1, 30, 4, 99, 17]

    def recorded() -> Any:
        target = iter(cycle * 20)
        return lambda logprobs: mx.array([next(target)])

    steps = run(model, PromptLookup(), max_tokens=60, sampler=recorded())
    assert tokens_of(steps) == cycle * 10
    counts = steps[-1].speculation
    assert counts is not None and counts.forward_passes < 25


class Chain:
    """A model whose next token depends on the last one alone, with a cache that only counts."""

    def __init__(self, logits: np.ndarray) -> None:
        self.logits = mx.array(logits, dtype=mx.float32)
        self.config = SimpleNamespace(
            model_type="chain", vocab_size=len(logits), context_size=1 << 20
        )

    def __call__(self, tokens: mx.array, cache: Any, *, logits_to_keep: int) -> mx.array:
        cache[0].offset += tokens.shape[1]
        return self.logits[tokens]

    def make_cache(self) -> list[Any]:
        counter = SimpleNamespace(offset=0, arrays=[], num_trimmable=32, num_until_packed=0)
        counter.reserve = lambda _: None

        def trim(count: int) -> None:
            counter.offset -= count

        counter.trim = trim
        return [counter]


class Stubborn(Told):
    """Proposes token 0, then 1, whatever was said."""

    is_waiting = False

    def take(self, token: int) -> None:
        pass

    def propose(self, limit: int) -> list[int]:
        return [0, 1][:limit]


def test_sampled_tokens_have_the_models_distribution() -> None:
    logits = np.random.default_rng(0).normal(size=(5, 5))
    steps = run(
        Chain(logits), Stubborn([], []), [0], max_tokens=1500, sampler=make_sampler(1.0, seed=3)
    )
    tokens = [0, *tokens_of(steps)]
    counts = np.zeros((5, 5))
    np.add.at(counts, (tokens[:-1], tokens[1:]), 1)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = counts.sum(-1, keepdims=True) * probabilities
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 45.3  # 20 degrees of freedom: beyond it once in a thousand
    drafted = steps[-1].speculation
    assert drafted is not None and 0 < drafted.accepted < drafted.drafted


def test_a_cache_that_cannot_go_back_is_refused() -> None:
    class State:
        state: tuple[()] = ()

        def is_trimmable(self) -> bool:
            return False

    config: Any = BridgedConfig("mamba", 131, 100)
    model = BridgedModel(config, Any, lambda *_, **__: None)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match=r"mamba\) has a cache that cannot take back"):
        run(model, PromptLookup(), prompt_cache=[BridgedCache(State())])
    with pytest.raises(InvalidRequestError, match="cannot be forgotten by mlx-lm's State"):
        BridgedCache(State(), 5).trim(1)


@pytest.mark.filterwarnings("ignore")
def test_a_bridged_model_speculates(tmp_path: Path) -> None:
    from mlx_edge.models.bridge import load_bridged

    config = {**CONFIGS["qwen3"], "num_hidden_layers": 1}
    model = load_bridged(save_model(make_model(config), config, tmp_path))
    for options in ({}, {"max_kv_size": 24}):
        wanted = run_plain(model, prompt_cache=model.make_cache(**options))
        proposer = Told(wanted, [(6, 3), (2, None), (0, None)])
        steps = run(model, proposer, prompt_cache=model.make_cache(**options))
        assert tokens_of(steps) == wanted
        assert any(step.from_draft for step in steps)


def test_responses_say_what_was_drafted() -> None:
    model, tokenizer = mlx_edge.load()
    draft_model, _ = mlx_edge.load("pocket-draft")
    prompt = tokenizer.encode("Once upon a time")
    wanted = [r.token for r in stream_generate(model, tokenizer, prompt, 24)]
    for options in ({"draft_model": draft_model, "num_draft_tokens": 4}, {"prompt_lookup": True}):
        responses = list(stream_generate(model, tokenizer, prompt, 24, **options))
        assert [r.token for r in responses] == wanted
        last = responses[-1]
        assert last.speculation is not None
        accepted = sum(r.from_draft for r in responses)
        assert f"\nDrafts: {accepted} of {last.speculation.drafted} accepted, " in describe(last)
    text = tokenizer.decode(wanted)
    for end in (7, 20):
        stop = [text[end : end + 4]]
        found = generate(model, tokenizer, prompt, stop=stop, draft_model=draft_model)
        assert found == text[: text.index(stop[0])]
