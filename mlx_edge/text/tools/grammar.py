"""The grammar of a whole reply: thoughts, then an answer, calls, or a text that goes over into calls.

Spells what `reader.py` reads. Knows no request and no grammar library.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_edge.errors import InvalidRequestError
from mlx_edge.text.reasoning import Reasoning
from mlx_edge.text.tools.families import ToolFormat
from mlx_edge.text.tools.formats import Function
from mlx_edge.text.tools.lark import LarkWriter, escape_regex

_BARE_CALL = r'\s*\{\s*"name"'  # what an answer cannot begin with where calls have no mark
_LINES = r"/\n{0,3}/"


@dataclass(frozen=True)
class ReplyGrammar:
    """What a reply may be. `answer` is an expression, None: any text; the calls are some of `functions`."""

    form: ToolFormat
    reasoning: Reasoning | None
    functions: Sequence[Function] = ()
    answer: str | None = None
    must_call: bool = False
    may_repeat: bool = True

    def write(self, lark: LarkWriter, *, is_open: bool) -> str:
        """The Lark source; `is_open`: the reply begins within thoughts.

        Raises: InvalidRequestError for a schema that cannot be promised, UnsupportedModelError for marks that a
        grammar cannot find.
        """
        ways = []
        if not self.must_call:
            ways.append(self._write_answer(lark))
        if self.functions:
            calls = lark.rule(self._write_calls(lark))
            ways.append(f"{lark.literal(self.form.trigger)} {calls}")
            if not self.must_call and self.answer is None and self.form.trigger:
                ways.append(f"{self._write_lead(lark)} {calls}")
        thoughts = self._write_thoughts(lark, is_open=is_open)
        return lark.source(f"{thoughts} {lark.choice(ways)}")

    def _write_calls(self, lark: LarkWriter) -> str:
        """The calls from behind the trigger to the end of the reply."""
        form = self.form
        one = lark.rule(
            lark.choice(form.shape.spell(lark, function) for function in self.functions)
        )
        parts = [lark.literal(form.lead)] if form.lead else []
        parts.append(one)
        if self.may_repeat and form.between is not None:
            between = f"{lark.literal(form.between)} " if form.between else ""
            parts.append(f"({between}{one})*")
        return " ".join([*parts, *([lark.literal(form.close)] if form.close else [])])

    def _write_answer(self, lark: LarkWriter) -> str:
        mark = self.reasoning.answer if self.reasoning else ""
        before = f"{lark.literal(mark)} " if mark else ""
        if self.answer is not None:
            return before + self.answer
        return before + lark.text(without=self._call_marks(), not_first=self._not_first())

    def _write_lead(self, lark: LarkWriter) -> str:
        """Text for the user that goes over into calls, with the trigger at its end."""
        mark = self.reasoning.answer if self.reasoning else ""
        if self.reasoning and mark:  # such a text is a message of its own there
            text, resume = (
                lark.until(self.reasoning.close),
                self.reasoning.resume + self.form.trigger,
            )
            return f"{lark.literal(mark)} {text} {lark.literal(resume)}"
        others = [one for one in self._call_marks() if one != self.form.trigger]
        return lark.until(self.form.trigger, without=others, not_first=self._not_first())

    def _call_marks(self) -> tuple[str, ...]:
        """What may not occur in a text, since it would be read as a call."""
        if not self.functions:
            return ()
        return tuple(
            dict.fromkeys(mark for mark in (self.form.trigger, *self.form.openers) if mark)
        )

    def _not_first(self) -> list[str]:
        found = [_BARE_CALL] if self.functions and self.form.is_bare else []
        if self.reasoning and not self.reasoning.is_anywhere:
            found.append(rf"\s*{escape_regex(self.reasoning.open)}")
        return found

    def _write_thoughts(self, lark: LarkWriter, *, is_open: bool) -> str:
        marks = self.reasoning
        if marks is None:
            return ""
        after = f"{lark.literal(marks.resume)}" if marks.resume else ""
        if not marks.resume and (self.must_call or self.answer is not None):
            after = _LINES
        thoughts = f"{lark.until(marks.close)} {after}"
        return thoughts if is_open else f"({lark.literal(marks.open)} {thoughts})?"


def rename_start(grammar: str, name: str) -> str:
    """A Lark grammar as a part of another: its rule `start` is called `name`.

    Raises: InvalidRequestError for a grammar without a `start`, or one that refers to it.
    """
    found = re.findall(r"(?<![\w-])start(?![\w-])", grammar)
    if len(found) != 1 or not re.search(r"^\s*start\s*[:\[]", grammar, re.MULTILINE):
        raise InvalidRequestError(
            f"the grammar has the word 'start' {len(found)} times, expected one rule of this name that no other "
            "refers to: the model thinks before it answers, so the grammar becomes a part of a larger one"
        )
    return re.sub(r"^(\s*)start(?=\s*[:\[])", rf"\g<1>{name}", grammar, flags=re.MULTILINE)
