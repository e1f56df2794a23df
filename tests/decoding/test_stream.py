"""Text as it comes, on the bundled model: pieces, stops, reasons, and agreement with mlx-lm."""

import mlx.core as mx
import pytest

import mlx_edge
from mlx_edge.decoding.stream import GenerationResponse, generate, stream_generate
from mlx_edge.errors import InvalidRequestError
from mlx_edge.models.decoder import Decoder
from mlx_edge.text import Tokenizer
from mlx_edge.weights.hub import find_model


@pytest.fixture(scope="module")
def pocket() -> tuple[Decoder, Tokenizer]:
    return mlx_edge.load()


@pytest.fixture(scope="module")
def prompt(pocket: tuple[Decoder, Tokenizer]) -> list[int]:
    messages = [{"role": "user", "content": "Once upon a time"}]
    tokens = pocket[1].apply_chat_template(messages, add_generation_prompt=True)
    assert isinstance(tokens, list)
    return tokens


Pocket = tuple[Decoder, Tokenizer]


def collect(pocket: Pocket, prompt: list[int] | str, **options: object) -> list[GenerationResponse]:
    return list(stream_generate(*pocket, prompt, **options))  # type: ignore[arg-type]


def test_pieces_join_to_the_decoded_tokens(pocket: Pocket, prompt: list[int]) -> None:
    responses = collect(pocket, prompt, max_tokens=60)
    tokens = [r.token for r in responses]
    assert "".join(r.text for r in responses) == pocket[1].decode(tokens)
    assert [r.generation_tokens for r in responses] == list(range(1, 61))
    assert [r.finish_reason for r in responses] == [None] * 59 + ["length"]
    last = responses[-1]
    assert (last.prompt_tokens, last.from_draft) == (len(prompt), False)
    assert last.logprobs.shape == (pocket[0].config.vocab_size,)
    assert last.prompt_tps > 0 and last.generation_tps > 0 and last.peak_memory > 0


def test_end_token_stops_and_is_not_text(pocket: Pocket) -> None:
    messages = [{"role": "user", "content": "open the maps app"}]
    tokens = pocket[1].apply_chat_template(messages, add_generation_prompt=True)
    assert isinstance(tokens, list)
    responses = collect(pocket, tokens, max_tokens=100)
    assert responses[-1].finish_reason == "stop"
    assert responses[-1].token in pocket[1].eos_token_ids
    text = "".join(r.text for r in responses)
    assert text == 'do(action="Launch", app="Maps")'


def test_stop_string_across_tokens(pocket: Pocket, prompt: list[int]) -> None:
    whole = generate(*pocket, prompt, max_tokens=60)
    for start, end in ((10, 13), (20, 31), (33, 34)):
        stop = whole[start:end]
        responses = collect(pocket, prompt, max_tokens=60, stop=["never", stop])
        assert "".join(r.text for r in responses) == whole[: whole.index(stop)]
        assert responses[-1].finish_reason == "stop"


def test_unfinished_stop_string_is_given_back_at_the_end(pocket: Pocket, prompt: list[int]) -> None:
    whole = generate(*pocket, prompt, max_tokens=20)
    assert generate(*pocket, prompt, max_tokens=20, stop=[whole[-3:] + "never"]) == whole


def test_one_token_has_a_finite_speed(pocket: Pocket, prompt: list[int]) -> None:
    (response,) = collect(pocket, prompt, max_tokens=1)
    assert response.generation_tps == 0.0
    assert response.finish_reason == "length"


def test_a_prompt_may_be_text_tokens_or_an_array(pocket: Pocket) -> None:
    text = "Once upon a time"
    tokens = pocket[1].encode(text)
    found = [generate(*pocket, p, max_tokens=10) for p in (text, tokens, mx.array(tokens))]
    assert found[0] == found[1] == found[2]
    with_bos = f"{pocket[1].bos_token}{text}"
    assert generate(*pocket, with_bos, max_tokens=10) == found[0]


@pytest.mark.parametrize("prompt", [[], [1, 2.5], ["a"], [1, 2**40]], ids=str)
def test_prompts_that_are_no_tokens(pocket: Pocket, prompt: list[int]) -> None:
    with pytest.raises(InvalidRequestError):
        collect(pocket, prompt)


def test_verbose_prints_what_mlx_lm_prints(
    pocket: Pocket, prompt: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    text = generate(*pocket, prompt, verbose=True, max_tokens=5)
    printed = capsys.readouterr().out
    assert printed.startswith(f"==========\n{text}\n==========\nPrompt: {len(prompt)} tokens, ")


@pytest.mark.filterwarnings("ignore")
def test_tokens_equal_mlx_lms_on_the_same_folder(pocket: Pocket, prompt: list[int]) -> None:
    from mlx_lm import load
    from mlx_lm import stream_generate as theirs

    model, tokenizer = load(str(find_model("pocket")))
    messages = [{"role": "user", "content": "Once upon a time"}]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True) == prompt
    model.set_dtype(mx.float32)  # what we compute in on a CPU
    wanted = [r.token for r in theirs(model, tokenizer, prompt, max_tokens=40)]
    assert [r.token for r in collect(pocket, prompt, max_tokens=40)] == wanted
