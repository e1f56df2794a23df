"""Streaming detokenizer: its segments add up to the whole text, which is that of the raw library."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer

from mlx_edge.errors import UnsupportedModelError
from mlx_edge.text import Tokenizer, load_tokenizer
from tests.text import conftest

UNICODE = st.text(
    st.one_of(
        st.sampled_from(list("  the fox.,'\n世界好é😀👩‍👩‍👧🇩🇪")),
        st.sampled_from(["\u0301", "\u0300", "\u200d", "\ufe0f", "ä", "한", "\U0001f3fd"]),
        st.characters(exclude_categories=["Cs"], exclude_characters="\0▁"),
    ),
    max_size=40,
)


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, object], Tokenizer]:
    def write_and_load(name: str, content: object) -> Tokenizer:
        folder: Path = tmp_path_factory.mktemp("model")
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        elif isinstance(content, RawTokenizer):
            (folder / name).write_text(content.to_str(), encoding="utf-8")
        return load_tokenizer(folder)

    return write_and_load


def stream(tokenizer: Tokenizer, ids: Iterable[int], *, skip: bool = False) -> list[str]:
    detokenizer = tokenizer.new_detokenizer(skip_special_tokens=skip)
    segments = []
    for index in ids:
        detokenizer.add_token(index)
        segments.append(detokenizer.last_segment)
    detokenizer.finalize()
    segments.append(detokenizer.last_segment)
    assert detokenizer.tokens == list(ids)
    assert detokenizer.text == "".join(segments)
    return segments


def check(tokenizer: Tokenizer, ids: Sequence[int], expected: str, *, skip: bool = False) -> None:
    assert tokenizer.decode(ids, skip_special_tokens=skip) == expected
    assert "".join(stream(tokenizer, ids, skip=skip)) == expected


def token_ids(vocab_size: int, *, extra: Sequence[int] = ()) -> st.SearchStrategy[list[int]]:
    """Ids of all kinds, also such as have no token; `extra` are drawn often (byte pieces)."""
    anything = st.integers(0, vocab_size + 3)
    return st.lists(st.sampled_from(extra) | anything if extra else anything, max_size=30)


def test_byte_level_is_the_library(load, byte_level):
    tokenizer = load("tokenizer.json", byte_level)

    @settings(max_examples=300)
    @given(ids=token_ids(tokenizer.vocab_size), skip=st.booleans())
    def ids_of_all_kinds(ids, skip):
        check(tokenizer, ids, byte_level.decode(ids, skip_special_tokens=skip), skip=skip)

    @settings(max_examples=200)
    @given(text=UNICODE)
    def texts(text):
        ids = tokenizer.encode(text, add_special_tokens=False)
        segments = stream(tokenizer, ids)
        assert "".join(segments) == text
        assert segments[-1] == ""  # nothing was held back for longer than its character

    ids_of_all_kinds()
    texts()


def test_byte_fallback_json_is_the_library(load, byte_fallback):
    tokenizer = load("tokenizer.json", byte_fallback)

    @settings(max_examples=300)
    @given(ids=token_ids(tokenizer.vocab_size, extra=range(3, 259)), skip=st.booleans())
    def ids_of_all_kinds(ids, skip):
        expected = byte_fallback.decode(ids, skip_special_tokens=skip)
        if "\ufffd" in expected:  # the library marks whole runs: see pieces.py
            expected = tokenizer.decode(ids, skip_special_tokens=skip)
            assert "\ufffd" in expected
        check(tokenizer, ids, expected, skip=skip)

    @settings(max_examples=200)
    @given(text=UNICODE)
    def texts(text):
        ids = tokenizer.encode(text, add_special_tokens=False)
        check(tokenizer, ids, text)
        assert stream(tokenizer, ids)[-1] == ""

    ids_of_all_kinds()
    texts()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": True, "normalization_rule_name": "nmt_nfkc"},
        {"model_type": "unigram", "vocab_size": 320},
    ],
    ids=["llama", "no_prefix", "t5", "unigram"],
)
def test_sentencepiece_is_the_library(load, options):
    model = conftest.train_sentencepiece(**options)
    raw = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = load("tokenizer.model", model)
    byte_ids = [index for index in range(raw.vocab_size()) if raw.is_byte(index)]

    @settings(max_examples=200)
    @given(ids=token_ids(raw.vocab_size(), extra=byte_ids))
    def ids_of_all_kinds(ids):
        # Skipped ids are as if they were not there (as in transformers): a character may span them,
        # which sentencepiece would break. It shows the unknown piece, which counts as special here.
        known = [index for index in ids if index < raw.vocab_size()]
        shown = [index for index in known if index not in tokenizer.special_ids]
        check(tokenizer, [*known, 9999], raw.decode(shown), skip=True)

    @settings(max_examples=200)
    @given(text=UNICODE)
    def texts(text):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == raw.encode(text)
        check(tokenizer, ids, raw.decode(ids))
        if not options.get("remove_extra_whitespaces"):
            assert raw.decode(ids) == text

    ids_of_all_kinds()
    texts()


def test_metaspace_is_the_library(load):
    raw = conftest.train_metaspace()
    tokenizer = load("tokenizer.json", raw)

    @given(ids=token_ids(tokenizer.vocab_size))
    def ids_of_all_kinds(ids):
        check(tokenizer, ids, raw.decode(ids, skip_special_tokens=False))

    ids_of_all_kinds()


@pytest.mark.parametrize("with_decoder", [True, False])
def test_other_decoders_are_asked_token_by_token(load, with_decoder):
    raw = conftest.train_word_piece()
    if not with_decoder:
        raw.decoder = None
    tokenizer = load("tokenizer.json", raw)

    @given(ids=token_ids(tokenizer.vocab_size))
    def ids_of_all_kinds(ids):
        check(tokenizer, ids, raw.decode(ids, skip_special_tokens=False))

    ids_of_all_kinds()


def test_a_decoder_of_bytes_with_unknown_steps_is_refused(load):
    with pytest.raises(UnsupportedModelError, match=r"ByteFallback.*report the model"):
        load("tokenizer.json", conftest.unknown_decoder())


def test_a_character_is_held_back_until_its_last_byte(load, byte_level):
    tokenizer = load("tokenizer.json", byte_level)
    ids = tokenizer.encode("a😀b", add_special_tokens=False)
    assert stream(tokenizer, ids) == ["a", "", "", "", "😀", "b", ""]
    assert stream(tokenizer, ids[:3]) == ["a", "", "", "\ufffd"]


def test_bad_bytes_are_marked_one_by_one_as_sentencepiece_does(load, sentencepiece_model):
    tokenizer = load("tokenizer.model", sentencepiece_model)
    ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in b"\xe4\xbd\xa0\xff\xe4\xbdA"]
    assert stream(tokenizer, ids) == ["", "", "你", "\ufffd", "", "", "\ufffd\ufffdA", ""]


def test_only_the_first_space_of_a_text_is_lost(load, sentencepiece_model):
    tokenizer = load("tokenizer.model", sentencepiece_model)
    the = tokenizer.token_to_id("▁the")
    assert tokenizer.decode([the, the]) == "the the"
    assert tokenizer.decode([1, the]) == "<s> the"
    assert tokenizer.decode([1, the], skip_special_tokens=True) == "the"


def test_a_model_that_removes_spaces_removes_all_of_them_at_the_start(load):
    model = conftest.train_sentencepiece(remove_extra_whitespaces=True)
    raw = sentencepiece.SentencePieceProcessor(model_proto=model)
    space, the = raw.piece_to_id("▁"), raw.piece_to_id("▁the")
    ids = [space, space, the, space]
    assert raw.decode(ids) == "the "
    check(load("tokenizer.model", model), ids, "the ")


def test_reset_begins_a_new_text(load, sentencepiece_model):
    tokenizer = load("tokenizer.model", sentencepiece_model)
    detokenizer = tokenizer.detokenizer
    assert detokenizer is not tokenizer.detokenizer
    the, half = tokenizer.token_to_id("▁the"), tokenizer.token_to_id("<0xE4>")
    for _ in range(2):
        for index in (the, half):
            detokenizer.add_token(index)
        assert (detokenizer.text, detokenizer.last_segment) == ("the", "the")
        detokenizer.reset()
    assert (detokenizer.text, detokenizer.tokens, detokenizer.last_segment) == ("", [], "")


def test_each_token_is_looked_at_once(load, byte_fallback):
    """Linear: the work is one read per token, whatever came before (counted, not timed)."""
    tokenizer = load("tokenizer.json", byte_fallback)
    reads = []
    detokenizer = tokenizer.detokenizer
    read = detokenizer._reader.read
    detokenizer._reader.read = lambda index: reads.append(index) or read(index)
    byte = tokenizer.token_to_id("<0xF0>")
    for _ in range(5000):
        detokenizer.add_token(byte)
        assert len(detokenizer._characters.getstate()[0]) <= 3
        detokenizer.last_segment  # noqa: B018  (reading it is what is tested)
    assert len(reads) == 5000
