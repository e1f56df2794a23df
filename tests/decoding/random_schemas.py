"""Random JSON schemas out of the keywords that `json_schema.read_schema` declares; knows no grammar."""

import random
from typing import Any

FORMATS = (
    "date",
    "date-time",
    "time",
    "duration",
    "email",
    "hostname",
    "ipv4",
    "ipv6",
    "uuid",
    "uri",
)
PATTERNS = (
    "^[a-c]{1,3}$",
    "b",
    "^a",
    "z$",
    "^(x|yy)+$",
    r"^\d{2}-\w$",
    "^[^a-z]{0,2}$",
    "é|ü",
    r"^\S+\s\S+$",
)
NAMES = ("a", "b", "name", "über", "x y", '"', "0", "$ref")
VALUES = (
    None,
    True,
    False,
    0,
    1,
    -7,
    2.5,
    1.0,
    "",
    "a",
    "é",
    '"\\',
    "\n",
    [],
    [1, "x"],
    {},
    {"a": None},
)


class SchemaMaker:
    """Draws one schema: a tree of at most `depth` levels, and definitions that it refers to."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.definitions = ["d0", "d1"] if self.rng.random() < 0.2 else []

    def draw(self, depth: int = 3) -> dict[str, Any]:
        schema = self._any(depth)
        if self.definitions:
            schema = {**schema, "$defs": {name: self._any(1) for name in self.definitions}}
        return schema

    def _any(self, depth: int) -> dict[str, Any]:
        kinds = ["string", "integer", "number", "value"] + ["simple"] * (depth < 2)
        if depth > 0:
            kinds += ["object"] * 4 + ["array"] * 3 + ["anyOf", "types", "allOf", "oneOf"]
            kinds += ["ref"] * len(self.definitions)
        kind = self.rng.choice(kinds)
        schema: dict[str, Any] = getattr(self, f"_{kind}")(depth - 1)
        if self.rng.random() < 0.2:
            schema |= {"title": "T", "description": "for a reader"}
        return schema

    def _some(self, **options: Any) -> dict[str, Any]:
        return {name: value for name, value in options.items() if self.rng.random() < 0.5}

    def _simple(self, depth: int) -> dict[str, Any]:
        return {"type": self.rng.choice(["boolean", "null"])}

    def _value(self, depth: int) -> dict[str, Any]:
        if self.rng.random() < 0.4:
            return {"const": self.rng.choice(VALUES)}
        return {"enum": self.rng.sample(VALUES, self.rng.randint(1, 4))}

    def _string(self, depth: int) -> dict[str, Any]:
        least = self.rng.randint(0, 3)
        bounds = {"minLength": least, "maxLength": least + self.rng.randint(0, 5)}
        kind = self.rng.random()
        if kind < 0.2:
            return {"type": "string", "format": self.rng.choice(FORMATS)}
        if kind < 0.4:
            return {"type": "string", "pattern": self.rng.choice(PATTERNS)}
        return {"type": "string", **bounds}

    def _integer(self, depth: int) -> dict[str, Any]:
        return self._bounded("integer", [-100, -3, 0, 1, 7, 12, 1000, 2.5], [1, 2, 3, 7, 10, 0.5])

    def _number(self, depth: int) -> dict[str, Any]:
        return self._bounded("number", [-100, -2.5, -1, 0, 0.1, 1, 3.75, 1000], [0.25, 0.5, 1, 3])

    def _bounded(self, kind: str, limits: list[Any], factors: list[Any]) -> dict[str, Any]:
        low, high = sorted(self.rng.sample(limits, 2))
        lows = self.rng.choice(["minimum", "exclusiveMinimum"])
        highs = self.rng.choice(["maximum", "exclusiveMaximum"])
        schema = {"type": kind, **self._some(**{lows: low, highs: high})}
        if self.rng.random() < 0.3:
            schema["multipleOf"] = self.rng.choice(factors)
        return schema

    def _array(self, depth: int) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": "array"}
        if self.rng.random() < 0.3:
            schema["prefixItems"] = [self._any(depth) for _ in range(self.rng.randint(1, 2))]
        if self.rng.random() < 0.8:
            schema["items"] = self._any(depth) if self.rng.random() < 0.9 else False
        least = self.rng.randint(0, 2)
        return schema | self._some(minItems=least) | {"maxItems": least + self.rng.randint(0, 3)}

    def _object(self, depth: int) -> dict[str, Any]:
        names = self.rng.sample(NAMES, self.rng.randint(0, 3))
        schema: dict[str, Any] = {
            "type": "object",
            "properties": {n: self._any(depth) for n in names},
        }
        schema["required"] = [name for name in names if self.rng.random() < 0.5]
        kind = self.rng.random()
        if kind < 0.6:
            schema["additionalProperties"] = False
        elif kind < 0.7:
            schema["additionalProperties"] = self._any(depth)
        elif kind < 0.8:
            schema["patternProperties"] = {"^p[0-9]$": self._any(depth)}
            schema["additionalProperties"] = False
        if self.rng.random() < 0.15:
            schema["maxProperties"] = len(schema["required"]) + self.rng.randint(0, 1)
        return schema

    def _anyOf(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self._any(depth) for _ in range(self.rng.randint(1, 3))]}

    def _oneOf(self, depth: int) -> dict[str, Any]:
        return {
            "oneOf": [{"type": "integer"}, {"type": "string", "maxLength": 3}, self._simple(depth)]
        }

    def _allOf(self, depth: int) -> dict[str, Any]:
        first = self._any(depth)
        second = self.rng.choice(
            [first, {}, self._bounded(first.get("type", "integer"), [0, 5], [1])]
        )
        if first.get("type") not in ("integer", "number"):
            second = self.rng.choice([first, {}, {"type": first.get("type", "string")}])
        return {"allOf": [first, second]}

    def _types(self, depth: int) -> dict[str, Any]:
        kinds = ["string", "integer", "number", "boolean", "null", "array", "object"]
        bounds = {"maxLength": 3, "maxItems": 1, "maximum": 9, "maxProperties": 1}
        return {"type": self.rng.sample(kinds, self.rng.randint(1, 3)), **self._some(**bounds)}

    def _ref(self, depth: int) -> dict[str, Any]:
        return {"$ref": f"#/$defs/{self.rng.choice(self.definitions)}"}
