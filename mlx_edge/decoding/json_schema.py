"""What of JSON Schema can be promised: everything that the grammar library would pass over is refused here.

Supported: `type`, `enum`, `const`, `anyOf`, `allOf`, `$ref` within the schema, `$defs`, `definitions`, `$anchor`;
`oneOf` whose members the library sees to exclude each other; of strings `minLength`, `maxLength`, `pattern`
(`json_patterns.py`) and the formats date-time, time, date, duration, email, hostname, ipv4, ipv6, uuid and uri; of
numbers `minimum`, `maximum`, both exclusive ones and `multipleOf`; of arrays `items`, `prefixItems`, `minItems` and
`maxItems`; of objects `properties`, `required`, `additionalProperties`, `patternProperties`, `minProperties` and
`maxProperties`, those last where all named properties are required. Remarks (`title`, `default`, ...) hold nothing.

The library (llguidance, its docs/json_schema.md) refuses the keywords that it knows and does not implement, but
takes unknown ones, a misspelled one among them, for remarks; it keeps numbers as float64 of 15 digits; its dates have
a 29th of February in every year, and a leap second in every minute; it lets 0 pass as above 0 and below 0.5; and it
lets a name be written twice, once with escapes. A number below an exclusive bound is so as a decimal: one with more
than 15 digits may be rounded to the bound by who reads it into a float. Knows no grammar and no tokenizer.
"""

import graphlib
import json
import math
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

from mlx_edge.decoding.json_patterns import portable_pattern
from mlx_edge.errors import InvalidRequestError

_ONE_SCHEMA = {"additionalItems", "additionalProperties", "items"}
_MANY_SCHEMAS = {"allOf", "anyOf", "items", "oneOf", "prefixItems"}
_NAMED_SCHEMAS = {"$defs", "definitions", "patternProperties", "properties"}
_VALUES = {"const", "enum", "exclusiveMaximum", "exclusiveMinimum", "maximum", "minimum"} | {
    "multipleOf"
}
_OTHERS = {"$ref", "format", "pattern", "required", "type"} | {
    f"{end}{what}" for end in ("min", "max") for what in ("Items", "Length", "Properties")
}
_REMARKS = {"$anchor", "$comment", "$id", "$schema", "id", "title", "description", "examples"} | {
    "contentEncoding", "contentMediaType", "default", "deprecated", "discriminator"
} | {"readOnly", "writeOnly"}  # fmt: skip
_KNOWN = _ONE_SCHEMA | _MANY_SCHEMAS | _NAMED_SCHEMAS | _VALUES | _OTHERS | _REMARKS
# Of what the library takes for a date, those that exist (RFC 3339, section 5.7 and appendix C).
_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)"
_REAL_DATE = f"^(?:[0-9]{{4}}-(?:0[13-9]|1|02-[01]|02-2[0-8])|{_LEAP_YEAR}-02-29)"
_YEAR = "^(?:[1-9]|0[1-9]|00[1-9]|000[1-9])"  # many calendars know no year 0
_NO_LEAP_SECOND = "[0-9]{2}:[0-9]{2}:[0-5]"
_NARROWER: dict[Any, list[dict[str, Any]]] = {
    "date": [{"pattern": _REAL_DATE}, {"pattern": _YEAR}],
    "date-time": [
        {"pattern": _REAL_DATE},
        {"pattern": _YEAR},
        {"pattern": f"[Tt]{_NO_LEAP_SECOND}"},
    ],
    "time": [{"pattern": f"^{_NO_LEAP_SECOND}"}],
    "hostname": [{"maxLength": 253}],
}
# Between the parts of a JSON text: nothing, a space, or a new line with its indentation. Bounded, because a model
# that is held to a schema against its will likes to write spaces for ever.
WHITESPACE = r" |\n {0,24}|\n\t{0,8}"
_LARGEST_EXACT = 2**53  # the integers of a float64 have gaps beyond it


def read_schema(schema: Mapping[str, Any] | str) -> dict[str, Any]:
    """The schema as a dict of its own, with nothing in it that would be ignored, and dates made exact.

    Raises: InvalidRequestError for text that is no JSON, and for a keyword or number that cannot be honoured.
    """
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema, allow_nan=False)
        found = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise InvalidRequestError("the JSON schema is nested too deeply; flatten it") from None
    except (TypeError, ValueError) as failure:
        raise InvalidRequestError(f"the JSON schema is not JSON ({failure}); mend it") from failure
    if found is True:
        found = {}
    if not isinstance(found, dict):
        raise InvalidRequestError(
            f"the JSON schema is {json.dumps(found)[:80]}, expected an object of keywords"
        )
    waiting, schemas = [("", found)], []
    while waiting:
        place, one = waiting.pop()
        schemas.append(one)
        _check_keywords(place or "the top", one)
        waiting += [(f"{place}/{step}", inner) for step, inner in _subschemas(one)]
    _check_exclusive(schemas)
    _check_references(found, schemas)
    for one in schemas:
        if isinstance(one.get("pattern"), str):
            one["pattern"] = portable_pattern(one["pattern"])
        narrower = _NARROWER.get(one["format"]) if isinstance(one.get("format"), str) else None
        if narrower and isinstance(one.get("allOf", []), list):
            one["allOf"] = [*one.get("allOf", []), *narrower]
    return found


def schema_rule(schema: Mapping[str, Any] | str) -> str:
    """The schema as a part of a Lark grammar, with the blanks and the strictness of `make_constraint`'s.

    Raises: as `read_schema`.
    """
    options = {
        "lenient": False,
        "coerce_one_of": False,
        "whitespace_pattern": WHITESPACE,
        "json_allowed_escapes": 'nrbtf\\"',  # with \\u, a name could be written twice: "a" and "\\u0061"
    }
    return f"%json {json.dumps({**read_schema(schema), 'x-guidance': options})}"


def _subschemas(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The schemas directly within, with the way there; what has another shape is for the library to refuse."""
    for keyword, value in schema.items():
        if keyword in _ONE_SCHEMA and isinstance(value, dict):
            yield keyword, value
        if keyword in _MANY_SCHEMAS and isinstance(value, list):
            yield from ((f"{keyword}/{n}", v) for n, v in enumerate(value) if isinstance(v, dict))
        if keyword in _NAMED_SCHEMAS and isinstance(value, dict):
            yield from ((f"{keyword}/{n}", v) for n, v in value.items() if isinstance(v, dict))


def _check_keywords(place: str, schema: dict[str, Any]) -> None:
    unknown = sorted(set(schema) - _KNOWN)
    if unknown:
        raise InvalidRequestError(
            f"the JSON schema has {', '.join(map(repr, unknown))} at {place}, which cannot be enforced; "
            "correct the name or leave it out"
        )
    if isinstance(schema.get("items"), list):
        raise InvalidRequestError(
            f"the JSON schema has a list as 'items' at {place}; write 'prefixItems' for it"
        )
    for keyword in ("exclusiveMaximum", "exclusiveMinimum"):
        if isinstance(schema.get(keyword), bool):
            raise InvalidRequestError(
                f"the JSON schema has true or false as {keyword!r} at {place}, as draft 4 wrote it; "
                "write the number itself"
            )
    # Names beyond those in `properties` may come twice, so counting them proves nothing.
    least, required = schema.get("minProperties", 0), schema.get("required", [])
    if isinstance(least, int) and isinstance(required, list) and least > max(1, len(required)):
        raise InvalidRequestError(
            f"the JSON schema has minProperties {least} at {place}, more than it requires by name; "
            "name them in 'required'"
        )
    for keyword in _VALUES & set(schema):
        _check_exact(keyword, place, schema[keyword])
    factor = schema.get("multipleOf")
    if isinstance(factor, float) and Decimal(repr(factor)) != Decimal(factor):
        raise InvalidRequestError(
            f"the JSON schema has 'multipleOf' {factor} at {place}, of which validators that count in binary "
            "find no multiples; use an integer, 0.5, 0.25 and their like"
        )
    if place != "the top" and "$id" in schema:
        raise InvalidRequestError(
            f"the JSON schema has '$id' at {place}, which moves what references mean; leave it out"
        )
    for name in schema.get("patternProperties") or ():
        rewritten = portable_pattern(name.replace(".", ""))
        if rewritten != name.replace(".", ""):
            raise InvalidRequestError(
                f"the JSON schema has the pattern {name!r} for names at {place}, whose shorthands validators read in "
                "different ways; write the characters themselves"
            )


def _check_exclusive(schemas: list[dict[str, Any]]) -> None:
    """Refuse an exclusive whole bound of a number whose other bound is less than 1 further from zero.

    llguidance 1.9.1 then takes the excluded number itself. Bounds meet in one schema, or where schemas are merged.
    """
    is_merged = any(
        "allOf" in one
        or ({"$ref", "anyOf", "oneOf"} & one.keys() and len(one.keys() - _REMARKS) > 1)
        for one in schemas
    )
    for group in [schemas] if is_merged else [[one] for one in schemas]:
        highs = _bounds(group, "maximum", "exclusiveMaximum")
        lows = _bounds(group, "minimum", "exclusiveMinimum")
        pairs = [(e, high) for e in _bounds(group, "exclusiveMinimum") for high in highs if e >= 0]
        pairs += [(-e, -low) for e in _bounds(group, "exclusiveMaximum") for low in lows if e <= 0]
        for excluded, other in pairs:
            if excluded % 1 == 0 and excluded < other < excluded + 1:
                raise InvalidRequestError(
                    f"the JSON schema excludes {abs(excluded)} as a bound and has {abs(other)} as another, "
                    "which cannot be enforced; use 'minimum' and 'maximum'"
                )


def _check_references(root: dict[str, Any], schemas: list[dict[str, Any]]) -> None:
    """Refuse references to what is no schema here, and those that lead back without going into the value."""
    known = {id(one): one for one in schemas}
    anchors = {one["$anchor"]: one for one in schemas if isinstance(one.get("$anchor"), str)}
    below: dict[int, list[int]] = {}
    for one in schemas:
        inner = [v for k, v in _subschemas(one) if k.split("/")[0] in ("allOf", "anyOf", "oneOf")]
        reference = one.get("$ref")
        if isinstance(reference, str):
            target = _resolve(root, anchors, reference)
            if isinstance(target, dict) and id(target) in known:
                inner.append(target)
            elif not isinstance(target, bool):
                raise InvalidRequestError(
                    f"the JSON schema has the '$ref' {reference[:80]!r}, which leads to no schema in it; "
                    "write it as '#/$defs/...'"
                )
        below[id(one)] = [id(other) for other in inner]
    try:
        graphlib.TopologicalSorter(below).prepare()
    except graphlib.CycleError as failure:
        names = {str(known[i]["$ref"]) for i in failure.args[1] if "$ref" in known[i]}
        raise InvalidRequestError(
            f"the JSON schema has a '$ref' that leads back to itself ({', '.join(map(repr, sorted(names)))}); "
            "let it pass through 'properties' or 'items'"
        ) from None


def _resolve(root: dict[str, Any], anchors: dict[str, Any], reference: str) -> Any:
    """What a reference within the schema leads to, None if nothing."""
    own = root.get("$id")
    fragment = reference.removeprefix(own.rstrip("#")) if isinstance(own, str) else reference
    if not fragment.startswith("#"):
        return None
    pointer = unquote(fragment[1:])
    if pointer and not pointer.startswith("/"):
        return anchors.get(pointer)
    found: Any = root
    for step in pointer.split("/")[1:]:
        key = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and key.isdecimal() and int(key) < len(found):
            found = found[int(key)]
        elif isinstance(found, dict):
            found = found.get(key)
        else:
            return None
    return found


def _bounds(schemas: list[dict[str, Any]], *keywords: str) -> list[float]:
    """The bounds of numbers that need not be integers."""
    found = (one.get(k) for one in schemas if one.get("type") != "integer" for k in keywords)
    return [value for value in found if isinstance(value, int | float)]


def _check_exact(keyword: str, place: str, value: object) -> None:
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one
        elif isinstance(one, int | float) and not _is_exact(one):
            raise InvalidRequestError(
                f"the JSON schema has the number {str(one)[:40]} as {keyword!r} at {place}; "
                "integers beyond 2^53 and more than 15 digits are not kept exactly, round it"
            )


def _is_exact(number: int | float) -> bool:
    if isinstance(number, int):
        return abs(number) <= _LARGEST_EXACT
    return math.isfinite(number) and float(f"{number:.15g}") == number


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
