"""Spells parts of a reply in llguidance's dialect of Lark (its docs/syntax.md), for one vocabulary.

Special tokens are never text to a constraint: a marker that is one is named by its id. Knows no format and no schema:
how a schema is written is told by the caller, since that belongs to a floor above.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mlx_edge.errors import UnsupportedModelError
from mlx_edge.text.tokenizer import Tokenizer


class LarkWriter:
    """Collects rules; what its methods return can stand in an expression of others."""

    def __init__(self, tokenizer: Tokenizer, write_schema: Callable[[Mapping[str, Any]], str]):
        """For texts of `tokenizer`; `write_schema` turns a JSON schema into `%json ...`."""
        self._write_schema = write_schema
        self._rules: list[str] = []
        self._ends = tokenizer.eos_token_ids
        names = {i: tokenizer.id_to_token(i) for i in tokenizer.special_ids | self._ends}
        self._special = {name: index for index, name in names.items() if name}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def source(self, start: str) -> str:
        """The grammar of texts that match the expression `start`."""
        return "\n".join([f"start: {start}", *self._rules])

    def literal(self, text: str) -> str:
        """Exactly `text`. A token in it that ends every reply is left out: the constraint adds it."""
        parts, at = [], 0
        for found in self._pattern.finditer(text):
            parts += [json.dumps(text[at : found.start()])] if found.start() > at else []
            index = self._special[found[0]]
            parts += [] if index in self._ends else [f"<[{index}]>"]
            at = found.end()
        parts += [json.dumps(text[at:])] if at < len(text) else []
        return " ".join(parts) or '""'

    def schema(self, schema: Mapping[str, Any]) -> str:
        """A JSON text that matches `schema`."""
        return self._add(self._write_schema(schema))

    def check(self, schema: Mapping[str, Any]) -> None:
        """Refuse a schema that cannot be promised, as `schema` does."""
        self._write_schema(schema)

    def until(self, end: str, *, without: Iterable[str] = (), not_first: Iterable[str] = ()) -> str:
        """Any text, and `end` where it first comes; what the text may not hold is as in `text`."""
        if self._is_special(end):
            return f"{self.text(without=without, not_first=not_first)} {self.literal(end)}"
        mixed = self._pattern.search(end)
        if mixed:
            raise UnsupportedModelError(
                f"{end!r} holds the special token {mixed[0]!r}, which a grammar cannot look for within a text; "
                "leave out tool_choice and strict"
            )
        body = self._terminal(f"/(?s:.*){escape_regex(end)}/", without, not_first)
        return self._add(body, "[lazy]")

    def text(self, *, without: Iterable[str] = (), not_first: Iterable[str] = ()) -> str:
        """Any text without the strings of `without` that does not begin with the regexes `not_first`; may be empty."""
        return self._terminal("/(?s:.*)/", without, not_first)

    def rule(self, expression: str) -> str:
        """A rule of its own for `expression`."""
        return self._add(expression)

    def choice(self, expressions: Iterable[str]) -> str:
        """One of several expressions."""
        return f"({' | '.join(expressions)})"

    def _is_special(self, text: str) -> bool:
        return text in self._special

    def _terminal(self, body: str, without: Iterable[str], not_first: Iterable[str]) -> str:
        refused = [
            f"(?s:.*){escape_regex(one)}(?s:.*)" for one in without if not self._is_special(one)
        ]
        refused += [f"({one})(?s:.*)" for one in not_first]
        name = f"TEXT_{len(self._rules)}"
        self._rules.append(f"{name}: {' & '.join([body, *(f'~/{one}/' for one in refused)])}")
        return name

    def _add(self, body: str, options: str = "") -> str:
        name = f"part_{len(self._rules)}"
        self._rules.append(f"{name}{options}: {body}")
        return name


def escape_regex(text: str) -> str:
    """A regex for exactly `text`, without a character that Lark or the regex would read otherwise."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)
