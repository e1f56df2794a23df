"""JSON schemas: every text under a random schema of the declared keywords is valid; the rest is refused by name.

CI draws 40 schemas; MLX_EDGE_SCHEMAS=500 draws 500.
"""

import json
import os
import random
from typing import Any

import numpy as np
import pytest

from mlx_edge import load, stream_generate
from mlx_edge.decoding.constraints import make_constraint
from mlx_edge.decoding.json_patterns import portable_pattern
from mlx_edge.errors import InvalidRequestError
from mlx_edge.text import Tokenizer
from mlx_edge.text.tokenizer import load_tokenizer
from mlx_edge.weights.hub import find_model
from tests.decoding.random_schemas import SchemaMaker

pytest.importorskip("llguidance", reason="constraints need the package llguidance")
jsonschema = pytest.importorskip("jsonschema", reason="schemas are judged by jsonschema")

NUM_SCHEMAS = int(os.environ.get("MLX_EDGE_SCHEMAS", "40"))
LONGEST = 120  # tokens; a text that does not end by then is not counted
# What the library cannot combine, found only when it reads the whole schema.
UNDECLARED = (
    *("only supported when all keys", "nsatisfiable", "leads back to itself", "oneOf"),
    "which cannot be enforced",
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(find_model("pocket"))


def check(schema: dict[str, Any], text: str) -> None:
    kind = jsonschema.Draft202012Validator
    kind(schema, format_checker=kind.FORMAT_CHECKER).validate(json.loads(text))


def walk(tokenizer: Tokenizer, schema: dict[str, Any], seed: int) -> str | None:
    """A random text, None if it does not end; first characters are drawn first, which reaches rare ones."""
    rng = random.Random(seed)
    reader = tokenizer.new_reader()
    firsts = [reader.read(index)[:1] for index in range(tokenizer.vocab_size)]
    constraint = make_constraint(tokenizer, json_schema=schema)
    tokens: list[int] = []
    while not constraint.is_finished and not (constraint.is_accepting and rng.random() < 0.5):
        if len(tokens) == LONGEST:
            return None
        ways: dict[bytes, list[int]] = {}
        for token in np.flatnonzero(constraint.mask()).tolist():
            if token not in tokenizer.eos_token_ids:
                ways.setdefault(firsts[token], []).append(token)
        if not ways:  # nothing can follow
            assert constraint.is_accepting
            break
        tokens.append(rng.choice(ways[rng.choice(sorted(ways))]))
        constraint.advance(tokens[-1])
    return tokenizer.decode(tokens)


def draw_schemas(tokenizer: Tokenizer, first: int, count: int) -> list[dict[str, Any]]:
    schemas: list[dict[str, Any]] = []
    seed = first
    while len(schemas) < count:
        schema = SchemaMaker(seed).draw()
        seed += 1
        try:
            make_constraint(tokenizer, json_schema=schema)
        except InvalidRequestError as failure:
            assert any(reason in str(failure) for reason in UNDECLARED), failure
            continue
        schemas.append(schema)
    assert seed - first < 1.2 * count + 10
    return schemas


def test_random_texts_are_valid(tokenizer: Tokenizer) -> None:
    ended = 0
    for seed, schema in enumerate(draw_schemas(tokenizer, 0, NUM_SCHEMAS)):
        text = walk(tokenizer, schema, seed)
        if text is not None:
            ended += 1
            check(schema, text)
    assert ended > 0.7 * NUM_SCHEMAS


def test_what_pocket_writes_is_valid(tokenizer: Tokenizer) -> None:
    model, own = load()
    ended, count = 0, max(10, NUM_SCHEMAS - 40)
    for schema in draw_schemas(tokenizer, 10_000, count):
        constraint = make_constraint(own, json_schema=schema)
        pieces = list(stream_generate(model, own, "The data: ", LONGEST, constraint=constraint))
        if pieces[-1].finish_reason == "stop":
            ended += 1
            check(schema, "".join(piece.text for piece in pieces))
    assert ended > 0.4 * count


def accepts(tokenizer: Tokenizer, schema: dict[str, Any], text: str) -> bool:
    constraint = make_constraint(tokenizer, json_schema=schema)
    try:
        for byte in text.encode():
            token = tokenizer.token_to_id(f"<0x{byte:02X}>")
            assert token is not None
            constraint.advance(token)
    except InvalidRequestError:
        return False
    return constraint.is_accepting


OPEN = {"properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "string"}}


@pytest.mark.parametrize(
    ("schema", "text", "is_valid"),
    [
        (OPEN, '{"a":1,"b":"x"}', True),
        (OPEN, r'{"a":1,"\u0061":"x"}', False),  # the same name, written otherwise
        ({"patternProperties": {"^a": {"type": "integer"}}}, r'{"\u0061":"x"}', False),
        ({"format": "date-time"}, '"2024-12-31T23:59:59Z"', True),
        ({"format": "date-time"}, '"2024-12-31T23:59:60Z"', False),
        ({"format": "date"}, '"0000-01-01"', False),
        ({"format": "date"}, '"2023-02-29"', False),
        ({"format": "time"}, '"12:00:60Z"', False),
        ({"format": "hostname"}, f'"{".".join(["a" * 60] * 5)}"', False),
        ({"pattern": r"^\s$"}, '" "', True),
        ({"pattern": r"^\s$"}, '"\x85"', False),
        ({"pattern": r"^\S$"}, '"\ufeff"', False),
        ({"pattern": r"^\D$"}, '"٣"', False),
        ({"pattern": r"^[^\w]$"}, '"é"', False),
        ({"pattern": "^.$"}, r'"\r"', False),
        ({"pattern": r"^[[a]$"}, '"["', True),
    ],
    ids=lambda value: str(value)[:50],
)
def test_where_validators_and_the_library_differ(
    tokenizer: Tokenizer, schema: dict[str, Any], text: str, is_valid: bool
) -> None:
    kind = "string" if {"pattern", "format"} & set(schema) else "object"
    assert accepts(tokenizer, {"type": kind, **schema}, text) == is_valid


REFUSED = [
    *(
        "not",
        "if",
        "contains",
        "propertyNames",
        "uniqueItems",
        "dependentRequired",
        "dependentSchemas",
    ),
    *(
        "unevaluatedProperties",
        "unevaluatedItems",
        "$dynamicRef",
        "minContains",
        "nullable",
        "tipe",
    ),
]


@pytest.mark.parametrize("keyword", REFUSED)
def test_keywords_are_refused_by_name(tokenizer: Tokenizer, keyword: str) -> None:
    for schema in ({keyword: True}, {"properties": {"a": {"items": {keyword: {}}}}}):
        with pytest.raises(
            InvalidRequestError, match=f"'{keyword[0]}?.?{keyword[1:]}' at".replace("$", r"\$")
        ):
            make_constraint(tokenizer, json_schema=schema)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"multipleOf": 0.1}, "'multipleOf' 0.1 at the top"),
        ({"anyOf": [{"$ref": "#"}, {"type": "null"}]}, "leads back to itself"),
        ({"$ref": "#/default", "default": {"type": "null"}}, "leads to no schema"),
        ({"items": {"$id": "x"}}, r"'\$id' at /items"),
        ({"pattern": "(?i)a"}, r"has '\(\?i\)'"),
        ({"pattern": r"\Aa"}, r"has '\\\\A'"),
        ({"pattern": "[a&&b]"}, "has '&&'"),
        ({"pattern": "[]a]"}, "which validators read in different ways"),
        ({"pattern": "a\\"}, "which validators read in different ways"),
        ({"patternProperties": {r"^\S$": {}}}, "for names at the top"),
    ],
)
def test_what_validators_do_not_agree_on(
    tokenizer: Tokenizer, schema: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        make_constraint(tokenizer, json_schema=schema)


def test_plain_patterns_stay() -> None:
    for pattern in (r"^[a-z_]{1,3}(b|c)*\.\d+\w$", r"a\/b\u0041\n", "(?:x)+?", "é"):
        assert portable_pattern(pattern) == pattern
