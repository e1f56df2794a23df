"""Finds stop strings in a text that arrives in segments, wherever their borders fall.

Works on text alone: knows neither tokens nor ids, and nothing of end-of-text tokens, which stop a
generation by id.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlx_edge.errors import InvalidRequestError


class StopMatcher:
    """Passes a text on until the first stop string is complete.

    The first stop string is the one that is complete first; of several that end at the same
    character the longest, so that the result does not depend on how the text was cut. Held back is
    only the longest end of the text that could still begin a stop string. Time: characters times
    stop strings (Knuth, Morris and Pratt, 1977).
    """

    def __init__(self, stops: Sequence[str]):
        """Take the stop strings; none at all is fine, an empty one is an InvalidRequestError."""
        if isinstance(stops, str) or not all(isinstance(stop, str) for stop in stops):
            raise InvalidRequestError(
                f"stop is {stops!r}, expected a list of strings; write [{stops!r}] for one"
            )
        if "" in stops:
            raise InvalidRequestError("a stop string is empty, expected text; leave it out")
        self._stops = [_Prefix(stop) for stop in dict.fromkeys(stops)]
        self._held = ""
        self._stopped = False

    def push(self, segment: str) -> tuple[str, bool]:
        """Take the next segment; return (text that is safe to emit, whether a stop was found)."""
        if self._stopped:
            return "", True
        text = self._held + segment
        for end, character in enumerate(segment, start=len(self._held) + 1):
            longest = 0
            for stop in self._stops:
                if stop.advance(character):
                    longest = max(longest, len(stop.text))
            if longest:
                self._stopped, self._held = True, ""
                return text[: end - longest], True
        num_safe = len(text) - max((stop.num_matched for stop in self._stops), default=0)
        self._held = text[num_safe:]
        return text[:num_safe], False

    def flush(self) -> str:
        """Return what was held back: the text ended, so it begins no stop string any more."""
        held, self._held = self._held, ""
        for stop in self._stops:
            stop.num_matched = 0
        return held


class _Prefix:
    """How much of one stop string the text ends with."""

    def __init__(self, text: str):
        self.text = text
        self.num_matched = 0
        # _shorter[n]: the longest proper prefix that the first n characters also end with.
        self._shorter = [0] * (len(text) + 1)
        for end in range(2, len(text) + 1):
            length = self._shorter[end - 1]
            while length and text[length] != text[end - 1]:
                length = self._shorter[length]
            self._shorter[end] = length + (text[length] == text[end - 1])

    def advance(self, character: str) -> bool:
        """Take one character; return whether the stop string is now complete."""
        matched = self.num_matched
        while matched and self.text[matched] != character:
            matched = self._shorter[matched]
        self.num_matched = matched + (self.text[matched] == character)
        return self.num_matched == len(self.text)
