"""What a tokenizer library must offer to stand behind `Tokenizer`.

Deliberately knows nothing of chat templates, of end-of-text ids and of the files that a backend is
read from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol


class PieceReader(Protocol):
    """Reads the tokens of one text in order; a fresh one begins a text."""

    def read(self, token_id: int) -> bytes:
        """Return the bytes that this token adds to the text; an id without a token adds none."""
        ...


class Backend(Protocol):
    """A vocabulary, how a text is cut into its tokens and how they become a text again."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that has a token."""
        ...

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids that the vocabulary itself marks as special or control tokens."""
        ...

    @property
    def named_tokens(self) -> Mapping[str, str]:
        """Special tokens that the vocabulary itself names: "bos_token" -> "<s>"."""
        ...

    @property
    def post_processes(self) -> bool:
        """Whether the file itself says what stands around a text; if not, by default BOS does."""
        ...

    @property
    def bad_bytes(self) -> Literal["replace", "surrogateescape"]:
        """How bytes that are not UTF-8 are marked: U+FFFD per broken character, or one per byte."""
        ...

    def encode(self, text: str, *, post_process: bool) -> list[int]:
        """Return the ids of `text`; special tokens written out in it become single ids."""
        ...

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a piece or added token, None if there is none."""
        ...

    def id_to_token(self, token_id: int) -> str | None:
        """Return the piece or added token of an id, None if there is none."""
        ...

    def new_reader(self) -> PieceReader:
        """Return a reader for the tokens of one text."""
        ...
