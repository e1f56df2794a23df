"""What bench/quantization.py calibrates with and measures on: pocket's own text, by scripts/pocket_corpus.py.

Calibration rows are drawn from the training stream; rows and items that measure are those that it never yields. Knows
neither models nor formats.
"""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import mlx.core as mx

from mlx_edge.text import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import pocket_corpus

LENGTH = 256  # tokens of a row
SUITES = {
    "command": 300,
    "paraphrase": 300,
    "names": 120,
    "qa": 200,
    "facts": 100,
    "screen": 100,
}
HELD_SEED = 5501  # of the rows that KL is measured on; the items have pocket's own seed


@dataclass(frozen=True)
class Item:
    """A request and the one right answer, as ids."""

    suite: str
    prompt: list[int]
    answer: list[int]  # the end included


class PocketText:
    """Rows and items for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        assert bos is not None and eos is not None
        self._bos, self._eos = bos, eos

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _document(self, prompt: str | None, answer: str) -> list[int]:
        asked = [] if prompt is None else self._encode(f"<user>{prompt}<assistant>")
        return [self._bos, *asked, *self._encode(answer), self._eos]

    def calibration_text(self, num_rows: int, seed: int) -> str:
        """At least `num_rows` rows of the training stream, with the markers; every seed another piece of it."""
        stream = pocket_corpus.documents(pocket_corpus.TRAIN_SEED + 1 + seed)
        parts: list[str] = []
        num_tokens = 0
        while num_tokens < num_rows * LENGTH:
            document = next(stream)
            asked = "" if document.prompt is None else f"<user>{document.prompt}<assistant>"
            parts.append(f"<s>{asked}{document.answer}</s>")
            num_tokens += len(self._document(document.prompt, document.answer))
        return "".join(parts)

    def held_out_rows(self, number: int) -> mx.array:
        """Token rows (number, LENGTH) of text that is in no training stream: test items, and stories between them."""
        tests = pocket_corpus.draw_tests(SUITES, HELD_SEED)
        stories = iter(pocket_corpus.held_stories(number, HELD_SEED + 1))
        items = list(chain.from_iterable(zip(*tests.values(), strict=False)))

        def mixed() -> Iterator[list[int]]:
            for index, item in enumerate(items):
                yield self._document(item.prompt, item.answer)
                if index % 8 == 0 and (story := next(stories, None)) is not None:
                    yield self._document(None, story.answer)

        return fill_rows(mixed(), number)

    def items(self, sizes: dict[str, int]) -> list[Item]:
        """The held-out items of pocket's own scores, those of about the same length together."""
        found = [
            Item(
                suite,
                [self._bos, *self._encode(f"<user>{item.prompt}<assistant>")],
                [*self._encode(item.answer), self._eos],
            )
            for suite, items in pocket_corpus.draw_tests(sizes).items()
            for item in items
        ]
        return sorted(found, key=lambda item: len(item.prompt) + len(item.answer))


def fill_rows(documents: Iterable[list[int]], number: int) -> mx.array:
    """The documents one behind the other, cut into `number` rows."""
    tokens: list[int] = []
    for document in documents:
        tokens += document
        if len(tokens) >= number * LENGTH:
            break
    number = min(number, len(tokens) // LENGTH)
    return mx.array(tokens[: number * LENGTH], dtype=mx.int32).reshape(number, LENGTH)
