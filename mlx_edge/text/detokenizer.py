"""Tokens to text, one token at a time.

The bytes of a token are the business of the backend; here they become characters. A character is
handed out when its last byte is there, so no segment ends within one, and each byte is looked at
once: a text of n tokens costs n steps. `Tokenizer.decode` is this class run over all ids, therefore
the segments always add up to it.

Deliberately not done: `clean_up_tokenization_spaces` (see `tokenizer.py`), and holding back a space
until the next word.
"""

from __future__ import annotations

import codecs
from collections.abc import Set

from mlx_edge.text.backend import Backend

# Python's "surrogateescape" turns a bad byte 0x80..0xFF into the lone surrogate U+DC80..U+DCFF.
_ESCAPED_BYTES = dict.fromkeys(range(0xDC80, 0xDD00), "\ufffd")


class StreamingDetokenizer:
    """Turns tokens into text as they arrive.

    detokenizer = tokenizer.detokenizer
    for token in tokens:
        detokenizer.add_token(token)
        print(detokenizer.last_segment, end="")
    detokenizer.finalize()
    print(detokenizer.last_segment)
    """

    def __init__(self, backend: Backend, *, skipped_ids: Set[int] = frozenset()):
        """Begin an empty text with the vocabulary of `backend`; `skipped_ids` add nothing to it."""
        self._backend = backend
        self._skipped_ids = skipped_ids
        self.reset()

    def reset(self) -> None:
        """Begin a new, empty text."""
        self.tokens: list[int] = []
        self._seen: list[str] = []
        self._unseen: list[str] = []
        self._reader = self._backend.new_reader()
        self._characters = codecs.getincrementaldecoder("utf-8")(self._backend.bad_bytes)

    def add_token(self, token: int) -> None:
        """Append a token; an id that no token has adds nothing to the text."""
        self.tokens.append(token)
        if token not in self._skipped_ids:
            self._append(self._reader.read(token), final=False)

    def finalize(self) -> None:
        """Hand out what was held back: bytes that never became a character turn into U+FFFD."""
        self._append(b"", final=True)

    @property
    def last_segment(self) -> str:
        """The text that became available since this property was last read."""
        segment = "".join(self._unseen)
        self._seen.append(segment)
        self._unseen.clear()
        return segment

    @property
    def text(self) -> str:
        """The whole text so far, without bytes that are still held back. Costs its length."""
        self._seen = ["".join(self._seen)]
        return self._seen[0] + "".join(self._unseen)

    def _append(self, data: bytes, *, final: bool) -> None:
        text = self._characters.decode(data, final)
        if text:
            self._unseen.append(text if text.isascii() else text.translate(_ESCAPED_BYTES))
