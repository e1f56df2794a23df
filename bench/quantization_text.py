"""What bench/quantization.py calibrates with and measures on: pocket's own text, by scripts/pocket_corpus.py.

Calibration rows are drawn from the training stream; rows and items that measure are those that it never yields. Knows
neither models nor formats.
"""

import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import mlx.core as mx

from mlx_edge.calibration.sensitivity import hash_rows
from mlx_edge.calibration.text import Sample
from mlx_edge.text import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import eval_pocket
import pocket_corpus

__all__ = ["HELD_SEED", "LENGTH", "PocketText", "eval_pocket", "fill_rows", "make_sample"]

LENGTH = (
    64  # tokens of a row; pocket has learned to see one document at a time, and most are shorter
)
HELD_SEED = 5501  # of the rows that KL is measured on; the items have pocket's own seed


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

    def calibration_rows(self, number: int, seed: int) -> Sample:
        """Token rows (number, LENGTH) of the training stream; every seed another piece of it."""
        first = pocket_corpus.TRAIN_SEED + 1 + seed
        stream = pocket_corpus.documents(first)
        rows = fill_rows((self._document(d.prompt, d.answer) for d in stream), number)
        return make_sample(rows, f"the training stream from seed {first}")

    def held_out_rows(self, number: int) -> Sample:
        """Token rows (number, LENGTH) of text that is in no training stream: test items, and stories between them."""
        tests = pocket_corpus.draw_tests(eval_pocket.SUITES, HELD_SEED)
        stories = iter(pocket_corpus.held_stories(number, HELD_SEED + 1))
        items = list(chain.from_iterable(zip(*tests.values(), strict=False)))

        def mixed() -> Iterator[list[int]]:
            for index, item in enumerate(items):
                yield self._document(item.prompt, item.answer)
                if index % 8 == 0 and (story := next(stories, None)) is not None:
                    yield self._document(None, story.answer)

        return make_sample(fill_rows(mixed(), number), "held-out items and stories")

    def items(self, sizes: dict[str, int]) -> list[eval_pocket.Case]:
        """The held-out items of pocket's own scores."""
        return [
            case for case in eval_pocket.build_cases(self._encode, sizes) if case.suite != "story"
        ]


def fill_rows(documents: Iterable[list[int]], number: int) -> mx.array:
    """Rows that begin with a document; what is left of a row is filled with the next ones, and the last one is cut."""
    rows: list[list[int]] = []
    row: list[int] = []
    for document in documents:
        row += document
        if len(row) >= LENGTH:
            rows.append(row[:LENGTH])
            row = []
        if len(rows) == number:
            break
    return mx.array(rows, dtype=mx.int32)


def make_sample(rows: mx.array, source: str) -> Sample:
    """The rows with their hash."""
    return Sample(rows, source, hash_rows(rows))
