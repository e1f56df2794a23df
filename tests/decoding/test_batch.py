"""A batch of ragged prompts gives every row the tokens that it has alone."""

import mlx.core as mx
import pytest

import mlx_edge
from mlx_edge.decoding.batch import batch_generate
from mlx_edge.decoding.loop import generate_step
from mlx_edge.decoding.sampling import make_sampler
from mlx_edge.errors import InvalidRequestError
from mlx_edge.models.decoder import Decoder
from mlx_edge.text import Tokenizer

Pocket = tuple[Decoder, Tokenizer]
TEXTS = [
    "Once upon a time",
    "open the maps app",
    "The red key is in the kitchen. The blue box is in the garden. Where is the red key?",
    "tell me a story about a fox named Lily",
    "set an alarm for 7:45",
]


@pytest.fixture(scope="module")
def pocket() -> Pocket:
    return mlx_edge.load()


@pytest.fixture(scope="module")
def prompts(pocket: Pocket) -> list[list[int]]:
    def encode(text: str) -> list[int]:
        tokens = pocket[1].apply_chat_template([{"role": "user", "content": text}])
        assert isinstance(tokens, list)
        return tokens

    return [encode(text) for text in TEXTS]


def alone(pocket: Pocket, prompt: list[int], limit: int, **options: object) -> list[int]:
    found = []
    steps = generate_step(mx.array(prompt), pocket[0], max_tokens=limit, **options)  # type: ignore[arg-type]
    for token, _ in steps:
        if token in pocket[1].eos_token_ids:
            break
        found.append(token)
    return found


@pytest.mark.parametrize("step_size", [5, 2048])
def test_rows_equal_single_runs(pocket: Pocket, prompts: list[list[int]], step_size: int) -> None:
    found = batch_generate(*pocket, prompts, 70, prefill_step_size=step_size)
    assert found.token_ids == [alone(pocket, prompt, 70) for prompt in prompts]
    assert found.texts == [pocket[1].decode(tokens) for tokens in found.token_ids]
    assert found.stats.prompt_tokens == sum(map(len, prompts))
    assert found.stats.generation_tokens == sum(map(len, found.token_ids))


def test_each_row_has_its_own_limit(pocket: Pocket, prompts: list[list[int]]) -> None:
    limits = [1, 7, 3, 40, 12]
    found = batch_generate(*pocket, prompts, limits)
    wanted = [alone(pocket, p, n) for p, n in zip(prompts, limits, strict=True)]
    assert found.token_ids == wanted


def test_sampled_rows_with_their_own_seeds_equal_single_runs(
    pocket: Pocket, prompts: list[list[int]]
) -> None:
    samplers = [make_sampler(0.9, seed=seed) for seed in range(len(prompts))]
    found = batch_generate(*pocket, prompts, 25, sampler=samplers)
    wanted = [
        alone(pocket, prompt, 25, sampler=make_sampler(0.9, seed=seed))
        for seed, prompt in enumerate(prompts)
    ]
    assert found.token_ids == wanted


def test_one_prompt_and_one_token(pocket: Pocket) -> None:
    found = batch_generate(*pocket, [[1]], 1)
    assert [len(tokens) for tokens in found.token_ids] == [1]


def test_no_prompts_are_refused(pocket: Pocket) -> None:
    with pytest.raises(InvalidRequestError, match="no prompts"):
        batch_generate(*pocket, [])
