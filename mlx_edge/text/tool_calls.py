"""A reply as it is written, taken apart: text for the user, thoughts, and tool calls.

    parser = ReplyParser(tokenizer, prompt=prompt, tools=tools)
    for piece in pieces:
        for event in parser.feed(piece.text): ...
    for event in parser.finish(): ...

However the text is cut, the same events come. Held back is only what may yet turn out to be a mark, blanks beside
a call, and a call that is not whole: what begins like a call and is none comes as content, character for character,
with a `Note` why. A text that is held to a grammar (`is_bound`) cannot go wrong, so there a call is handed out as it
comes. Not text, and left out: the marks, the blanks and wrappers beside calls, the blanks around thoughts.

Deliberately does not know the engine, HTTP, or how a call is forced (`tools/` spells it, `serving/structured.py`
asks for it).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_edge.errors import InvalidRequestError
from mlx_edge.text.reasoning import Reasoning, find_reasoning, read_template
from mlx_edge.text.tokenizer import Tokenizer
from mlx_edge.text.tools.events import (
    ArgumentText,
    Call,
    CallBegun,
    CallDone,
    ContentText,
    Event,
    Note,
    ReasoningText,
    Reply,
    collect,
)
from mlx_edge.text.tools.families import ToolFormat, find_format
from mlx_edge.text.tools.formats import Function
from mlx_edge.text.tools.messages import to_template
from mlx_edge.text.tools.reader import ReplyReader

__all__ = [
    "ArgumentText",
    "Call",
    "CallBegun",
    "CallDone",
    "ContentText",
    "Event",
    "Note",
    "ReasoningText",
    "Reply",
    "ReplyParser",
    "collect",
    "find_tool_format",
    "read_functions",
    "to_template",
]

_FUNCTION_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_TOOL_FIELDS = {"type", "function"}
_FUNCTION_FIELDS = {"name", "description", "parameters", "strict"}


def find_tool_format(tokenizer: Tokenizer) -> ToolFormat:
    """How the model of this tokenizer writes calls, by its chat template."""
    return find_format(read_template(tokenizer))


def read_functions(tools: Sequence[Mapping[str, Any]]) -> dict[str, Function]:
    """The functions of OpenAI's `tools`, by name.

    Raises: InvalidRequestError that names the field.
    """
    functions: dict[str, Function] = {}
    for number, tool in enumerate(tools):
        place = f"tools[{number}]"
        if not isinstance(tool, Mapping) or tool.get("type", "function") != "function":
            kind = tool.get("type") if isinstance(tool, Mapping) else tool
            raise InvalidRequestError(
                f"{place}.type is {str(kind)[:40]!r}, expected 'function': no other tools are served"
            )
        function = _read_function(f"{place}.function", tool.get("function"))
        _refuse_unknown(place, tool, _TOOL_FIELDS)
        if function.name in functions:
            raise InvalidRequestError(
                f"{place}.function.name {function.name!r} is given twice; name each function once"
            )
        functions[function.name] = function
    return functions


def _read_function(place: str, given: Any) -> Function:
    if not isinstance(given, Mapping):
        raise InvalidRequestError(f"{place} is missing, expected an object with a name")
    _refuse_unknown(place, given, _FUNCTION_FIELDS)
    name = given.get("name")
    if not isinstance(name, str) or not _FUNCTION_NAME.fullmatch(name):
        raise InvalidRequestError(
            f"{place}.name is {str(name)[:80]!r}, expected 1 to 64 of a-z, A-Z, 0-9, '_' and '-'"
        )
    parameters = given.get("parameters")
    if parameters is None:
        parameters = {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(parameters, Mapping):
        raise InvalidRequestError(f"{place}.parameters is no object, expected a JSON schema")
    strict = given.get("strict")
    if not isinstance(strict, bool | None):
        raise InvalidRequestError(f"{place}.strict is {strict!r}, expected true or false")
    return Function(name, {"type": "object", **parameters}, bool(strict))


def _refuse_unknown(place: str, given: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(str(key) for key in given.keys() - known)
    if unknown:
        raise InvalidRequestError(
            f"{place} has the unknown field {unknown[0]!r}, expected {', '.join(sorted(known))}; leave it out"
        )


class ReplyParser:
    """Takes one reply apart; `feed` and `finish` return what has become certain."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        prompt: str = "",
        tools: Sequence[Mapping[str, Any]] = (),
        is_bound: bool = False,
        reasoning: Reasoning | None = None,
    ):
        """Begin a reply that follows `prompt` (text, as rendered).

        Calls are looked for where there are `tools` (OpenAI's; none for tool_choice "none"). `is_bound`: the reply
        is held to a grammar of `serving.structured.make_grammar`. `reasoning`: the marks of its thoughts, None: the
        model's own.
        """
        reasoning = reasoning or find_reasoning(tokenizer)
        self._reader = ReplyReader(
            find_tool_format(tokenizer) if tools else None,
            reasoning,
            read_functions(tools),
            is_open=bool(reasoning and reasoning.is_open(prompt)),
            is_bound=is_bound,
        )

    @property
    def num_calls(self) -> int:
        """How many calls were handed out, one that was cut included."""
        return self._reader.num_calls

    def feed(self, text: str) -> list[Event]:
        """Take more of the reply."""
        return self._reader.feed(text)

    def finish(self) -> list[Event]:
        """The reply has ended; what was held back comes out."""
        return self._reader.finish()
