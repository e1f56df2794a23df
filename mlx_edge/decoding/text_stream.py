"""Tokens in, text out as it may be shown: whole characters that cannot begin a stop string, until the text ends.

Knows what ends a text: an end token, a stop string, a complete grammar, the last token allowed.
"""

from collections.abc import Collection, Sequence
from typing import Literal

from mlx_edge.text import StopMatcher, Tokenizer

TextEnd = Literal["stop", "length"]


class TextStream:
    """One text. End tokens add nothing to it."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        *,
        stop_tokens: Collection[int] = (),
        ignore_eos: bool = False,
    ) -> None:
        """`stop_tokens` end the text beside the end-of-sequence tokens, or with `ignore_eos` in their place."""
        self._silent = tokenizer.eos_token_ids.union(stop_tokens)
        self._ends = frozenset(stop_tokens) if ignore_eos else self._silent
        self._detokenizer = tokenizer.detokenizer
        self._stops = tuple(stop)
        self._matcher = StopMatcher(stop)
        self._held = ""
        self.segment = ""  # what the newest token has added, whether or not it may be shown
        self.stop_text: str | None = None  # the stop string that ended the text

    def add(self, token: int, *, is_complete: bool, is_last: bool) -> tuple[str, TextEnd | None]:
        """The text that may be shown now, and why the generation ends here, if it does."""
        if token not in self._silent:
            self._detokenizer.add_token(token)
        is_complete = is_complete or token in self._ends
        if is_complete or is_last:
            self._detokenizer.finalize()
        text, is_stopped = self._push()
        if is_stopped:
            return text, "stop"
        if is_complete or is_last:
            return text + self._matcher.flush(), "stop" if is_complete else "length"
        return text, None

    def finish(self) -> str:
        """What was held back: the text is cut here."""
        self._detokenizer.finalize()
        text, is_stopped = self._push()
        return text if is_stopped else text + self._matcher.flush()

    def _push(self) -> tuple[str, bool]:
        self.segment = self._detokenizer.last_segment
        if not self._stops:
            return self.segment, False
        pending = self._held + self.segment
        text, is_stopped = self._matcher.push(self.segment)
        self._held = pending[len(text) :]
        if is_stopped:
            # Of those that stand here, the shortest was complete first.
            found = [stop for stop in self._stops if self._held.startswith(stop)]
            self.stop_text = min(found, key=len)
        return text, is_stopped
