"""The three shapes in which models write calls: JSON objects, a name with JSON arguments, and arguments between tags.

A shape reads one call of a text that arrives in pieces, and spells it in a grammar. Which model writes what with which
marks stands in `families.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from mlx_edge.errors import InvalidRequestError
from mlx_edge.text.tools.events import CallSink
from mlx_edge.text.tools.lark import LarkWriter
from mlx_edge.text.tools.source import Malformed, Reading, Source, read_json, read_string

_NAME_RUN = re.compile(r"[\w.-]+")
_MAX_LABEL = 200  # characters between a name and its arguments
_SPACE = " \t\r\n"


@dataclass(frozen=True)
class Function:
    """A function that may be called; `parameters` is the JSON schema of its arguments."""

    name: str
    parameters: Mapping[str, Any]
    strict: bool = False


class Shape(Protocol):
    """How one call is written."""

    def read(
        self, source: Source, sink: CallSink, functions: Mapping[str, Function]
    ) -> Reading[None]:
        """Read what follows the opener, for one call or several; Malformed where it is none."""
        ...

    def spell(self, lark: LarkWriter, function: Function) -> str:
        """The expression of one call, without the frame around it.

        Raises: InvalidRequestError for a schema that this shape cannot promise.
        """
        ...


@dataclass(frozen=True)
class JsonCalls:
    """`{"name": ..., "arguments": {...}}`: one, several, or a list of them, and `end`."""

    end: str = ""
    key: str = "arguments"
    only_known: bool = (
        False  # no marker tells a call from an answer in JSON: the name must be known
    )

    def read(
        self, source: Source, sink: CallSink, functions: Mapping[str, Function]
    ) -> Reading[None]:
        """See `Shape`."""
        yield from source.skip_spaces()
        known = functions if self.only_known else None
        if (yield from source.accept("[")):
            yield from _read_list(source, sink, known)
        else:
            yield from _read_call(source, sink, known)
        yield from source.skip_spaces()
        while (yield from source.peek()) == "{" and self.end:
            yield from _read_call(source, sink, known)
            yield from source.skip_spaces()
        yield from source.expect(self.end)

    def spell(self, lark: LarkWriter, function: Function) -> str:
        """See `Shape`."""
        head = f'{{"name": {json.dumps(function.name)}, "{self.key}": '
        return f"{lark.literal(head)} {lark.schema(function.parameters)} {lark.literal('}')}"


@dataclass(frozen=True)
class NamedCalls:
    """`name`, `separator`, JSON arguments, `end`; a list of JSON calls in their place is read as well."""

    separator: str
    end: str = ""
    prefix: str = ""
    label: str = ""  # a regex: what the model writes between name and separator

    def read(
        self, source: Source, sink: CallSink, functions: Mapping[str, Function]
    ) -> Reading[None]:
        """See `Shape`."""
        yield from source.skip_spaces()
        if (yield from source.accept("[")):
            yield from _read_list(source, sink, None)
            return
        if self.prefix:
            yield from source.accept(self.prefix)
        name = yield from source.take_while(_NAME_RUN)
        yield from source.take_until(self.separator, limit=_MAX_LABEL)
        sink.begin(name)
        yield from _read_object(source, sink)
        yield from source.skip_spaces()
        yield from source.expect(self.end.lstrip())
        sink.end()

    def spell(self, lark: LarkWriter, function: Function) -> str:
        """See `Shape`."""
        label = f"/{self.label}/" if self.label else ""
        parts = (
            lark.literal(self.prefix + function.name),
            *([label] if label else []),
            lark.literal(self.separator),
            lark.schema(function.parameters),
            *([lark.literal(self.end)] if self.end else []),
        )
        return " ".join(parts)


@dataclass(frozen=True)
class TaggedCalls:
    """`name` and `name_end`, then for each argument its key and its value between tags, then `end`.

    Strings stand there as they are, other values as JSON; the schema tells them apart.
    """

    name_end: str
    key_begin: str
    key_end: str
    value_begin: str
    value_end: str
    end: str
    line: str = ""  # what stands between the parts
    padding: str = ""  # what stands around a value

    def read(
        self, source: Source, sink: CallSink, functions: Mapping[str, Function]
    ) -> Reading[None]:
        """See `Shape`."""
        yield from source.skip_spaces()
        name = yield from source.take_while(_NAME_RUN)
        yield from source.skip_spaces()
        yield from source.expect(self.name_end)
        sink.begin(name)
        function = functions.get(name)
        schemas = function.parameters.get("properties") if function else None
        sink.argument("{")
        keys: set[str] = set()
        while True:
            yield from source.skip_spaces()
            if not (yield from source.accept(self.key_begin)):
                break
            key = yield from source.take_until(self.key_end)
            if self.value_begin:
                yield from source.skip_spaces()
                yield from source.expect(self.value_begin)
            text = yield from source.take_until(self.value_end)
            if key in keys:
                raise Malformed("an argument comes twice")
            schema = schemas.get(key) if isinstance(schemas, Mapping) else None
            sink.argument(f"{', ' if keys else ''}{json.dumps(key)}: {_value(text, schema)}")
            keys.add(key)
        yield from source.expect(self.end)
        sink.argument("}")
        sink.end()

    def spell(self, lark: LarkWriter, function: Function) -> str:
        """See `Shape`."""
        schema = function.parameters
        _check_flat(function)
        required = schema.get("required", [])
        around = {k: schema[k] for k in ("$defs", "definitions") if k in schema}
        parts = [lark.literal(function.name + self.name_end)]
        for key, inner in schema.get("properties", {}).items():
            one = f"{lark.literal(self._head(key))} {self._spell_value(lark, function, key, inner, around)}"
            parts.append(one if key in required else f"({one})?")
        return " ".join([*parts, lark.literal(self.line + self.end)])

    def _head(self, key: str) -> str:
        between = self.line if self.value_begin else ""
        return f"{self.line}{self.key_begin}{key}{self.key_end}{between}{self.value_begin}{self.padding}"

    def _spell_value(
        self, lark: LarkWriter, function: Function, key: str, schema: Any, around: Mapping[str, Any]
    ) -> str:
        tail = self.padding + self.value_end
        if not _is_text(schema):
            schema = {} if schema is True else schema
            return f"{lark.schema({**schema, **around})} {lark.literal(tail)}"
        lark.check(schema)
        bounds = {
            "pattern",
            "format",
            "minLength",
            "maxLength",
            "allOf",
            "anyOf",
            "oneOf",
            "$ref",
        } & set(schema)
        values = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if bounds:
            raise InvalidRequestError(
                f"the function {function.name!r} has {', '.join(map(repr, sorted(bounds)))} for the string {key!r}, "
                "which this model's form of calls cannot promise; leave it out, or use an enum"
            )
        if values is None:
            return lark.until(tail)
        return f"{lark.choice(lark.literal(value) for value in values)} {lark.literal(tail)}"


def _check_flat(function: Function) -> None:
    """Refuse what is more than a list of named arguments."""
    schema = function.parameters
    known = {"type", "properties", "required", "additionalProperties", "$defs", "definitions"}
    remarks = {"$schema", "$id", "$comment", "title", "description", "default", "examples"}
    others = sorted(set(schema) - known - remarks)
    missing = [key for key in schema.get("required", []) if key not in schema.get("properties", {})]
    if others or missing:
        found = f"{others[0]!r}" if others else f"the required {missing[0]!r} without a schema"
        raise InvalidRequestError(
            f"the function {function.name!r} has {found} in its parameters, which this model's form of calls "
            "cannot promise; give plain 'properties'"
        )


def _is_text(schema: Any) -> bool:
    """Whether a schema allows strings alone, which then stand without quotes."""
    if not isinstance(schema, Mapping):
        return False
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if values is not None:
        return isinstance(values, list) and all(isinstance(value, str) for value in values)
    return schema.get("type") == "string"


def _value(text: str, schema: Any) -> str:
    """The JSON text of an argument's value."""
    plain = text.removeprefix("\n").removesuffix("\n")
    if not _is_text(schema):
        try:
            json.loads(plain, parse_constant=_refuse)
            return plain.strip(_SPACE)
        except (ValueError, RecursionError):
            pass
    return json.dumps(plain, ensure_ascii=False)


def _refuse(name: str) -> None:
    raise ValueError(name)


def _read_list(
    source: Source, sink: CallSink, known: Mapping[str, Function] | None
) -> Reading[None]:
    """Read JSON calls and the bracket that closes their list."""
    while True:
        yield from source.skip_spaces()
        yield from _read_call(source, sink, known)
        yield from source.skip_spaces()
        if not (yield from source.accept(",")):
            yield from source.expect("]")
            return


def _read_call(
    source: Source, sink: CallSink, known: Mapping[str, Function] | None
) -> Reading[None]:
    """Read one JSON object that names a function and its arguments, in any order."""
    if (yield from source.peek()) != "{":
        raise Malformed("the call is no JSON object")
    source.skip(1)
    name: str | None = None
    early: list[str] = []  # arguments that stand before the name
    has_arguments = False
    while True:
        yield from source.skip_spaces()
        key = yield from read_string(source)
        yield from source.skip_spaces()
        if (yield from source.peek()) != ":":
            raise Malformed("the call has no ':' after a name")
        source.skip(1)
        yield from source.skip_spaces()
        if key == "name" and name is None:
            name = yield from read_string(source)
            if known is not None and name not in known:
                raise Malformed(f"there is no function {name!r}")
            sink.begin(name)
        elif key in ("arguments", "parameters") and not has_arguments:
            has_arguments = True
            yield from _read_arguments(source, early.append if name is None else sink.argument)
        else:
            yield from read_json(source, _ignore)
        yield from source.skip_spaces()
        char = yield from source.peek()
        if char not in (",", "}"):
            raise Malformed("the call is not closed")
        source.skip(1)
        if char == "}":
            break
    if name is None:
        raise Malformed("the call has no name")
    for text in early or ([] if has_arguments else ["{}"]):
        sink.argument(text)
    sink.end()


def _read_object(source: Source, sink: CallSink) -> Reading[None]:
    yield from source.skip_spaces()
    if (yield from source.peek()) != "{":
        raise Malformed("the arguments are no JSON object")
    yield from read_json(source, sink.argument)


def _read_arguments(source: Source, sink: Any) -> Reading[None]:
    """Read an object, a text that holds one, or null for none."""
    char = yield from source.peek()
    if char == "{":
        yield from read_json(source, sink)
    elif char == '"':
        text = yield from read_string(source)
        inner = Source()
        inner.feed(text)
        inner.close()
        if not text.lstrip(_SPACE).startswith("{"):
            raise Malformed("the arguments are no JSON object")
        yield from read_json(inner, sink)
        yield from inner.skip_spaces()
        if inner.waiting:
            raise Malformed("the arguments are more than a JSON object")
    elif (yield from source.accept("null")):
        sink("{}")
    else:
        raise Malformed("the arguments are no JSON object")


def _ignore(text: str) -> None:
    pass
