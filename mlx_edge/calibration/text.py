"""Rows of tokens to calibrate with and to measure on: from a file, a data set of the hub, or a built-in text.

What calibrates never measures: a text is cut into rows, and of every five rows the last is held out.
"""

import hashlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import mlx.core as mx

from mlx_edge.errors import InvalidRequestError
from mlx_edge.text import Tokenizer

HELD_OUT = 5  # of every so many rows the last one measures
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

    `seed` moves the places where the text is cut. Raises: InvalidRequestError when the text is too short for five rows.
    """
    digest = hashlib.sha256(text.encode()).hexdigest()
    tokens = tokenizer.encode(text)[seed * 7 % length :]
    count = len(tokens) // length
    if count < HELD_OUT:
        raise InvalidRequestError(
            f"{source}: {len(tokens)} tokens, expected at least {HELD_OUT * length} "
            f"({HELD_OUT} rows of {length}); give a longer text or a smaller --sequence-length"
        )
    rows = mx.array(tokens[: count * length], dtype=mx.int32).reshape(count, length)
    order = range(count)
    held = [i for i in order if i % HELD_OUT == HELD_OUT - 1]
    kept = [i for i in order if i % HELD_OUT != HELD_OUT - 1]
    return Samples(
        Sample(rows[mx.array(spread(kept, num_rows))], source, digest),
        Sample(rows[mx.array(spread(held, max(1, num_rows // 4)))], source, digest),
    )


def spread(indices: list[int], number: int) -> list[int]:
    """At most `number` of the indices, evenly over them all."""
    if len(indices) <= number:
        return indices
    return [indices[i * len(indices) // number] for i in range(number)]


def read_text(source: str) -> tuple[str, str]:
    """A text and what it is called: a file, `built-in`, or an id of a text data set on the hub (owner/name).

    Raises: InvalidRequestError when there is no such text or it is no text.
    """
    if source == BUILT_IN:
        text = resources.files("mlx_edge").joinpath("assets/calibration.txt").read_text("utf-8")
        return text, BUILT_IN
    path = Path(source)
    try:
        if path.is_file():
            return path.read_text("utf-8"), path.name
    except (OSError, ValueError) as error:
        raise InvalidRequestError(f"{source} cannot be read as text: {error}") from None
    raise InvalidRequestError(f"{source}: no such file, and not the id of a data set (owner/name)")
