"""How the pieces of a tokenizer.json become bytes: its `decoder`, one token at a time.

Serves the decoders that language models use, exactly as the tokenizers library decodes a whole
text, but for one thing: where a run of byte pieces is not UTF-8 the library marks every byte of the
run, and nothing of the run could be shown before its end. Here characters in it stay and only bad
bytes are marked, as sentencepiece does.

A text is then read by a `PieceStream`, or for other decoders by a `NeighbourReader`. Deliberately
knows no vocabulary and no library: both are handed in as functions.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SPACE_MARK = "\u2581"  # "▁", sentencepiece's space


@dataclass(frozen=True)
class Recipe:
    """How pieces become bytes: what one says by itself, and what the start of a text takes away."""

    piece_bytes: Callable[[str], bytes]
    num_stripped_spaces: int = 0  # leading spaces that the text loses at most
    first_loses: str = ""  # a mark that the first piece loses wherever it is in the piece
    bytes_run_alone: bool = False  # byte pieces: every bad byte is marked by itself


def read_recipe(decoder: dict[str, Any]) -> Recipe | None:
    """Read a `decoder` section; None for one that has to be left to the library."""
    match decoder:
        case {"type": "ByteLevel"}:
            return Recipe(byte_level_bytes)
        case {"type": "Metaspace", "replacement": str(mark)}:
            always = decoder.get("prepend_scheme", "always") != "never"
            replace = functools.partial(_replaced_bytes, [(mark, " ")])
            return Recipe(replace, first_loses=mark if always else "")
        case {"type": "Sequence", "decoders": [only]}:
            return read_recipe(only)
        case {"type": "Sequence", "decoders": list(steps)}:
            return _read_sequence(steps)
    return None


def byte_level_bytes(piece: str) -> bytes:
    """Return the bytes of a piece in GPT-2's spelling, where each byte has a visible character."""
    alphabet = _byte_level_alphabet()
    try:
        return bytes([alphabet[character] for character in piece])
    except KeyError:  # an added token with other characters stands for itself
        return piece.encode()


def byte_piece(piece: str) -> bytes | None:
    """Return the byte that `<0x0A>` and its like stand for, None for any other piece."""
    found = _BYTE_PIECE.fullmatch(piece)
    return bytes([int(found[1], 16)]) if found else None


class PieceStream:
    """Reads the tokens of one text, knowing where the text begins."""

    def __init__(
        self,
        token_bytes: Callable[[int, bool], bytes | None],
        *,
        num_stripped_spaces: int = 0,
        start_lasts: bool = False,
    ):
        """Take a lookup (id, at the start of the text) -> bytes, None for an id without a token.

        The text loses up to `num_stripped_spaces` leading spaces. It starts with its first token
        alone, or with `start_lasts` goes on starting until a token said something.
        """
        self._token_bytes = token_bytes
        self._num_spaces = num_stripped_spaces
        self._start_lasts = start_lasts
        self._at_start = True

    def read(self, token_id: int) -> bytes:
        """Return the bytes that this token adds to the text."""
        data = self._token_bytes(token_id, self._at_start)
        if data is None:
            return b""
        while self._num_spaces and data.startswith(b" "):
            data = data[1:]
            self._num_spaces -= 1
        if data:
            self._num_spaces = 0
        self._at_start = self._at_start and self._start_lasts and not data
        return data


class NeighbourReader:
    """Asks the library what a token adds to its predecessor, for decoders that look back one token."""

    def __init__(self, decode: Callable[[list[int]], str]):
        """Take the library's decode."""
        self._decode = decode
        self._before: list[int] = []

    def read(self, token_id: int) -> bytes:
        """Return the bytes that this token adds to the text."""
        num_known = len(self._decode(self._before))
        added = self._decode([*self._before, token_id])[num_known:]
        if self._decode([token_id]):
            self._before = [token_id]
        return added.encode()


def _read_sequence(steps: Sequence[dict[str, Any]]) -> Recipe | None:
    """Read Replace*, ByteFallback, Fuse, Strip*, the decoder of converted sentencepiece models."""
    replacements, position = [], 0
    while position < len(steps) and steps[position].get("type") == "Replace":
        step = steps[position]
        if not isinstance(old := step["pattern"].get("String"), str):
            return None
        replacements.append((old, step["content"]))
        position += 1
    if [step.get("type") for step in steps[position : position + 2]] != ["ByteFallback", "Fuse"]:
        return None
    num_spaces = 0
    for step in steps[position + 2 :]:
        if step.get("type") != "Strip" or step["content"] != " " or step["stop"] != 0:
            return None
        num_spaces += step["start"]
    replace = functools.partial(_replaced_or_byte, replacements)
    return Recipe(replace, num_stripped_spaces=num_spaces, bytes_run_alone=True)


def _replaced_bytes(replacements: Sequence[tuple[str, str]], piece: str) -> bytes:
    for old, new in replacements:
        piece = piece.replace(old, new)
    return piece.encode()


def _replaced_or_byte(replacements: Sequence[tuple[str, str]], piece: str) -> bytes:
    data = _replaced_bytes(replacements, piece)
    byte = byte_piece(data.decode())
    return data if byte is None else byte


@functools.cache
def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 as it is, the other 68 bytes from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + rank): byte for rank, byte in enumerate(hidden)
    }
