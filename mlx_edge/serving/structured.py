"""From what a request asks of the form of its reply to the grammar that the engine holds it to.

`response_format` says what an answer looks like, `tools` and `tool_choice` which calls there may or must be; thoughts
may come before either where the model has them, and are never held to anything. Knows no HTTP and no sampling.

What is promised: an answer matches its JSON schema, regex or grammar; the arguments of a call match the schema of
their function where the call was required or the function is `strict`. `decoding/json_schema.py` lists the keywords
of JSON Schema that can be promised; others are refused by name. Not held to anything: calls by a model's own choice
of functions that are not strict (they come as content unless their arguments are a JSON object).

The ready grammars of `decoding/grammars.py` go by their names; each is a whole reply, its thoughts included.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlx_edge.decoding.grammars import GRAMMARS, read_grammar
from mlx_edge.decoding.json_schema import read_schema, schema_rule
from mlx_edge.engine.request import Grammar
from mlx_edge.errors import InvalidRequestError
from mlx_edge.text import Tokenizer
from mlx_edge.text.reasoning import Reasoning, find_reasoning
from mlx_edge.text.tool_calls import find_tool_format, read_functions
from mlx_edge.text.tools.formats import Function
from mlx_edge.text.tools.grammar import ReplyGrammar, rename_start
from mlx_edge.text.tools.lark import LarkWriter

_ANY_OBJECT = {"type": "object"}
_ANSWER_MARKS = Reasoning("<think>", "</think>", dropped=("<answer>", "</answer>"))
_SCHEMA_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
# The fields of each kind of `response_format` besides its type, and the one that holds its source.
_FIELDS = {
    "text": None,
    "json_object": None,
    "json_schema": "json_schema",
    "regex": "regex",
    "grammar": "grammar",
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the engine is to hold a reply to: fields of `engine.Request`."""

    grammar: Grammar | None
    grammar_after: str | None = (
        None  # thoughts are part of the grammar, so that the model may leave them out
    )
    is_bound: bool = False  # what begins like a call is one, so it can be handed out as it comes
    marks: Reasoning | None = (
        None  # of a ready grammar, whose reader wants thoughts and answer as one text
    )


def make_grammar(
    tokenizer: Tokenizer,
    *,
    prompt: str | None = None,
    response_format: Mapping[str, Any] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    tool_choice: str | Mapping[str, Any] | None = None,
    parallel_tool_calls: bool = True,
) -> Plan:
    """The grammar of the whole reply to `prompt`, a conversation as rendered; None for a plain text: no thoughts.

    The other arguments are OpenAI's. A required call is written as the model's chat template teaches; "auto" binds
    the reply only where a function is strict, calls may not be parallel, or answers have a form. With "required" or a
    named function there is no answer, so `response_format` is checked and not used; a named function is called once.

    Raises: InvalidRequestError that names the field, for what is unknown, broken, or cannot be promised;
    UnsupportedModelError for a vocabulary whose marks a grammar cannot find.
    """
    functions = read_functions(tools or ())
    chosen, must_call = _choose(tool_choice, functions)
    if (name := _ready_name(response_format)) is not None:
        if chosen:
            raise InvalidRequestError(
                f"response_format is the grammar {name!r}, which has no calls; leave out tools, or it"
            )
        return Plan(Grammar("lark", read_grammar(name, tokenizer)), marks=_ANSWER_MARKS)
    answer = _read_format(response_format)
    if not (
        must_call or answer or not parallel_tool_calls or any(f.strict for f in chosen.values())
    ):
        chosen = {}
    reasoning = None if prompt is None else find_reasoning(tokenizer)
    if not chosen and (answer is None or reasoning is None):
        return Plan(answer)
    places = {name: f"tools[{n}].function.parameters" for n, name in enumerate(functions)}
    rules, answer_rule = ("", None) if answer is None or must_call else _as_rule(answer)
    reply = ReplyGrammar(
        find_tool_format(tokenizer),
        reasoning,
        [_bind(places[f.name], f, is_strict=must_call or f.strict) for f in chosen.values()],
        answer_rule,
        must_call=must_call,
        may_repeat=parallel_tool_calls and not isinstance(tool_choice, Mapping),
    )
    is_open = reasoning is not None and reasoning.is_open(prompt or "")
    source = reply.write(LarkWriter(tokenizer, schema_rule), is_open=is_open)
    # An answer may begin as calls without marks do: with a brace.
    return Plan(Grammar("lark", source + rules), is_bound=answer_rule is None)


def _ready_name(given: Mapping[str, Any] | None) -> str | None:
    """The name of a ready grammar that was asked for."""
    if not isinstance(given, Mapping) or given.get("type") != "grammar":
        return None
    name = given.get("grammar")
    return name if isinstance(name, str) and name in GRAMMARS and len(given) == 2 else None


def _read_format(given: Mapping[str, Any] | None) -> Grammar | None:
    """The grammar of an answer, None for any text."""
    if given is None:
        return None
    kind = given.get("type") if isinstance(given, Mapping) else given
    if not isinstance(given, Mapping) or kind not in _FIELDS:
        raise InvalidRequestError(
            f"response_format.type is {str(kind)[:40]!r}, expected {', '.join(_FIELDS)}"
        )
    field = _FIELDS[kind]
    _refuse_unknown("response_format", given, {"type", field} if field else {"type"})
    if kind == "text":
        return None
    if kind == "json_object":
        return Grammar("json_schema", json.dumps(_ANY_OBJECT))
    if kind == "json_schema":
        return _read_schema(given.get("json_schema"))
    assert field is not None
    source = given.get(field)
    if not isinstance(source, str) or not source:
        raise InvalidRequestError(f"response_format.{field} is missing, expected its text")
    return Grammar("regex" if kind == "regex" else "lark", source)


def _read_schema(given: Any) -> Grammar:
    place = "response_format.json_schema"
    if not isinstance(given, Mapping):
        raise InvalidRequestError(f"{place} is missing, expected an object with name and schema")
    _refuse_unknown(place, given, {"name", "description", "schema", "strict"})
    name, schema, strict = given.get("name"), given.get("schema"), given.get("strict")
    if not isinstance(name, str) or not _SCHEMA_NAME.fullmatch(name):
        raise InvalidRequestError(
            f"{place}.name is {str(name)[:80]!r}, expected 1 to 64 of a-z, A-Z, 0-9, '_' and '-'"
        )
    if not isinstance(strict, bool | None):
        raise InvalidRequestError(f"{place}.strict is {strict!r}, expected true or false")
    if not isinstance(schema, Mapping):
        raise InvalidRequestError(f"{place}.schema is missing, expected a JSON schema")
    with _at(f"{place}.schema"):
        read_schema(schema)
    return Grammar("json_schema", json.dumps(schema))


def _choose(
    choice: str | Mapping[str, Any] | None, functions: Mapping[str, Function]
) -> tuple[dict[str, Function], bool]:
    """The functions that may be called, and whether one must be."""
    if choice is None or choice == "auto":
        return dict(functions), False
    if choice == "none":
        return {}, False
    if choice == "required":
        if not functions:
            raise InvalidRequestError("tool_choice is 'required' and tools is empty; give tools")
        return dict(functions), True
    if not isinstance(choice, Mapping) or choice.get("type") != "function":
        found = choice.get("type") if isinstance(choice, Mapping) else choice
        raise InvalidRequestError(
            f"tool_choice is {str(found)[:40]!r}, expected 'auto', 'none', 'required' or a function's name as "
            '{"type": "function", "function": {"name": ...}}'
        )
    _refuse_unknown("tool_choice", choice, {"type", "function"})
    named = choice.get("function")
    name = named.get("name") if isinstance(named, Mapping) else None
    if isinstance(named, Mapping):
        _refuse_unknown("tool_choice.function", named, {"name"})
    if not isinstance(name, str) or name not in functions:
        known = ", ".join(map(repr, functions)) or "none"
        raise InvalidRequestError(
            f"tool_choice.function.name is {str(name)[:80]!r}, expected one of the tools ({known})"
        )
    return {name: functions[name]}, True


def _bind(place: str, function: Function, *, is_strict: bool) -> Function:
    """The function with the schema that its arguments are held to.

    Arguments that the schema does not name are left out: a text without them matches it as well.
    """
    if not is_strict:
        return dataclasses.replace(function, parameters=_ANY_OBJECT)
    schema = dict(function.parameters)
    if schema["type"] != "object":
        raise InvalidRequestError(f"{place}.type is {schema['type']!r}, expected 'object'")
    with _at(place):
        read_schema(schema)
    if not {"allOf", "anyOf", "oneOf", "$ref", "patternProperties"} & set(schema):
        schema.setdefault("properties", {})
        schema.setdefault("additionalProperties", False)
    return dataclasses.replace(function, parameters=schema)


def _as_rule(answer: Grammar) -> tuple[str, str]:
    """Rules to add to a larger grammar, and the expression of the answer in it."""
    if answer.kind == "json_schema":
        return f"\nanswer: {schema_rule(answer.source)}", "answer"
    if answer.kind == "regex":
        pattern = re.sub(
            r"\\.|/", lambda found: r"\/" if found[0] == "/" else found[0], answer.source
        )
        return "\nANSWER: /" + pattern.replace("\n", r"\n") + "/", "ANSWER"
    return "\n" + rename_start(answer.source, "answer"), "answer"


def _refuse_unknown(place: str, given: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(str(key) for key in given.keys() - known)
    if unknown:
        raise InvalidRequestError(
            f"{place} has the unknown field {unknown[0]!r}, expected {', '.join(sorted(known))}; leave it out"
        )


@contextlib.contextmanager
def _at(place: str) -> Iterator[None]:
    """Say of a schema's error where the schema stands in the request."""
    try:
        yield
    except InvalidRequestError as failure:
        raise InvalidRequestError(f"{place}: {failure}") from failure
