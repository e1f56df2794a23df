"""Rows of tokens to calibrate with and to measure on: from a file, a data set of the hub, or a built-in text.

What calibrates never measures: of every five stretches of a text the last is held out. Which these are is decided by
the text alone, not by the length of rows, the seed or the tokenizer: whoever takes the text again measures on the same.

The built-in text is the project's own and free: prose, questions, code, data and mathematics in several languages, and
documents of the stream that the bundled model was trained on (`scripts/pocket_corpus.py`), none of its tests.
"""

import hashlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import mlx.core as mx

from mlx_edge.calibration.documents import cut_text, extract_text
from mlx_edge.errors import InvalidRequestError
from mlx_edge.text import Tokenizer

HELD_OUT = 5  # of every so many stretches the last one measures
STRETCH = 2000  # characters
BUILT_IN = "built-in"


@dataclass(frozen=True)
class Sample:
    """Token rows of one length, and where they are from."""

    rows: mx.array  # (R, L) int32
    source: str
    sha256: str  # of the text that was cut

    @property
    def num_tokens(self) -> int:
        """All of them."""
        return int(self.rows.size)


@dataclass(frozen=True)
class Samples:
    """Rows to calibrate with, and rows that measure; no row is in both."""

    calibration: Sample
    held_out: Sample


def cut_samples(
    tokenizer: Tokenizer,
    text: str,
    source: str,
    *,
    num_rows: int = 64,
    length: int = 256,
    seed: int = 0,
) -> Samples:
    """At most `num_rows` rows of `length` tokens to calibrate with, and a quarter as many held out.

    Rows are in the text's order and begin as the tokenizer begins a text. `seed` moves the places where calibration
    rows are cut; those held out stay. Raises: InvalidRequestError when the text is too short for a row of each.
    """
    digest = hashlib.sha256(text.encode()).hexdigest()
    start = tokenizer.encode("")[:1]
    if start != [tokenizer.bos_token_id]:
        start = []
    kept, held = (tokenizer.encode(part, add_special_tokens=False) for part in split_held_out(text))
    width = length - len(start)
    if len(held) < width or len(kept) < width:
        total = len(kept) + len(held)
        needed = max(HELD_OUT * length, total + length)
        raise InvalidRequestError(
            f"{source}: {total} tokens, expected at least {needed} ({HELD_OUT} rows of {length}, one of them held "
            "out); give a longer text or a smaller --sequence-length"
        )
    kept = kept[min(seed * 7 % width, len(kept) - width) :]
    calibration = _cut_rows(kept, start, width, num_rows)
    held_out = _cut_rows(held, start, width, max(1, num_rows // 4))
    return Samples(Sample(calibration, source, digest), Sample(held_out, source, digest))


def split_held_out(text: str) -> tuple[str, str]:
    """A text in two: four of every five stretches, and the fifth ones. Stretches end with a line where lines do end."""
    size = max(1, min(STRETCH, len(text) // (4 * HELD_OUT)))
    parts: tuple[list[str], list[str]] = ([], [])
    begin = index = 0
    while begin < len(text):
        newline = text.find("\n", begin + size - 1, begin + 2 * size)
        end = newline + 1 if newline >= 0 else begin + size
        parts[index % HELD_OUT == HELD_OUT - 1].append(text[begin:end])
        begin, index = end, index + 1
    return "".join(parts[0]), "".join(parts[1])


def _cut_rows(tokens: list[int], start: list[int], width: int, number: int) -> mx.array:
    """At most `number` rows (R, L) int32, spread evenly over the tokens."""
    count = len(tokens) // width
    rows = [start + tokens[i * width : (i + 1) * width] for i in spread(list(range(count)), number)]
    return mx.array(rows, dtype=mx.int32)


def spread(indices: list[int], number: int) -> list[int]:
    """At most `number` of the indices, evenly over them all."""
    if len(indices) <= number:
        return indices
    return [indices[i * len(indices) // number] for i in range(number)]


def read_text(source: str) -> tuple[str, str]:
    """A text and what it is called: a file, `built-in`, or an id of a text data set on the hub (owner/name).

    A .jsonl or .json file gives the texts of its documents. Of a long text the first 4 MiB are taken; its name says so.

    Raises: InvalidRequestError when there is no such text or it is no text.
    """
    if source == BUILT_IN:
        text = resources.files("mlx_edge").joinpath("assets/calibration.txt").read_text("utf-8")
        return text, BUILT_IN
    path = Path(source).expanduser()
    name = path.name
    try:
        is_file = path.is_file()
    except (OSError, ValueError) as error:
        raise InvalidRequestError(f"{source[:200]!r} is no name of a file: {error}") from None
    if path.is_dir():
        raise InvalidRequestError(f"{source} is a folder; give a text file (.txt, .jsonl, .json)")
    if not is_file:
        from mlx_edge.calibration.dataset import fetch_text_file

        path, name = fetch_text_file(source)
    return cut_text(extract_text(path, name), name)
