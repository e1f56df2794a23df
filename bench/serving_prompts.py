"""Prompts of exact numbers of tokens, made before a run and in another process than the one that sends them.

A text goes over the wire, as clients send it. It is cut so that the model's tokenizer makes exactly as many tokens of
it; the usage that comes back is compared with that number. Knows nothing of servers.
"""

import random
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from bench.load import Prompt


@dataclass(frozen=True)
class Workload:
    """What each request is like. New tokens are drawn evenly from a half to one and a half of their mean."""

    prompt_tokens: int = 32
    new_tokens: int = 64
    shared_tokens: int = 0  # of the prompt, the same in all
    is_even: bool = False  # every request asks for exactly `new_tokens`

    @property
    def name(self) -> str:
        """In the rows."""
        shared = f", {self.shared_tokens} shared" if self.shared_tokens else ""
        return f"{self.prompt_tokens}{shared} + {self.new_tokens}"


@lru_cache(maxsize=4)
def open_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer.json."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@lru_cache(maxsize=1)
def _words() -> list[str]:
    text = (files("mlx_edge") / "assets" / "calibration.txt").read_text()
    return text.split()


def make_prompts(
    folder: Path, workload: Workload, count: int, seed: int, *, is_story: bool = False
) -> tuple[Prompt, ...]:
    """`count` prompts, no two of which, nor of another seed, begin alike unless a prefix is shared.

    Counts are without a token that the tokenizer may put first. `is_story`: the beginning of a story as pocket knows
    them, which it tells for a hundred tokens; after other texts it soon writes end tokens, which have no text.
    """
    tokenizer, chance = open_tokenizer(folder), random.Random(seed)
    shared = ""
    if workload.shared_tokens:
        shared = _cut(tokenizer, " ".join(_words()[:2000]), workload.shared_tokens)
    made: list[Prompt] = []
    while len(made) < count:
        text = _tell(chance) if is_story else _number(chance, workload.prompt_tokens)
        text = f"{shared} {text}" if shared else text
        try:
            text = _cut(tokenizer, text, workload.prompt_tokens)
        except ValueError:
            continue  # another place; few end within a word that is split otherwise
        low, high = (workload.new_tokens * part // 2 for part in (1, 3))
        new = workload.new_tokens if workload.is_even else chance.randint(low, high)
        made.append(Prompt(text, workload.prompt_tokens, new))
    return tuple(made)


def _number(chance: random.Random, words: int) -> str:
    """A piece of the text, after a number."""
    begin = chance.randrange(len(_words()) - words)
    return f"{chance.randrange(10**9)} {' '.join(_words()[begin : begin + words])}"


def _tell(chance: random.Random) -> str:
    """The beginning of a story about made-up names."""

    def name() -> str:
        return "".join(
            chance.choice("bdfgklmnprstv") + chance.choice("aeio") for _ in "123"
        ).title()

    first, second = name(), name()
    animal, place = chance.choice(("bear", "fox", "frog", "owl")), chance.choice(("beach", "river"))
    return (
        f"{first} and {second} were friends. Once upon a time there was a little {animal}. Her name was {first}. "
        f"{first} loved to play near the {place}. One cold day, {first} met {second}."
    )


def _cut(tokenizer: Any, text: str, tokens: int) -> str:
    """The beginning of the text that is exactly so many tokens; ValueError where there is none."""
    found = tokenizer.encode(text, add_special_tokens=False)
    if len(found.ids) >= tokens:
        end = found.offsets[tokens - 1][1]
        cut = text[:end]
        if len(tokenizer.encode(cut, add_special_tokens=False).ids) == tokens:
            return cut
    raise ValueError(f"no cut of this text is {tokens} tokens")
