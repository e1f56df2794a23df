"""Constraints: masks against brute force over the tokens' bytes, going back, and errors of one line."""

import json
import random
import shutil
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers

from mlx_edge.decoding.constraints import Constraint, make_constraint
from mlx_edge.errors import InvalidRequestError, UnsupportedModelError
from mlx_edge.text import Tokenizer
from mlx_edge.text.tokenizer import load_tokenizer
from mlx_edge.weights.hub import find_model

pytest.importorskip("llguidance", reason="constraints need the package llguidance")

WORDS = [
    "yes",
    " yes",
    "  yes",
    "yes it is",
    "no",
    "nö",
    "nö!",
    "</s>",
    "<s>x",
    "",
    "\n",
    "ye<0x73>",
]


def copy_tokenizer(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    source = find_model("pocket")
    shutil.copy(source / "tokenizer_config.json", folder)
    contents = json.loads((source / "tokenizer.json").read_text())
    change(contents)
    (folder / "tokenizer.json").write_text(json.dumps(contents))
    return folder


def strips_a_space(contents: dict[str, Any]) -> None:
    contents["decoder"]["decoders"].append({"type": "Strip", "content": " ", "start": 1, "stop": 0})


def make_folder(kind: str, folder: Path) -> Path:
    if kind == "pocket":
        return find_model("pocket")
    if kind == "strip":  # as tokenizers converted from Llama 2 do
        return copy_tokenizer(folder, strips_a_space)
    if kind == "sentencepiece":
        for name in ("tokenizer.model", "tokenizer_config.json"):
            shutil.copy(find_model("pocket") / name, folder)
        return folder
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    library.train_from_iterator(["yes it is", " yes no"] * 9, trainer)
    library.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


@pytest.fixture(scope="module", params=["pocket", "strip", "sentencepiece", "byte-level"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    return load_tokenizer(make_folder(request.param, tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def pocket() -> Tokenizer:
    return load_tokenizer(find_model("pocket"))


def walk(constraint: Constraint, tokens: list[int]) -> Constraint:
    for token in tokens:
        constraint.advance(token)
    return constraint


def bytes_of(tokenizer: Tokenizer, tokens: list[int]) -> bytes:
    """What a text of these tokens says, without the characters' borders that a detokenizer waits for."""
    reader = tokenizer.new_reader()
    return b"".join(map(reader.read, tokens))


def test_masks_are_what_brute_force_finds(tokenizer: Tokenizer) -> None:
    rng = random.Random(3)
    grammar = "start: " + " | ".join(map(json.dumps, WORDS))
    words = [word.encode() for word in WORDS]
    plain = [t for t in range(tokenizer.vocab_size) if t not in tokenizer.special_ids]
    spoken = set()
    for _ in range(12):
        constraint = make_constraint(tokenizer, lark=grammar)
        tokens: list[int] = []
        while not constraint.is_finished:
            wanted = np.zeros(tokenizer.vocab_size, np.bool_)
            before = bytes_of(tokenizer, tokens)
            for token in plain:
                after = bytes_of(tokenizer, [*tokens, token])
                wanted[token] = after != before and any(w.startswith(after) for w in words)
            wanted[list(tokenizer.eos_token_ids)] = before in words
            mask = constraint.mask()
            assert np.array_equal(mask, wanted), (tokens, before)
            assert constraint.is_accepting == (before in words)
            tokens.append(int(rng.choice(np.flatnonzero(mask))))
            constraint.advance(tokens[-1])
        text = tokenizer.decode([t for t in tokens if t not in tokenizer.eos_token_ids])
        assert text in WORDS
        spoken.add(text)
    assert len(spoken) > 3


def test_the_first_token_is_read_as_the_start_of_a_text(tmp_path: Path, pocket: Tokenizer) -> None:
    stripping = load_tokenizer(copy_tokenizer(tmp_path, strips_a_space))
    word = pocket.token_to_id("▁a")
    assert word is not None and word == stripping.token_to_id("▁a")
    assert not make_constraint(pocket, regex="a").mask()[word]
    constraint = make_constraint(stripping, regex="a a")
    assert constraint.mask()[word]  # says "a" there, and " a" from then on
    walk(constraint, [word, word])
    assert constraint.is_finished and stripping.decode([word, word]) == "a a"
    with pytest.raises(InvalidRequestError, match="no token of this vocabulary can follow"):
        make_constraint(stripping, regex=" a")  # its first space is always lost


def test_any_way_back_leads_to_the_same_state(pocket: Tokenizer) -> None:
    rng = random.Random(11)
    schema = {"type": "array", "items": {"enum": ["a", 12, None]}, "maxItems": 3}
    for _ in range(10):
        constraint = make_constraint(pocket, json_schema=schema)
        tokens: list[int] = []
        while not constraint.is_finished or rng.random() < 0.6:
            if tokens and (constraint.is_finished or rng.random() < 0.3):
                num_back = rng.randint(1, len(tokens))
                constraint.rollback(num_back)
                del tokens[-num_back:]
            else:
                tokens.append(int(rng.choice(np.flatnonzero(constraint.mask()))))
                constraint.advance(tokens[-1])
            fresh = walk(make_constraint(pocket, json_schema=schema), tokens)
            assert np.array_equal(constraint.mask(), fresh.mask())
            assert constraint.is_finished == fresh.is_finished
            assert constraint.is_accepting == fresh.is_accepting


def test_what_is_not_allowed_is_refused_and_changes_nothing(pocket: Tokenizer) -> None:
    constraint = make_constraint(pocket, regex="ab+")
    end, b = next(iter(pocket.eos_token_ids)), pocket.token_to_id("b")
    assert b is not None
    before = constraint.mask()
    for token in (b, end, 0, -1, pocket.vocab_size, pocket.vocab_size + 1):
        with pytest.raises(InvalidRequestError, match=f"token {token} cannot follow"):
            constraint.advance(token)
    assert np.array_equal(constraint.mask(), before)
    walk(constraint, pocket.encode("ab", add_special_tokens=False))
    assert constraint.is_accepting and not constraint.is_finished
    constraint.advance(end)
    assert constraint.is_finished
    for token in (b, end):
        with pytest.raises(InvalidRequestError, match="cannot follow"):
            constraint.advance(token)
    with pytest.raises(InvalidRequestError, match="taken back"):
        constraint.rollback(9)


@pytest.mark.parametrize(
    ("text", "is_allowed"),
    [("[ 1, 2 ]", True), ("[\n  1,\n  2\n]", True), ("[  1,2]", False), (" [1,2]", False)],
)
def test_white_space_is_short(pocket: Tokenizer, text: str, is_allowed: bool) -> None:
    schema = {"type": "array", "items": {"type": "integer"}}
    constraint = make_constraint(pocket, json_schema=schema)
    tokens = [pocket.token_to_id(f"<0x{byte:02X}>") or 0 for byte in text.encode()]
    if is_allowed:
        assert walk(constraint, tokens).is_finished
    else:
        with pytest.raises(InvalidRequestError, match="cannot follow"):
            walk(constraint, tokens)


def test_masks_cannot_be_written_to(pocket: Tokenizer) -> None:
    with pytest.raises(ValueError):
        make_constraint(pocket, regex="a").mask()[0] = True


def test_a_grammar_without_a_way_back_says_so(pocket: Tokenizer) -> None:
    constraint = make_constraint(pocket, lark='start: a "c"\na[max_tokens=3]: /b*/')
    walk(constraint, [b := pocket.encode("b", add_special_tokens=False)[-1], b])
    with pytest.raises(InvalidRequestError, match="rollback"):
        constraint.rollback(1)


def test_a_new_end_token_is_no_text_any_more(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(copy_tokenizer(tmp_path, lambda contents: None))
    a = tokenizer.token_to_id("a")
    assert make_constraint(tokenizer, regex="a").mask()[a]
    tokenizer.add_eos_token("a")
    constraint = make_constraint(tokenizer, regex="a")
    assert not constraint.mask()[a]
    constraint.advance(tokenizer.token_to_id("<0x61>") or 0)
    assert set(np.flatnonzero(constraint.mask())) == tokenizer.eos_token_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "has nothing, expected one of"),
        ({"regex": "a", "lark": "b"}, "regex and grammar, expected one of"),
        ({"regex": "a(b"}, "unclosed group"),
        ({"regex": r"(a)\1"}, "backreferences are not supported"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": r"a\b"}, "lookarounds not supported"),
        ({"regex": "[a&&b]"}, "nothing matches it"),
        ({"regex": "\ud800"}, "surrogates"),
        ({"regex": 3}, "'int' object"),
        ({"lark": ""}, "no start rule"),
        ({"lark": "start: a"}, 'unknown name: "a"'),
        ({"lark": "start: start"}, "nothing matches it"),
        ({"lark": "start: a\na[temperature=0.5]: /x/"}, "temperature"),
        ({"json_schema": "{"}, "is not JSON"),
        ({"json_schema": "3"}, "is 3, expected an object"),
        ({"json_schema": "false"}, "is false, expected an object"),
        ({"json_schema": '{"minimum": NaN}'}, "NaN is no JSON number"),
        ({"json_schema": {"minimum": float("nan")}}, "not JSON compliant"),
        ({"json_schema": {"enum": [{1}]}}, "not JSON serializable"),
        ({"json_schema": '{"items":' * 100000 + "{}" + "}" * 100000}, "nested too deeply"),
        ({"json_schema": '{"items":' * 300 + "{}" + "}" * 300}, "recursion limit"),
        ({"json_schema": {"type": "foo"}}, "Invalid type: foo"),
        ({"json_schema": {"type": "string", "format": "zork"}}, "Unknown format: zork"),
        ({"json_schema": {"not": {}}}, "'not' at the top, which cannot be enforced"),
        ({"json_schema": {"items": {"maxlength": 3}}}, "'maxlength' at /items"),
        ({"json_schema": {"properties": {"a": {"uniqueItems": True}}}}, "at /properties/a"),
        ({"json_schema": {"anyOf": [{}, {"nullable": True}]}}, "'nullable' at /anyOf/1"),
        ({"json_schema": {"x-guidance": {"lenient": True}}}, "x-guidance"),
        ({"json_schema": {"items": [{}]}}, "prefixItems"),
        ({"json_schema": {"minProperties": 2}}, "minProperties 2"),
        ({"json_schema": {"const": 2**53 + 1}}, "9007199254740993"),
        ({"json_schema": {"enum": [{"a": [-(10**400)]}]}}, "beyond 2\\^53"),
        ({"json_schema": {"minimum": -998779.6988811621}}, "more than 15 digits"),
        ({"json_schema": {"maximum": float("inf")}}, "not JSON compliant"),
        ({"json_schema": '{"maximum": 1e999}'}, "the number inf"),
        ({"json_schema": {"minimum": 5, "maximum": 3, "type": "integer"}}, "Unsatisfiable"),
        ({"json_schema": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}, "oneOf"),
        ({"json_schema": {"exclusiveMinimum": 0, "maximum": 0.5}}, "excludes 0 as a bound"),
        ({"json_schema": {"exclusiveMaximum": -1.0, "minimum": -1.5}}, "has 1.5 as another"),
        (
            {"json_schema": {"allOf": [{"exclusiveMinimum": 0}, {"exclusiveMaximum": 0.5}]}},
            "excludes 0 as a bound",
        ),
        ({"json_schema": {"minimum": 3, "exclusiveMinimum": True}}, "write the number itself"),
        ({"json_schema": {"$ref": "#/x"}}, "leads to no schema"),
        ({"json_schema": {"$ref": "#"}}, "leads back to itself"),
        ({"json_schema": {"$ref": "https://example.com/a"}}, "leads to no schema"),
        ({"json_schema": {"type": "string", "pattern": "a(b"}}, "unclosed group"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_promised_is_one_line(
    pocket: Tokenizer, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message) as found:
        make_constraint(pocket, **options)
    assert "\n" not in str(found.value) and len(str(found.value)) < 400


def test_remarks_and_names_of_properties_are_no_keywords(pocket: Tokenizer) -> None:
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "t",
        "default": {"maxlength": 1},
        "examples": [{"zork": 2**60}],
        "properties": {"not": {"const": {"if": 1}}, "zork": True},
        "$defs": {"minProperties": {"type": "null"}},
    }
    make_constraint(pocket, json_schema=json.dumps(schema))
    make_constraint(pocket, json_schema="true")


def test_a_missing_package_is_one_line(pocket: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InvalidRequestError, match=r"llguidance.*pip install 'mlx-edge"):
        make_constraint(pocket, regex="a")


def test_a_decoder_that_looks_back_is_refused(tmp_path: Path) -> None:
    def without_decoder(contents: dict[str, Any]) -> None:
        contents["decoder"] = None

    tokenizer = load_tokenizer(copy_tokenizer(tmp_path, without_decoder))
    with pytest.raises(UnsupportedModelError, match="bytes of their own"):
        make_constraint(tokenizer, regex="a")


def test_a_model_without_an_end_is_refused(tmp_path: Path) -> None:
    copy_tokenizer(tmp_path, lambda contents: None)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(InvalidRequestError, match="extra-eos-token"):
        make_constraint(tokenizer, regex="a")
    tokenizer.add_eos_token("</s>")
    make_constraint(tokenizer, regex="a")


@pytest.mark.parametrize(
    ("text", "exists"),
    [
        ("2023-02-28", True),
        ("2023-02-29", False),
        ("2024-02-29", True),
        ("1900-02-29", False),
        ("2000-02-29", True),
        ("2023-04-31", False),
        ("2023-10-31", True),
        ("2023-12-01", True),
        ("2023-02-30", False),
    ],
)
@pytest.mark.parametrize(("kind", "rest"), [("date", ""), ("date-time", "T10:20:30Z")])
def test_dates_exist(pocket: Tokenizer, text: str, exists: bool, kind: str, rest: str) -> None:
    constraint = make_constraint(pocket, json_schema={"type": "string", "format": kind})
    tokens = [pocket.token_to_id(f"<0x{ord(c):02X}>") or 0 for c in f'"{text}{rest}"']
    if exists:
        assert walk(constraint, tokens).is_finished
    else:
        with pytest.raises(InvalidRequestError, match="cannot follow"):
            walk(constraint, tokens)


BOUNDS = [-1.5, -1, -0.75, 0, 0.001, 0.5, 1, 12.25]
NUMBERS = (
    "0 -0 0.0 -0.0 0.00 1 -1 1.0 -1.0 0.5 -0.5 0.75 -0.750 0.001 -0.0010 0.0001 -1.5 1.50".split()
)
NUMBERS += "7 7.0 10 -10 -10.0 12.25 12.2500001 12.24 100 100.0 99.99 1e0 1e1 5e-1 0e5 -1e1 11 1.4999".split()


@pytest.mark.parametrize("kind", ["number", "integer"])
def test_numbers_keep_within_their_bounds(pocket: Tokenizer, kind: str) -> None:
    lows = [(k, b) for k in ("minimum", "exclusiveMinimum") for b in BOUNDS]
    highs = [(k, b) for k in ("maximum", "exclusiveMaximum") for b in BOUNDS]
    num_tried = 0
    for low, high in [
        *product(lows, highs),
        *((low,) * 2 for low in lows),
        *((h, h) for h in highs),
    ]:
        schema = dict([("type", kind), low, high])
        try:
            constraint = make_constraint(pocket, json_schema=schema)
        except InvalidRequestError:  # nothing between them, or a pair that is refused
            continue
        num_tried += 1
        for text in NUMBERS:
            if accepts(pocket, constraint, text):
                value = float(text)
                assert value >= schema.get("minimum", value), (schema, text)
                assert value <= schema.get("maximum", value), (schema, text)
                assert value > schema.get("exclusiveMinimum", value - 1), (schema, text)
                assert value < schema.get("exclusiveMaximum", value + 1), (schema, text)
                assert kind == "number" or value % 1 == 0, (schema, text)
    assert num_tried > 100


def accepts(tokenizer: Tokenizer, constraint: Constraint, text: str) -> bool:
    """Whether the constraint takes a text, which is taken back again."""
    num_taken = 0
    try:
        for byte in text.encode():
            constraint.advance(tokenizer.token_to_id(f"<0x{byte:02X}>") or 0)
            num_taken += 1
        return constraint.is_accepting
    except InvalidRequestError:
        return False
    finally:
        constraint.rollback(num_taken)
