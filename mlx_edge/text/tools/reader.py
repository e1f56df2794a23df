"""Reads a reply in one form of calls and one pair of marks around thoughts; `tool_calls.py` says what comes out.

The whole reading is one generator that waits for text (`source.py`), so that nothing depends on how the text is cut.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from mlx_edge.text.reasoning import Reasoning
from mlx_edge.text.tools.events import CallSink, ContentText, Event, Note, ReasoningText, join
from mlx_edge.text.tools.families import ToolFormat
from mlx_edge.text.tools.formats import Function
from mlx_edge.text.tools.source import Malformed, Reading, Source

_BLANK = " \t\r\n"
_BLANKS = re.compile(f"[{_BLANK}]+")


class ReplyReader:
    """The reading of one reply."""

    def __init__(
        self,
        form: ToolFormat | None,
        reasoning: Reasoning | None,
        functions: Mapping[str, Function],
        *,
        is_open: bool,
        is_bound: bool,
    ):
        """`is_open`: the reply begins within thoughts; `is_bound`: it is held to a grammar."""
        self._form = form
        self._reasoning = reasoning
        self._functions = functions
        self._source = Source()
        self._events: list[Event] = []
        self._sink = CallSink(self._events, self._source, is_bound=is_bound)
        self._openers = form.openers if form else ()
        self._wrappers = form.wrappers if form else ()
        everywhere = reasoning if reasoning and reasoning.is_anywhere else None
        self._thoughts = (everywhere.open,) if everywhere else ()
        self._dropped = reasoning.dropped if reasoning else ()
        self._dropped += (everywhere.close,) if everywhere else ()
        self._marks = self._openers + self._wrappers + self._thoughts + self._dropped
        self._beside = (
            ""  # blanks and wrappers: content, unless a call or thoughts stand beside them
        )
        self._follows_mark = False  # a call or thoughts came last
        self._has_content = False
        self._reading = self._read(is_open)
        self._has_ended = False

    @property
    def num_calls(self) -> int:
        """How many calls were handed out, one that was cut included."""
        return self._sink.num_done + self._sink.is_cut

    def feed(self, text: str) -> list[Event]:
        """Take more of the reply."""
        self._source.feed(text)
        return self._advance()

    def finish(self) -> list[Event]:
        """The reply has ended; what was held back comes out."""
        self._source.close()
        return self._advance()

    def _advance(self) -> list[Event]:
        if not self._has_ended:
            self._has_ended = next(self._reading, self) is self
        events = join(self._events)
        self._events.clear()
        return events

    def _read(self, is_open: bool) -> Reading[None]:
        reasoning, source = self._reasoning, self._source
        if reasoning:
            self._beside = yield from source.take_while(_BLANKS)
            if is_open or (yield from source.accept(reasoning.open)):
                yield from self._read_thoughts(reasoning)
        while True:
            self._beside += yield from source.take_while(_BLANKS)
            char = yield from source.peek()
            if not char:
                break
            if self._form and self._form.is_bare and char == "{" and not self._has_content:
                source.begin()
                yield from self._read_call(self._form)
                continue
            mark = yield from self._read_text()
            if mark in self._openers and self._form:
                yield from self._read_call(self._form)
            elif mark in self._wrappers:
                self._beside += mark
            elif mark in self._thoughts and reasoning:
                yield from self._read_thoughts(reasoning)
            elif mark:
                self._pass_mark()
        if self._beside and not self._follows_mark:
            self._events.append(ContentText(self._beside))

    def _read_text(self) -> Reading[str]:
        """Hand out text up to the next mark, which is read and returned; "" at the end."""
        while True:
            self._source.begin()
            at, mark = _find_first(self._source, self._marks)
            self._add_text(self._source.skip(at))
            if mark or self._source.is_closed:
                self._source.begin()
                self._source.skip(len(mark))
                return mark
            yield

    def _add_text(self, text: str) -> None:
        """Hand out text, but for the blanks at its end, which wait for what comes after them."""
        body = text.rstrip(_BLANK) if self._marks else text
        if not body.strip(_BLANK) and (self._marks or self._follows_mark):
            self._beside += text
            return
        if self._follows_mark:
            self._beside, body = "", body.lstrip(_BLANK)
        if body:
            self._events.append(ContentText(self._beside + body))
            self._beside = text[len(text.rstrip(_BLANK)) :] if self._marks else ""
            self._follows_mark, self._has_content = False, True

    def _pass_mark(self) -> None:
        """A call, thoughts or a dropped mark came: what stood beside it is no content."""
        self._beside = ""
        self._follows_mark = True

    def _read_thoughts(self, reasoning: Reasoning) -> Reading[None]:
        """Read thoughts and the mark that ends them, without the blanks around them."""
        self._pass_mark()
        yield from self._source.skip_spaces()
        blanks = ""
        while True:
            self._source.begin()
            at, mark = _find_first(self._source, (reasoning.close,))
            text = blanks + self._source.skip(at)
            body = text.rstrip(_BLANK)
            blanks = text[len(body) :]
            if body:
                self._events.append(ReasoningText(body))
            self._source.skip(len(mark))
            if mark or self._source.is_closed:
                return
            yield

    def _read_call(self, form: ToolFormat) -> Reading[None]:
        """Read what an opener begins; where it is no call, hand out its text from the opener on as content."""
        num_before = self._sink.num_done
        try:
            yield from form.shape.read(self._source, self._sink, self._functions)
            self._pass_mark()
        except Malformed as reason:
            if self._sink.num_done > num_before:
                self._pass_mark()
            if self._sink.is_cut:
                return
            self._sink.drop()
            self._events.append(Note(f"a tool call could not be read as {form.name}: {reason}"))
            before = "" if self._follows_mark else self._beside
            self._events.append(ContentText(before + self._source.read))
            self._beside, self._follows_mark, self._has_content = "", False, True


def _find_first(source: Source, marks: tuple[str, ...]) -> tuple[int, str]:
    """How much text stands before the first mark, and the mark; "" if there is none, and what may yet become one
    is then not counted, unless the text has ended.
    """
    text = source.waiting
    found = [(at, mark) for mark in marks if (at := text.find(mark)) >= 0]
    if found:
        return min(found)
    if source.is_closed:
        return len(text), ""
    longest = max(map(len, marks), default=1) - 1
    for at in range(max(0, len(text) - longest), len(text)):
        if any(mark.startswith(text[at:]) for mark in marks):
            return at, ""
    return len(text), ""
