"""What a reply consists of, in the order in which it is written. Knows no format."""

from __future__ import annotations

import itertools
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

from mlx_edge.text.tools.source import Malformed, Source

_NAME = re.compile(r"[\w.:/-]{1,128}")


@dataclass(frozen=True)
class ContentText:
    """Text for the user."""

    text: str


@dataclass(frozen=True)
class ReasoningText:
    """Text of the model for itself."""

    text: str


@dataclass(frozen=True)
class CallBegun:
    """A tool is called: the how-manieth call of the reply (from 0), an id of its own, and the function's name."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ArgumentText:
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


@dataclass(frozen=True)
class CallDone:
    """The arguments of a call are complete: one JSON object."""

    index: int


@dataclass(frozen=True)
class Note:
    """Why what began as a call is none; its text came, or comes, as content. For a log."""

    text: str


Event = ContentText | ReasoningText | CallBegun | ArgumentText | CallDone | Note


@dataclass(frozen=True)
class Call:
    """A whole call; `arguments` is JSON text, of an object unless the reply was cut within it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Reply:
    """A whole reply."""

    content: str
    reasoning: str
    calls: tuple[Call, ...]
    notes: tuple[str, ...]


def collect(events: Iterable[Event]) -> Reply:
    """The reply that its events add up to."""
    content, reasoning, notes = [], [], []
    begun: list[CallBegun] = []
    arguments: list[list[str]] = []
    for event in events:
        match event:
            case ContentText(text):
                content.append(text)
            case ReasoningText(text):
                reasoning.append(text)
            case CallBegun():
                begun.append(event)
                arguments.append([])
            case ArgumentText(index, text):
                arguments[index].append(text)
            case Note(text):
                notes.append(text)
    calls = tuple(
        Call(one.id, one.name, "".join(parts)) for one, parts in zip(begun, arguments, strict=True)
    )
    return Reply("".join(content), "".join(reasoning), calls, tuple(notes))


class CallSink:
    """Takes calls from the reader of a format; holds each back until it is whole, unless the text is sure."""

    def __init__(self, out: list[Event], source: Source, *, is_bound: bool) -> None:
        """Hand out to `out`, at once where the reply `is_bound` to a grammar; `source` forgets what was a call."""
        self._out = out
        self._source = source
        self._is_bound = is_bound
        self._held: list[Event] = []
        self._is_begun = False
        self.num_done = 0

    @property
    def is_cut(self) -> bool:
        """Whether a call was handed out that is not complete."""
        return self._is_bound and self._is_begun

    def begin(self, name: str) -> None:
        """A call of a function begins. Raises: Malformed for what cannot be a name."""
        if not _NAME.fullmatch(name):
            raise Malformed("the call has no name that a function can have")
        self._add(CallBegun(self.num_done, f"call_{secrets.token_hex(12)}", name))
        self._is_begun = True

    def argument(self, text: str) -> None:
        """More of the arguments' JSON text."""
        self._add(ArgumentText(self.num_done, text))

    def end(self) -> None:
        """The call is complete."""
        self._out += [*self._held, CallDone(self.num_done)]
        self._held = []
        self._is_begun = False
        self.num_done += 1
        self._source.begin()

    def drop(self) -> None:
        """Forget what is held back."""
        self._held = []

    def _add(self, event: Event) -> None:
        (self._out if self._is_bound else self._held).append(event)


def join(events: Iterable[Event]) -> list[Event]:
    """The same events with neighbouring texts of a kind in one."""
    joined: list[Event] = []
    for (kind, index), group in itertools.groupby(events, _kind):
        members = list(group)
        text = "".join(getattr(event, "text", "") for event in members)
        if kind is ContentText or kind is ReasoningText:
            joined.append(kind(text))
        elif kind is ArgumentText:
            joined.append(ArgumentText(index, text))
        else:
            joined += members
    return joined


def _kind(event: Event) -> tuple[type[Event], int]:
    return type(event), getattr(event, "index", -1)
