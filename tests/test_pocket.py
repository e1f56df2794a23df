"""The bundled model's greedy answer to the default prompt, token by token."""

import mlx_edge
from mlx_edge.generate import DEFAULT_PROMPT

# fmt: off
PROMPT = [1, 4, 438, 455, 264, 367, 5]
TOKENS = [
    438, 455, 264, 367, 1989, 318, 264, 487, 797, 1989, 447, 402, 264, 1233, 898, 399, 1972,
    534, 1987, 1972, 534, 931, 289, 555, 377, 265, 487, 909, 1987, 1972, 416, 911, 369, 1989,
    1972, 534, 581, 289, 1052, 264, 479, 1227, 1987, 1972, 731, 354, 313, 802, 1702, 289, 348,
    1198, 1987, 1972, 534, 313, 529, 682, 1987, 1972, 1067, 786, 1989, 264, 1066, 399, 1972,
    539, 522, 498, 1987, 322, 811, 1972, 2020, 595, 602, 604, 1972, 539, 1987, 1972, 534, 321,
    1972, 539, 1536, 321, 1536, 1987, 1972, 1074, 1083, 622, 1651, 264, 479, 1227, 1987, 1972,
    1105, 264, 1446, 522, 289, 1163, 354, 1987, 1972, 534, 313, 529, 744, 1987, 1972, 534,
    321, 1972, 539, 734, 558, 862, 265, 647, 493, 521, 1987, 2,
]
# fmt: on
BEGINNING = "Once upon a time, in a big city, there lived a sleepy puppy named Lucy."


def test_greedy_tokens_of_the_default_prompt() -> None:
    model, tokenizer = mlx_edge.load()
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": DEFAULT_PROMPT}])
    assert prompt == PROMPT
    responses = list(mlx_edge.stream_generate(model, tokenizer, prompt))
    assert [response.token for response in responses] == TOKENS
    assert "".join(response.text for response in responses).startswith(BEGINNING)
    assert responses[-1].finish_reason == "stop"


def test_the_draft_speaks_the_same_tokens() -> None:
    _, tokenizer = mlx_edge.load()
    model, draft_tokenizer = mlx_edge.load("pocket-draft")
    assert draft_tokenizer.encode(DEFAULT_PROMPT) == tokenizer.encode(DEFAULT_PROMPT)
    assert draft_tokenizer.vocab_size == tokenizer.vocab_size == model.config.vocab_size
    assert mlx_edge.generate(model, tokenizer, PROMPT, max_tokens=8).startswith("Once upon a time")
