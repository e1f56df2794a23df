"""What proposers propose: the continuation seen before, or a smaller model's own greedy text."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_edge.decoding import proposers
from mlx_edge.decoding.proposers import DraftModel, PromptLookup, make_proposer
from mlx_edge.errors import InvalidRequestError
from mlx_edge.models.decoder import Decoder
from tests.decoding.test_speculation import SMALLER, load_tiny

WORDS = list(range(10, 40))


@pytest.fixture(autouse=True)
def cheap_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is worth proposing must not depend on the machine."""
    monkeypatch.setattr(proposers, "_draft_cost", lambda length: 1.2 + 0.095 * length)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """A small model with a window in one layer and a context of 60."""
    return load_tiny(tmp_path_factory.mktemp("tiny"), max_position_embeddings=60, **SMALLER)


def told(*tokens: int, **options: Any) -> PromptLookup:
    lookup = PromptLookup(**options)
    lookup.start(tokens, 0)
    return lookup


def test_lookup_proposes_what_followed() -> None:
    lookup = told(*WORDS, 1, *WORDS[:20])
    found = lookup.propose(15)
    assert found and found == [*WORDS[20:], 1, *WORDS][: len(found)]
    assert not lookup.is_waiting
    assert lookup.propose(2) == WORDS[20:22]
    assert lookup.propose(0) == []


def test_lookup_prefers_the_longest_match_then_the_newest() -> None:
    # 0 1 2 3 was followed by 7; the newer 4 1 2 3 by 8, and the newest by 6.
    text = [0, 1, 2, 3, 7, 50, 4, 1, 2, 3, 8, 51, 4, 1, 2, 3, 6, 52]
    assert told(*text, 0, 1, 2, 3).propose(1) == [7]
    assert told(*text, 4, 1, 2, 3).propose(1) == [6]
    assert told(*text, 9, 1, 2, 3).propose(1) == [6]


def test_lookup_repeats_a_period() -> None:
    found = told(*[4, 5, 6] * 10).propose(15)
    assert len(found) == 15 and found == [4, 5, 6] * 5


def test_lookup_drafts_more_while_it_is_right_and_nothing_where_it_is_wrong() -> None:
    lookup = told(*WORDS, *WORDS[:3])
    lengths = []
    for token in WORDS[3:20]:
        lengths.append(len(lookup.propose(15)))
        lookup.take(token)
    assert lengths[-1] > lengths[0]
    numbers = np.random.default_rng(0)
    for _ in range(60):  # the same pair, followed by something else each time
        for token in (1, 2, int(numbers.integers(50, 5000))):
            lookup.take(token)
    lookup.take(1)
    lookup.take(2)
    assert lookup.propose(15) == [] and lookup.is_waiting


def test_lookup_is_silent_in_text_without_repetition() -> None:
    tokens = np.random.default_rng(0).permutation(3000).tolist()
    lookup = PromptLookup()
    for token in tokens:
        lookup.take(token)
        assert lookup.is_waiting


def test_lookup_costs_the_same_at_every_token() -> None:
    lookup = told(*[int(t) for t in np.random.default_rng(0).integers(0, 50, 3000)])
    assert len(lookup._places) <= 3 * 3000  # three keys a token, each with one place


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 3), max_size=60),
    st.integers(0, 70),
    st.lists(st.integers(0, 3), max_size=60),
    st.integers(0, 15),
)
def test_lookup_proposes_tokens_of_the_text_after_any_cut(
    first: list[int], cut: int, second: list[int], limit: int
) -> None:
    lookup = told(*first)
    lookup.start(second, cut)
    text = (first[:cut] if cut <= len(first) else []) + second
    drafts = lookup.propose(limit)
    assert len(drafts) <= limit
    joined = text + drafts
    if drafts:  # they follow a place where the newest two tokens stand
        pairs = [tuple(joined[i : i + 3]) for i in range(len(text) - 2)]
        assert (*text[-2:], drafts[0]) in pairs


def is_greedy(model: Decoder, context: list[int], drafts: list[int]) -> bool:
    """Whether these are the likeliest tokens after the context, one after another."""
    logits = model(mx.array([[*context, *drafts[:-1]]], dtype=mx.int32))[0, len(context) - 1 :]
    return mx.argmax(logits, axis=-1).tolist() == drafts


@settings(max_examples=5, deadline=None, derandomize=True)
@given(st.data())
def test_a_draft_model_reads_along_whatever_comes_true(model: Decoder, data: st.DataObject) -> None:
    context = data.draw(st.lists(st.integers(0, 130), min_size=1, max_size=35))
    proposer = DraftModel(model, 131, num_draft_tokens=5)
    proposer.start(context, 0)
    while len(context) < 45:
        drafts = proposer.propose(5)
        assert len(drafts) == 5 and is_greedy(model, context, drafts)
        taken = [*drafts[: data.draw(st.integers(0, 5))], data.draw(st.integers(0, 130))]
        for token in taken:
            proposer.take(token)
        context = context + taken
        if data.draw(st.booleans()):  # another turn, perhaps without what came last
            offset = data.draw(st.integers(max(0, len(context) - 2), len(context)))
            proposer.finish()
            proposer.start([7, 8], offset)
            context = [*context[:offset], 7, 8]


def test_a_draft_model_reads_anew_what_its_cache_has_lost(model: Decoder) -> None:
    proposer = DraftModel(model, 131)
    text = [int(t) for t in np.random.default_rng(1).integers(0, 131, 55)]
    proposer.start(text, 0)
    for start in range(20):  # far enough for the window to have moved on
        proposer.start([start], 3 + start)
    assert is_greedy(model, [*text[:3], *range(20)], proposer.propose(3))


def test_a_draft_model_stops_where_its_context_ends(model: Decoder) -> None:
    proposer = DraftModel(model, 131, num_draft_tokens=5)
    proposer.start([1] * 57, 0)
    assert len(proposer.propose(5)) == 4
    for token in (2, 3, 4):
        proposer.take(token)
    assert len(proposer.propose(5)) == 1
    proposer.take(5)
    assert proposer.propose(5) == []
    with pytest.raises(InvalidRequestError, match="61 tokens, the draft model's context 60"):
        proposer.start([1] * 61, 0)


def test_a_smaller_padding_is_no_other_vocabulary(tmp_path: Path, model: Decoder) -> None:
    padded = load_tiny(tmp_path / "padded", vocab_size=200)
    proposer = make_proposer(model, draft_model=padded)
    assert isinstance(proposer, DraftModel)
    proposer.start([1, 2, 3], 0)
    assert max(proposer.propose(5)) < 131
    proposer = make_proposer(padded, draft_model=model)
    assert isinstance(proposer, DraftModel)
    proposer.start([1, 150, 3], 0)  # a token that the draft model does not have
    assert proposer.propose(5) == []


def test_what_cannot_be_asked_for(tmp_path: Path, model: Decoder) -> None:
    other = load_tiny(tmp_path / "other", vocab_size=300)
    with pytest.raises(InvalidRequestError, match=r"vocabulary of 300 tokens.* one of 131"):
        make_proposer(model, draft_model=other)
    with pytest.raises(InvalidRequestError, match="choose one of them"):
        make_proposer(model, draft_model=model, prompt_lookup=True)
    with pytest.raises(InvalidRequestError, match="nothing drafts"):
        make_proposer(model, num_draft_tokens=3)
    for number in (0, 16):
        with pytest.raises(InvalidRequestError, match=f"num_draft_tokens is {number}"):
            make_proposer(model, num_draft_tokens=number, prompt_lookup=True)
    assert make_proposer(model) is None
