"""Text under a constraint, on the bundled model: random JSON schemas and regexes, greedy and sampled, all valid.

`MLX_EDGE_FUZZ=1000` raises the number of texts.
"""

import json
import os
import random
import re
from datetime import date
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlx_edge
from mlx_edge.decoding.constraints import make_constraint
from mlx_edge.decoding.processors import make_logits_processors
from mlx_edge.decoding.sampling import make_sampler
from mlx_edge.decoding.stream import GenerationResponse, stream_generate
from mlx_edge.errors import InvalidRequestError
from mlx_edge.models.decoder import Decoder
from mlx_edge.text import Tokenizer

pytest.importorskip("llguidance", reason="constraints need the package llguidance")
jsonschema = pytest.importorskip("jsonschema", reason="schemas are judged by jsonschema")

FORMATS = jsonschema.FormatChecker(["ipv4", "uuid"])
NUM_TEXTS = int(os.environ.get("MLX_EDGE_FUZZ", "60"))
MAX_TOKENS = 120  # few texts are longer; those are cut, and not judged
ALPHABET = ["a", "b", "cat", "ö", "Z", "7", " ", '"', "\\", "\n", "<s>", "日", "."]

Pocket = tuple[Decoder, Tokenizer]


@pytest.fixture(scope="module")
def pocket() -> Pocket:
    return mlx_edge.load()


@FORMATS.checks("date", ValueError)
@FORMATS.checks("date-time", ValueError)
def is_date(value: object) -> bool:
    """Whether a day exists. Python's calendar lacks the year 0, which is a leap year like 2000."""
    return not isinstance(value, str) or bool(
        date.fromisoformat(re.sub("^0000", "2000", value[:10]))
    )


def make_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """A random schema whose texts have an end."""
    kinds = ["enum", "const", "integer", "number", "string", "boolean", "null", "pattern", "format"]
    if depth < 3:
        kinds += ["object", "array", "tuple", "union"] * (2 if depth else 8)
    match rng.choice(kinds):
        case "enum":
            return {"enum": [make_value(rng) for _ in range(rng.randint(1, 5))]}
        case "const":
            return {"const": make_value(rng)}
        case "integer":
            low = rng.choice([0, -5, 17, -12345, rng.randint(-(10**9), 10**9)])
            high = low + rng.choice([0, 1, 9, 100, 10**6])
            names = rng.choice([("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum")])
            widened = 0 if names[0] == "minimum" else 1
            bounds = {names[0]: low - widened, names[1]: high + widened}
            return {"type": "integer", **bounds}
        case "number":
            low = round(rng.choice([0, -0.5, 3, 0.001, rng.uniform(-1e6, 1e6)]), 3)
            high = round(low + rng.choice([0, 0.25, 7, 1e4]), 3)
            return {"type": "number", "minimum": low, "maximum": high}
        case "string":
            shortest = rng.randint(0, 4)
            return {
                "type": "string",
                "minLength": shortest,
                "maxLength": shortest + rng.randint(0, 12),
            }
        case "pattern":
            return {"type": "string", "pattern": f"^{make_regex(rng, 1)}$"}
        case "format":
            return {"type": "string", "format": rng.choice(["date", "date-time", "ipv4", "uuid"])}
        case "object":
            return make_object_schema(rng, depth)
        case "array":
            fewest = rng.randint(0, 2)
            items = make_schema(rng, depth + 1)
            most = fewest + rng.randint(0, 3)
            return {"type": "array", "items": items, "minItems": fewest, "maxItems": most}
        case "tuple":
            items = [make_schema(rng, depth + 1) for _ in range(rng.randint(1, 3))]
            size = len(items)
            return {"type": "array", "prefixItems": items, "minItems": size, "maxItems": size}
        case "union":
            return {"anyOf": [make_schema(rng, depth + 1) for _ in range(rng.randint(1, 3))]}
        case kind:
            return {"type": kind}


def make_object_schema(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(["name", "age", "a b", "ö", "x_1", 'q"', "</s>"], rng.randint(0, 4))
    schema = {
        "type": "object",
        "properties": {name: make_schema(rng, depth + 1) for name in names},
        "required": [name for name in names if rng.random() < 0.6],
        "additionalProperties": False,
    }
    if rng.random() < 0.15:  # a map with few entries
        few = {"type": "integer", "minimum": 0, "maximum": 9}
        schema |= {"additionalProperties": few, "maxProperties": len(names) + 1}
        schema["required"] = names
    return schema


def make_value(rng: random.Random, depth: int = 0) -> Any:
    kinds = ["text", "text", "integer", "truth", "none"] + ["list", "dict"] * (depth < 2)
    match rng.choice(kinds):
        case "text":
            return "".join(rng.choices(ALPHABET, k=rng.randint(0, 4)))
        case "integer":
            return rng.choice([0, -1, 42, 2**53, rng.randint(-(10**12), 10**12)])
        case "truth":
            return rng.random() < 0.5
        case "list":
            return [make_value(rng, depth + 1) for _ in range(rng.randint(0, 3))]
        case "dict":
            names = rng.sample(ALPHABET, rng.randint(0, 2))
            return {name: make_value(rng, depth + 1) for name in names}
    return None


def make_regex(rng: random.Random, depth: int = 0) -> str:
    """A random regex that means the same in Python and in Rust, and whose matches have an end."""
    if depth >= 3 or rng.random() < 0.3:
        classes = ["[a-f]", '[^\\n"]', "[0-9]", "[A-Z][a-z]", "\\.", "[ÄÖä-ü]", "(?:yes|no)"]
        return rng.choice([*classes, re.escape(rng.choice(["cat", "The ", "日本", "1+1", "x y"]))])
    parts = [make_regex(rng, depth + 1) for _ in range(rng.randint(1, 3))]
    match rng.choice(["join", "join", "either", "repeat", "maybe", "between"]):
        case "join":
            return "".join(parts)
        case "either":
            return f"(?:{'|'.join(parts)})"
        case "maybe":
            return f"(?:{parts[0]})?" + "".join(parts[1:])
        case "repeat":
            return f"(?:{parts[0]}){{{rng.randint(1, 4)}}}"
    return f"(?:{parts[0]}){{0,{rng.randint(1, 5)}}}"


def speak(pocket: Pocket, seed: int, **constraint: Any) -> tuple[str, list[GenerationResponse]]:
    """A text under a constraint: greedy where the seed is even, sampled (hot) where it is odd."""
    responses = list(
        stream_generate(
            *pocket,
            "Once upon a time",
            MAX_TOKENS,
            constraint=make_constraint(pocket[1], **constraint),
            sampler=make_sampler(0.0 if seed % 2 == 0 else 1.5, seed=seed),
        )
    )
    return "".join(r.text for r in responses), responses


def is_complete(pocket: Pocket, responses: list[GenerationResponse]) -> bool:
    """Whether the text came to its end; all tokens are text, but for an end token at the end."""
    tokens = [r.token for r in responses]
    assert not {*tokens[:-1]} & pocket[1].special_ids
    assert all(r.finish_reason is None for r in responses[:-1])
    return responses[-1].finish_reason == "stop"


def test_random_schemas_are_always_met(pocket: Pocket) -> None:
    num_complete = 0
    for seed in range(NUM_TEXTS // 2):
        schema = make_schema(random.Random(seed))
        text, responses = speak(pocket, seed, json_schema=schema)
        if is_complete(pocket, responses):
            num_complete += 1
            judge = jsonschema.Draft202012Validator(schema, format_checker=FORMATS)
            judge.validate(json.loads(text))
    assert num_complete > 0.8 * (NUM_TEXTS // 2)


def test_random_walks_meet_the_schema(pocket: Pocket) -> None:
    """No model: every allowed token is as likely, so that the corners of a grammar are reached too."""
    tokenizer = pocket[1]
    num_complete = 0
    for seed in range(NUM_TEXTS):
        rng = random.Random(-seed - 1)
        schema = make_schema(rng)
        constraint = make_constraint(tokenizer, json_schema=schema)
        tokens: list[int] = []
        while not constraint.is_finished and len(tokens) < MAX_TOKENS:
            tokens.append(int(rng.choice(np.flatnonzero(constraint.mask()))))
            constraint.advance(tokens[-1])
        if constraint.is_finished:
            num_complete += 1
            text = tokenizer.decode(t for t in tokens if t not in tokenizer.eos_token_ids)
            judge = jsonschema.Draft202012Validator(schema, format_checker=FORMATS)
            judge.validate(json.loads(text))
    assert num_complete > 0.8 * NUM_TEXTS


SHOP: dict[str, Any] = {  # as pydantic writes it
    "$defs": {
        "Tea": {
            "properties": {"kind": {"const": "tea"}, "hot": {"type": "boolean"}},
            "required": ["kind"],
            "title": "Tea",
            "type": "object",
            "additionalProperties": False,
        },
        "Cake": {
            "properties": {
                "kind": {"const": "cake"},
                "layers": {"allOf": [{"type": "integer", "minimum": 1}, {"maximum": 12}]},
                "beside": {"anyOf": [{"$ref": "#/$defs/Tea"}, {"type": "null"}], "default": None},
            },
            "required": ["kind", "layers", "beside"],
            "type": "object",
            "additionalProperties": False,
        },
    },
    "type": "array",
    "items": {
        "oneOf": [{"$ref": "#/$defs/Tea"}, {"$ref": "#/$defs/Cake"}],
        "discriminator": {"propertyName": "kind"},
    },
    "minItems": 1,
    "maxItems": 2,
}


@pytest.mark.parametrize("seed", range(4))
def test_a_schema_of_parts_is_met(pocket: Pocket, seed: int) -> None:
    text, responses = speak(pocket, seed, json_schema=SHOP)
    assert is_complete(pocket, responses)
    jsonschema.Draft202012Validator(SHOP).validate(json.loads(text))


def test_random_regexes_are_always_matched(pocket: Pocket) -> None:
    num_complete = 0
    for seed in range(NUM_TEXTS // 2):
        regex = make_regex(random.Random(seed))
        text, responses = speak(pocket, seed, regex=regex)
        if is_complete(pocket, responses):
            num_complete += 1
            assert re.fullmatch(regex, text), (seed, regex, text)
    assert num_complete > 0.8 * (NUM_TEXTS // 2)


def test_the_log_probabilities_are_those_of_the_allowed(pocket: Pocket) -> None:
    _, responses = speak(pocket, 0, regex="(yes|no|maybe)")
    tokens = [r.token for r in responses]
    constraint = make_constraint(pocket[1], regex="(yes|no|maybe)")
    for response in responses:
        allowed = constraint.mask()
        found = mx.exp(response.logprobs)
        assert found.sum().item() == pytest.approx(1, abs=1e-5)
        assert ((found > 0) <= mx.array(allowed)).all().item()
        constraint.advance(response.token)
    assert pocket[1].decode(tokens) in ("yes", "no", "maybe")


def test_greedy_takes_the_likeliest_of_the_allowed_at_every_step(pocket: Pocket) -> None:
    schema = {"type": "array", "items": {"type": "string", "maxLength": 9}, "maxItems": 3}
    model, tokenizer = pocket
    _, responses = speak(pocket, 0, json_schema=schema)
    prompt, found = tokenizer.encode("Once upon a time"), [r.token for r in responses]
    logits = model(mx.array([[*prompt, *found]], dtype=mx.int32))[0, len(prompt) - 1 : -1]
    constraint = make_constraint(tokenizer, json_schema=schema)
    for token, row in zip(found, logits, strict=True):
        assert token == mx.argmax(mx.where(mx.array(constraint.mask()), row, -mx.inf)).item()
        constraint.advance(token)
    assert constraint.is_finished and len(found) > 3


def test_no_processor_brings_back_what_is_forbidden(pocket: Pocket) -> None:
    wanted = pocket[1].token_to_id("▁dog")
    assert wanted is not None
    (response, *_) = stream_generate(
        *pocket,
        "Once upon a time",
        constraint=make_constraint(pocket[1], regex="cat"),
        logits_processors=make_logits_processors({wanted: 1000.0}),
    )
    assert response.token != wanted


def test_the_end_of_a_grammar_needs_no_end_token(pocket: Pocket) -> None:
    text, responses = speak(pocket, 0, regex="cat")
    assert text == "cat"
    assert responses[-1].finish_reason == "stop"
    assert responses[-1].token not in pocket[1].eos_token_ids


def test_an_empty_text_is_a_text(pocket: Pocket) -> None:
    text, responses = speak(pocket, 0, regex="")
    assert text == "" and len(responses) == 1 and responses[0].finish_reason == "stop"


def test_a_cut_text_says_so(pocket: Pocket) -> None:
    constraint = make_constraint(pocket[1], regex="(cat ){50}")
    responses = list(stream_generate(*pocket, "The", 7, constraint=constraint))
    assert responses[-1].finish_reason == "length" and len(responses) == 7
    assert not constraint.is_finished


def test_an_end_at_the_last_token_is_an_end(pocket: Pocket) -> None:
    _, responses = speak(pocket, 0, regex="cat")
    constraint = make_constraint(pocket[1], regex="cat")
    *_, last = stream_generate(*pocket, "Once upon a time", len(responses), constraint=constraint)
    assert last.finish_reason == "stop"


def test_a_constraint_serves_one_generation(pocket: Pocket) -> None:
    constraint = make_constraint(pocket[1], regex="cat")
    list(stream_generate(*pocket, "The", constraint=constraint))
    with pytest.raises(InvalidRequestError, match="make a new one"):
        list(stream_generate(*pocket, "The", constraint=constraint))
