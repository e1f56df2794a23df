"""A text that is still being written, and readers that wait in it.

A reader is a generator: it yields where it needs more text than there is, and goes on when there is more. What it
does depends on the characters alone, never on how they were cut into pieces. Knows no format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]
Sink = Callable[[str], object]

_DEEPEST = 100  # brackets within brackets
_SPACES = re.compile(r"[ \t\r\n]+")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_SCALAR_RUN = re.compile(r"[-+.\w]+", re.ASCII)
_SCALAR = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?|true|false|null", re.ASCII)
_ESCAPE = re.compile(r'["\\/bfnrt]|u[0-9a-fA-F]{4}')


class Malformed(Exception):
    """The text is not what it seemed to begin; says why, in words."""


class Source:
    """The text from `start` on: what was read since then, and what is there to be read."""

    def __init__(self) -> None:
        """Begin with no text."""
        self._text = ""
        self._at = 0
        self.is_closed = False

    def feed(self, text: str) -> None:
        """Add text at the end."""
        self._text += text

    def close(self) -> None:
        """No text will follow."""
        self.is_closed = True

    def begin(self) -> None:
        """Forget what was read: `read` starts here."""
        self._text = self._text[self._at :]
        self._at = 0

    @property
    def read(self) -> str:
        """What was read since `begin`."""
        return self._text[: self._at]

    @property
    def waiting(self) -> str:
        """What is there and was not read."""
        return self._text[self._at :]

    def look(self, length: int) -> str:
        """So many of the characters that are there, unread."""
        return self._text[self._at : self._at + length]

    def skip(self, length: int) -> str:
        """Read so many of the characters that are there."""
        taken = self.look(length)
        self._at += len(taken)
        return taken

    def peek(self) -> Reading[str]:
        """The next character, "" at the end of the text."""
        while self._at == len(self._text) and not self.is_closed:
            yield
        return self.look(1)

    def take_while(self, run: re.Pattern[str], sink: Sink | None = None) -> Reading[str]:
        """The longest run of a class of characters; `sink` gets its parts as they come."""
        parts = []
        while True:
            found = run.match(self._text, self._at)
            if found:
                parts.append(self.skip(found.end() - self._at))
                if sink:
                    sink(parts[-1])
            if self._at < len(self._text) or self.is_closed:
                return "".join(parts)
            yield

    def skip_spaces(self) -> Reading[None]:
        """Read over blanks and line breaks."""
        yield from self.take_while(_SPACES)

    def sees(self, wanted: str) -> Reading[bool]:
        """Whether `wanted` comes next, which is not read."""
        while True:
            there = self.look(len(wanted))
            if there == wanted or self.is_closed or not wanted.startswith(there):
                return there == wanted
            yield

    def accept(self, wanted: str) -> Reading[bool]:
        """Read `wanted` if it comes next."""
        found = yield from self.sees(wanted)
        if found:
            self.skip(len(wanted))
        return found

    def expect(self, wanted: str) -> Reading[None]:
        """Read `wanted`; a text that ends within it is as good as if it had come.

        Raises: Malformed when something else comes.
        """
        found = yield from self.accept(wanted)
        if not found:
            there = self.look(len(wanted))
            if not wanted.startswith(there):
                raise Malformed(f"{wanted!r} was expected")
            self.skip(len(there))  # the end of the text

    def take_until(self, end: str, limit: int | None = None) -> Reading[str]:
        """What stands before `end`, which is read too; Malformed when it does not come within `limit` characters."""
        start, seen = self._at, 0
        while True:
            found = self._text.find(end, start + seen)
            length = (found if found >= 0 else len(self._text)) - start
            nearest = length if found >= 0 else length - len(end) + 1
            if limit is not None and nearest > limit:
                raise Malformed(f"no {end!r} within {limit} characters")
            if found >= 0:
                self._at = found + len(end)
                return self._text[start:found]
            if self.is_closed:
                self._at = len(self._text)
                raise Malformed(f"the text ends before {end!r}")
            seen = max(0, length - len(end) + 1)
            yield


def read_json(source: Source, sink: Sink) -> Reading[None]:
    """Read one JSON value and hand it to `sink` in parts as they come; control characters in strings get escaped.

    Raises: Malformed.
    """
    closers: list[str] = []
    while True:
        yield from _read_opening(source, sink, closers)
        while True:  # after a value
            if not closers:
                return
            yield from source.take_while(_SPACES, sink)
            char = yield from source.peek()
            if char == closers[-1]:
                sink(source.skip(1))
                closers.pop()
                continue
            if char != ",":
                raise Malformed(f"the JSON has {char!r} where {closers[-1]!r} or ',' was expected")
            sink(source.skip(1))
            if closers[-1] == "}":
                yield from _read_key(source, sink)
            break


def _read_opening(source: Source, sink: Sink, closers: list[str]) -> Reading[None]:
    """Read brackets, and the keys within them, up to the end of the first value without brackets or an empty one."""
    while True:
        yield from source.take_while(_SPACES, sink)
        char = yield from source.peek()
        if char == '"':
            yield from read_string(source, sink)
            return
        if not char or char not in "{[":
            yield from _read_scalar(source, sink)
            return
        if len(closers) == _DEEPEST:
            raise Malformed(f"the JSON is nested more than {_DEEPEST} deep")
        sink(source.skip(1))
        closer = "}" if char == "{" else "]"
        yield from source.take_while(_SPACES, sink)
        if (yield from source.peek()) == closer:
            sink(source.skip(1))
            return
        closers.append(closer)
        if closer == "}":
            yield from _read_key(source, sink)


def _read_key(source: Source, sink: Sink) -> Reading[None]:
    yield from source.take_while(_SPACES, sink)
    yield from read_string(source, sink)
    yield from source.take_while(_SPACES, sink)
    char = yield from source.peek()
    if char != ":":
        raise Malformed(f"the JSON has {char!r} where ':' was expected")
    sink(source.skip(1))


def _read_scalar(source: Source, sink: Sink) -> Reading[None]:
    text = yield from source.take_while(_SCALAR_RUN)
    if not _SCALAR.fullmatch(text):
        shown = text or (yield from source.peek())
        raise Malformed(f"the JSON has {shown[:20]!r} where a value was expected")
    sink(text)


def read_string(source: Source, sink: Sink | None = None) -> Reading[str]:
    """Read a JSON string and return what it says; `sink` gets it with its quotes. Raises: Malformed."""
    parts: list[str] = []

    def keep(text: str) -> None:
        parts.append(text)
        if sink:
            sink(text)

    char = yield from source.peek()
    if char != '"':
        raise Malformed(f"the JSON has {char!r} where a string was expected")
    keep(source.skip(1))
    while True:
        yield from source.take_while(_PLAIN, keep)
        char = yield from source.peek()
        if char == '"':
            keep(source.skip(1))
            text: str = json.loads("".join(parts))
            return text
        if char == "\\":
            keep((yield from _read_escape(source)))
        elif char:
            keep(json.dumps(source.skip(1))[1:-1])
        else:
            raise Malformed("the text ends within a JSON string")


def _read_escape(source: Source) -> Reading[str]:
    """Read a backslash and what it escapes."""
    while True:
        wanted = 6 if source.look(2) == "\\u" else 2
        text = source.look(wanted)
        if len(text) == wanted or source.is_closed:
            break
        yield
    if not _ESCAPE.fullmatch(text[1:]):
        raise Malformed(f"the JSON has the unknown escape {text!r}")
    return source.skip(wanted)
