"""What of JSON Schema can be promised: everything that the grammar library would pass over is refused here.

The library (llguidance, its docs/json_schema.md) refuses the keywords that it knows and does not implement, but
takes unknown ones, a misspelled one among them, for remarks; it keeps numbers as float64 of 15 digits; its dates have
a 29th of February in every year; and it lets 0 pass as above 0 and below 0.5. Knows no grammar and no tokenizer.
"""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

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
_REAL_DATE = {"pattern": f"^(?:[0-9]{{4}}-(?:0[13-9]|1|02-[01]|02-2[0-8])|{_LEAP_YEAR}-02-29)"}
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
    for one in schemas:
        if one.get("format") in ("date", "date-time") and isinstance(one.get("allOf", []), list):
            one["allOf"] = [*one.get("allOf", []), _REAL_DATE]
    return found


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
