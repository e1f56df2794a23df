"""What may be shown of a text, why it ends, and which stop string ended it."""

import pytest

from mlx_edge.decoding.text_stream import TextStream
from mlx_edge.text import Tokenizer, load_tokenizer
from mlx_edge.weights.hub import find_model


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(find_model("pocket"))


def run(stream: TextStream, tokens: list[int]) -> tuple[str, str | None]:
    text = ""
    for index, token in enumerate(tokens, start=1):
        part, end = stream.add(token, is_complete=False, is_last=index == len(tokens))
        text += part
        if end:
            return text, end
    raise AssertionError("a text ends")


@pytest.mark.parametrize(
    ("stops", "text", "found"),
    [
        (("ran", "ra"), "The dog ", "ra"),
        (("dog ran", "ran", "n"), "The ", "dog ran"),
        (("cat", "g ran away"), "The do", "g ran away"),
        (("cat",), "The dog ran away", None),
    ],
)
def test_the_stop_that_ended_a_text(
    tokenizer: Tokenizer, stops: tuple[str, ...], text: str, found: str | None
) -> None:
    stream = TextStream(tokenizer, stops)
    tokens = tokenizer.encode("The dog ran away", add_special_tokens=False)
    assert run(stream, tokens) == (text, "stop" if found else "length")
    assert stream.stop_text == found


def test_end_tokens_add_nothing_and_may_be_ignored(tokenizer: Tokenizer) -> None:
    end = min(tokenizer.eos_token_ids)
    dog, ran = (tokenizer.encode(text, add_special_tokens=False) for text in ("The dog", " ran"))
    assert run(TextStream(tokenizer, ()), [*dog, end, *ran]) == ("The dog", "stop")
    ignoring = TextStream(tokenizer, (), stop_tokens={ran[0]}, ignore_eos=True)
    assert run(ignoring, [*dog, end, end, *ran, *dog]) == ("The dog", "stop")


def test_a_cut_text_shows_what_was_held_back(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ("dog barks",))
    shown = ""
    for token in tokenizer.encode("The dog", add_special_tokens=False):
        shown += stream.add(token, is_complete=False, is_last=False)[0]
    assert shown == "The "
    assert stream.finish() == "dog"
