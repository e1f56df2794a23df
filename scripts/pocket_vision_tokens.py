"""The tokenizer and the prompt of `pocket-vision`, in the form of GLM-4.1V.

Byte-level BPE, so that any text can be encoded; what training uses often (a word of the screens, the head
of an action) is one token, a digit is always one. The chat template keeps what the model was trained on:
the screenshots and the last instruction. It drops system messages, earlier turns, and what an agent adds
behind an empty line, so that an agent's long prompt fits this small a model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pocket_vision_screens import COLOURS, SHAPES, WORDS
from pocket_vision_tasks import FINISH, PHRASES, TAP_END, TAP_START, phrase
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END, START, SOP = "<|endoftext|>", "[gMASK]", "<sop>"
USER, ASSISTANT = "<|user|>", "<|assistant|>"
IMAGE_START, IMAGE, IMAGE_END = "<|begin_of_image|>", "<|image|>", "<|end_of_image|>"
SPECIAL = (
    END,
    START,
    SOP,
    "<|system|>",
    USER,
    ASSISTANT,
    "<|observation|>",
    IMAGE_START,
    IMAGE_END,
    IMAGE,
    "<|begin_of_video|>",
    "<|end_of_video|>",
    "<|video|>",
)
VOCAB_SIZE = 640
# The heads of actions whole, words with their hyphens, digits one by one, then runs of anything else.
PIECES = (
    r'do\(action="Tap", element=\[|finish\(message="Task completed\."\)|\]\)'
    r"| ?\p{L}+(?:-\p{L}+)*|\p{N}|\s+| ?[^\s\p{L}\p{N}]+"
)
CHAT_TEMPLATE = """[gMASK]<sop><|user|>{{ '\\n' }}
{%- set kept = namespace(task='') %}
{%- for message in messages if message.role == 'user' %}
{%- if message.content is string %}
{%- set text = message.content %}
{%- else %}
{%- set parts = namespace(text='') %}
{%- for part in message.content %}
{%- if part.type == 'text' %}
{%- set parts.text = parts.text + part.text %}
{%- elif part.type in ('image', 'image_url') %}
{{- '<|begin_of_image|><|image|><|end_of_image|>' }}
{%- endif %}
{%- endfor %}
{%- set text = parts.text %}
{%- endif %}
{%- set task = text.strip().split('\\n\\n')[0] %}
{%- if task and not task.startswith('** Screen Info **') %}
{%- set kept.task = task %}
{%- endif %}
{%- endfor %}
{{- kept.task }}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""


def prompt_text(instruction: str) -> str:
    """Return what the template makes of one screenshot and an instruction."""
    return f"{START}{SOP}{USER}\n{IMAGE_START}{IMAGE}{IMAGE_END}{instruction}{ASSISTANT}\n"


def corpus() -> Iterator[str]:
    """Yield the text that the merges are learnt from."""
    rng = np.random.default_rng(7)
    for _ in range(60):
        for word in WORDS:
            yield phrase("word", word, rng, False)
            yield phrase("switch on", word, rng, False)
            yield phrase("switch off", word, rng, False)
        for shape in SHAPES:
            for colour in COLOURS:
                yield phrase("icon", f"{colour} {shape}", rng, False)
        for kind in PHRASES:
            yield phrase(kind, "", rng, False)
        yield from (TAP_START, TAP_END, FINISH) * 20


def build_tokenizer() -> Tokenizer:
    """Return the tokenizer; it is the same at every call."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """Return the id of a token that the vocabulary has."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"{token!r} is not in the vocabulary")
    return int(found)


def single_ids(tokenizer: Tokenizer, names: tuple[str, ...]) -> list[int]:
    """Return the one id of each name behind a space; a name of several tokens is a mistake."""
    found = []
    for name in names:
        ids = tokenizer.encode(f" {name}").ids
        if len(ids) != 1:
            raise ValueError(f"{name!r} is {len(ids)} tokens; expected one: raise VOCAB_SIZE")
        found.append(ids[0])
    return found


def tokenizer_config() -> dict[str, Any]:
    """Return what tokenizer_config.json says."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": END,
        "additional_special_tokens": list(SPECIAL[1:]),
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        "processor_class": "Glm4vProcessor",
        "chat_template": CHAT_TEMPLATE,
    }


def save_tokenizer(folder: Path) -> Tokenizer:
    """Write tokenizer.json and its companions into a folder; return the tokenizer."""
    tokenizer = build_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    text = json.dumps(tokenizer_config(), indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return tokenizer
