"""Structured replies: what is forced is read back in every form of calls, and what cannot be promised is refused."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_edge.decoding.constraints import Constraint, make_constraint
from mlx_edge.engine.request import Grammar
from mlx_edge.errors import InvalidRequestError
from mlx_edge.serving.structured import make_grammar
from mlx_edge.text import Tokenizer
from mlx_edge.text.reasoning import find_reasoning
from mlx_edge.text.tokenizer import load_tokenizer
from mlx_edge.text.tool_calls import Reply, ReplyParser, collect, find_tool_format
from mlx_edge.text.tools.families import FORMATS, find_format
from mlx_edge.weights.hub import find_model
from tests.serving.fake_engine import FakeEngine
from tests.serving.running import running
from tests.text.test_tool_calls import WRITTEN

pytest.importorskip("llguidance", reason="constraints need the package llguidance")
jsonschema = pytest.importorskip("jsonschema", reason="schemas are judged by jsonschema")

CITIES = ["Oslo", 'a"b', "</x> é"]
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": CITIES},
        "days": {"type": "integer", "minimum": 0, "maximum": 12},
        "exact": {"type": ["boolean", "null"]},
    },
    "required": ["city", "days"],
}
NOW = {"type": "object", "properties": {"zone": {"const": "UTC"}}}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now", "parameters": NOW}},
]
SCHEMAS = {"weather": WEATHER, "now": NOW}
NAMED_NOW = {"type": "function", "function": {"name": "now"}}


def make_tokenizer(folder: Path, template: str, special: tuple[str, ...] = ()) -> Tokenizer:
    """Pocket's tokenizer with a chat template, and some marks as special tokens."""
    source = find_model("pocket")
    config = json.loads((source / "tokenizer_config.json").read_text())
    config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    contents = json.loads((source / "tokenizer.json").read_text())
    size = len(contents["model"]["vocab"])
    kinds = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for index, token in enumerate(special, start=size):
        contents["added_tokens"].append({"id": index, "content": token, "special": True, **kinds})
    (folder / "tokenizer.json").write_text(json.dumps(contents))
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def pocket() -> Tokenizer:
    return load_tokenizer(find_model("pocket"))


def constrain(tokenizer: Tokenizer, grammar: Grammar | None) -> Constraint:
    assert grammar is not None
    if grammar.kind == "json_schema":
        return make_constraint(tokenizer, json_schema=grammar.source)
    if grammar.kind == "regex":
        return make_constraint(tokenizer, regex=grammar.source)
    return make_constraint(tokenizer, lark=grammar.source)


def walk(tokenizer: Tokenizer, grammar: Grammar | None, seed: int) -> str:
    """A random text of the grammar; characters are drawn first, since most tokens would go on for ever."""
    rng = random.Random(seed)
    constraint = constrain(tokenizer, grammar)
    reader = tokenizer.new_reader()
    spoken = [reader.read(index) for index in range(tokenizer.vocab_size)]
    tokens: list[int] = []
    while not constraint.is_finished and not (constraint.is_accepting and rng.random() < 0.5):
        allowed = [int(token) for token in np.flatnonzero(constraint.mask())]
        allowed = [token for token in allowed if token not in tokenizer.eos_token_ids]
        first = rng.choice(sorted({spoken[token][:1] for token in allowed}))
        tokens.append(rng.choice([token for token in allowed if spoken[token][:1] == first]))
        constraint.advance(tokens[-1])
        assert len(tokens) < 3000
    return tokenizer.decode(tokens)


def accepts(tokenizer: Tokenizer, grammar: Grammar | None, text: str) -> bool:
    """Whether the grammar takes the whole text."""
    constraint = constrain(tokenizer, grammar)
    try:
        for token in tokenizer.encode(text, add_special_tokens=False):
            constraint.advance(token)
    except InvalidRequestError:
        return False
    return constraint.is_accepting


def parse(tokenizer: Tokenizer, text: str, prompt: str = "", *, is_bound: bool = True) -> Reply:
    parser = ReplyParser(tokenizer, prompt=prompt, tools=TOOLS, is_bound=is_bound)
    events = [event for piece in text for event in parser.feed(piece)] + parser.finish()
    return collect(events)


def check_calls(reply: Reply) -> None:
    assert not reply.notes and not reply.content
    for call in reply.calls:
        arguments = json.loads(call.arguments)
        jsonschema.validate(arguments, SCHEMAS[call.name])
        assert set(arguments) <= set(SCHEMAS[call.name]["properties"])


def marks_of(form: Any) -> tuple[str, ...]:
    candidates = (*form.openers, *form.wrappers, form.trigger)
    extra = (
        "[ARGS]",
        "<｜tool▁sep｜>",
        "<｜tool▁call▁end｜>",
        "<arg_key>",
        "</arg_value>",
        "<|message|>",
    )
    return tuple(
        dict.fromkeys(
            m for m in (*candidates, *extra) if len(m) > 1 and " " not in m and "=" not in m
        )
    )


FORM_SIGNS = sorted({signs for signs, _, _ in WRITTEN})


# Pocket's decoder reads the mark of a space in a special token as a space: DeepSeek's marks stay text here.
KINDS = [(s, k) for s in FORM_SIGNS for k in ("text", "special") if k == "text" or "▁" not in s]


@pytest.fixture(params=KINDS, ids=str)
def family(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    """A tokenizer whose template names a form; its marks are plain text or special tokens."""
    signs, kind = request.param
    plain = make_tokenizer(tmp_path, signs)
    if kind == "text":
        return plain
    return make_tokenizer(tmp_path, signs, marks_of(find_tool_format(plain)))


def test_required_calls_are_read_back(family: Tokenizer) -> None:
    """Random texts of the grammar are calls whose arguments match, whether or not the parser trusts them."""
    is_single = find_tool_format(family).between is None
    grammar = make_grammar(family, tools=TOOLS, tool_choice="required", prompt="").grammar
    counts = set()
    for seed in range(8):
        text = walk(family, grammar, seed)
        bound, free = parse(family, text), parse(family, text, is_bound=False)
        assert [c.arguments for c in bound.calls] == [c.arguments for c in free.calls]
        assert bound.calls, text
        check_calls(bound)
        counts.add(len(bound.calls))
    assert is_single == (counts == {1})


def test_one_call_and_a_named_one(family: Tokenizer) -> None:
    options = [
        {"tool_choice": "required", "parallel_tool_calls": False},
        {"tool_choice": NAMED_NOW},
    ]
    for option in options:
        grammar = make_grammar(family, tools=TOOLS, prompt="", **option).grammar
        for seed in range(3):
            text = walk(family, grammar, seed)
            reply = parse(family, text)
            check_calls(reply)
            assert len(reply.calls) == 1
            assert option["tool_choice"] == "required" or reply.calls[0].name == "now"


def test_a_strict_function_binds_a_free_reply(family: Tokenizer) -> None:
    tools = [{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS]
    form = find_tool_format(family)
    grammar = make_grammar(family, tools=tools, prompt="").grammar
    marks = find_reasoning(family)
    says = marks.answer if marks else ""
    assert accepts(family, grammar, f"{says}Hello, {{}} <tool! it is 3; [x]")
    calls = make_grammar(family, tools=tools, tool_choice="required", prompt="").grammar
    text = walk(family, calls, 3)
    assert accepts(family, grammar, text)
    if form.trigger and not says and "▁" not in form.trigger:
        assert accepts(family, grammar, f"Well, now:\n{text}")
        assert not accepts(family, grammar, f"Well:\n{form.trigger} nothing")
    if "▁" not in form.trigger:
        other = text.replace("now", "nov").replace("weather", "whether")
        assert not accepts(family, grammar, other)


RAW = {
    "<function= <parameter=": "<tool_call>\n<function=say>\n<parameter=text>\n{}\n</parameter>\n</function>\n"
    "</tool_call>",
    "<arg_key> <arg_value>": "<tool_call>say\n<arg_key>text</arg_key>\n<arg_value>{}</arg_value>\n</tool_call>",
    "<minimax:tool_call>": '<minimax:tool_call>\n<invoke name="say">\n<parameter name="text">{}</parameter>\n'
    "</invoke>\n</minimax:tool_call>",
}


@pytest.mark.parametrize("signs", RAW)
def test_strings_between_tags_are_written_raw(signs: str, tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
    tools = [{"type": "function", "function": {"name": "say", "parameters": schema}}]
    tokenizer = make_tokenizer(tmp_path, signs)
    grammar = make_grammar(tokenizer, tools=tools, tool_choice="required", prompt="").grammar
    for said in ("<b>1</b>\n{", "", '"', "</parametr>"):
        text = RAW[signs].format(said)
        assert accepts(tokenizer, grammar, text)
        parser = ReplyParser(tokenizer, tools=tools)
        (call,) = collect(parser.feed(text) + parser.finish()).calls
        assert json.loads(call.arguments) == {"text": said}
    assert not accepts(tokenizer, grammar, RAW[signs].replace("text", "txt"))


@pytest.mark.parametrize("bound", ["pattern", "minLength"])
def test_what_raw_strings_cannot_promise(bound: str, tmp_path: Path) -> None:
    schema = {"properties": {"text": {"type": "string", bound: 1 if bound == "minLength" else "a"}}}
    tools = [{"type": "function", "function": {"name": "say", "parameters": schema}}]
    tokenizer = make_tokenizer(tmp_path, "<arg_key> <arg_value>")
    with pytest.raises(InvalidRequestError, match=f"'say' has '{bound}' for the string 'text'"):
        make_grammar(tokenizer, tools=tools, tool_choice="required", prompt="")
    assert make_grammar(tokenizer, tools=tools, prompt="").grammar is None


JSON_FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": ["é", 1]}}}
THINKING = "{% if x %}<think></think>{% endif %}<tool_call>"


@pytest.mark.parametrize("special", [(), ("<think>", "</think>")], ids=["text", "special"])
def test_thoughts_come_before_what_is_held(special: tuple[str, ...], tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path, THINKING, special)
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    answered = make_grammar(tokenizer, prompt="", response_format=JSON_FORMAT).grammar
    called = make_grammar(tokenizer, prompt="", tools=TOOLS, tool_choice="required").grammar
    for grammar, text in [(answered, "1"), (answered, '"é"'), (called, call)]:
        assert accepts(tokenizer, grammar, text)
        assert accepts(tokenizer, grammar, f"<think>a {{ <b> 1\n</think>\n\n{text}")
        assert accepts(tokenizer, grammar, f"<think></think>{text}")
        assert not accepts(tokenizer, grammar, f"a</think>{text}")
        assert not accepts(tokenizer, grammar, f"<think>{text}")
    opened = make_grammar(tokenizer, prompt="<think>\n", response_format=JSON_FORMAT).grammar
    assert accepts(tokenizer, opened, "so\n</think>\n1") and not accepts(tokenizer, opened, "1")
    plain = make_grammar(tokenizer, response_format=JSON_FORMAT).grammar  # no conversation
    assert accepts(tokenizer, plain, "1") and not accepts(tokenizer, plain, "<think></think>1")
    parser = ReplyParser(tokenizer, prompt="<think>\n", is_bound=True)
    reply = collect(parser.feed("so\n</think>\n1") + parser.finish())
    assert (reply.reasoning, reply.content) == ("so", "1")


@pytest.mark.parametrize(
    ("response_format", "good", "bad"),
    [
        ({"type": "json_object"}, '{"a": [1]}', "[1]"),
        (JSON_FORMAT, "1", "2"),
        ({"type": "regex", "regex": r"a/b\/\d\\"}, "a/b/7\\", "a/b"),
        ({"type": "grammar", "grammar": 'start: word "!"\nword: "a" | "b"'}, "b!", "c!"),
    ],
    ids=["json_object", "json_schema", "regex", "grammar"],
)
def test_forms_of_answers(
    response_format: dict[str, Any], good: str, bad: str, tmp_path: Path, pocket: Tokenizer
) -> None:
    thinking = make_tokenizer(tmp_path, THINKING)
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    for tokenizer, prompt in [(pocket, None), (pocket, ""), (thinking, "")]:
        grammar = make_grammar(tokenizer, prompt=prompt, response_format=response_format).grammar
        assert accepts(tokenizer, grammar, good) and not accepts(tokenizer, grammar, bad)
        assert not accepts(tokenizer, grammar, call)
        both = make_grammar(
            tokenizer, prompt=prompt, response_format=response_format, tools=TOOLS
        ).grammar
        assert accepts(tokenizer, both, good) and not accepts(tokenizer, both, bad)
        assert accepts(tokenizer, both, call)
    assert make_grammar(
        pocket, response_format=response_format, tools=TOOLS, tool_choice="none"
    ) == (make_grammar(pocket, response_format=response_format))


def test_nothing_is_held_without_reason(pocket: Tokenizer) -> None:
    for options in ({}, {"tools": TOOLS}, {"tools": TOOLS, "tool_choice": "auto"}, {"tools": []}):
        assert make_grammar(pocket, prompt="", **options).grammar is None
    assert make_grammar(pocket, response_format={"type": "text"}).grammar is None
    assert make_grammar(pocket, tools=TOOLS, tool_choice="none", prompt="").grammar is None
    grammar = make_grammar(pocket, tools=TOOLS, parallel_tool_calls=False, prompt="").grammar
    call = '<tool_call>\n{"name": "weather", "arguments": {"any": 1}}\n</tool_call>'
    assert accepts(pocket, grammar, call) and not accepts(pocket, grammar, f"{call}\n{call}")


def tool(parameters: Mapping[str, Any], **fields: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f", "parameters": parameters, **fields}}]


def schema_format(**fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": {}, **fields}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type is 'xml'"),
        ({"response_format": {}}, "response_format.type is 'None'"),
        (
            {"response_format": {"type": "text", "x": 1}},
            "response_format has the unknown field 'x'",
        ),
        ({"response_format": {"type": "json_schema"}}, "json_schema is missing"),
        ({"response_format": {"type": "regex"}}, "response_format.regex is missing"),
        ({"response_format": schema_format(name="a b")}, "json_schema.name is 'a b'"),
        ({"response_format": schema_format(strict=3)}, "json_schema.strict is 3"),
        ({"response_format": schema_format(schema=[])}, "json_schema.schema is missing"),
        ({"response_format": schema_format(scheme={})}, "unknown field 'scheme'"),
        (
            {"response_format": schema_format(schema={"items": {"uniqueItems": True}})},
            "json_schema.schema: the JSON schema has 'uniqueItems' at /items",
        ),
        ({"tool_choice": "required"}, "tools is empty"),
        ({"tool_choice": "any", "tools": TOOLS}, "tool_choice is 'any'"),
        (
            {"tool_choice": {"type": "allowed_tools"}, "tools": TOOLS},
            "tool_choice is 'allowed_tools'",
        ),
        ({"tool_choice": {**NAMED_NOW, "x": 1}, "tools": TOOLS}, "unknown field 'x'"),
        ({"tool_choice": NAMED_NOW, "tools": tool({})}, "name is 'now', expected one of the tools"),
        (
            {"tool_choice": "required", "tools": tool({"not": {}})},
            r"tools\[0\].function.parameters: the JSON schema has 'not' at the top",
        ),
        ({"tools": tool({"not": {}}, strict=True)}, "has 'not' at the top"),
        ({"tool_choice": "required", "tools": tool({"type": "string"})}, "type is 'string'"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str, pocket: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        make_grammar(pocket, prompt="", **options)


def test_a_grammar_that_cannot_be_a_part(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path, THINKING)
    grammar = {"type": "grammar", "grammar": 'start: "a" start | "b"'}
    with pytest.raises(InvalidRequestError, match="the word 'start' 2 times"):
        make_grammar(tokenizer, prompt="", response_format=grammar)


def test_every_form_is_forced() -> None:
    assert {find_format(signs).name for signs in FORM_SIGNS} == {form.name for form in FORMATS}


@pytest.mark.parametrize(
    ("options", "is_bound"),
    [
        ({"tool_choice": "required"}, True),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, True),
        ({"parallel_tool_calls": False}, True),
        ({"response_format": {"type": "json_object"}}, False),
        ({}, False),
    ],
)
def test_a_brace_is_no_certain_call_where_answers_have_a_form(
    pocket: Tokenizer, options: dict[str, Any], is_bound: bool
) -> None:
    assert make_grammar(pocket, prompt="", tools=TOOLS, **options).is_bound == is_bound


THOUGHT = ["<think>", "I see", " it.", "\n</think>", "<answer>", 'do(action="Back")']


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "content", "thoughts", "is_held"),
    [
        ({}, 'I see it.\ndo(action="Back")', None, True),
        ({"separate_reasoning": True}, 'do(action="Back")', "I see it.", True),
        ({"response_format": {"type": "text"}}, "".join(THOUGHT), None, False),
        ({"tools": TOOLS}, "".join(THOUGHT), None, False),
        ({"response_format": {"type": "regex", "regex": "a"}}, "".join(THOUGHT), None, True),
    ],
)
def test_the_servers_own_grammar(
    fields: dict[str, Any], content: str, thoughts: str | None, is_held: bool, stream: bool
) -> None:
    engine = FakeEngine(THOUGHT)
    with running(lambda _: engine, defaults={"grammar": "autoglm"}) as server:
        status, _, body = server.chat(stream=stream, max_tokens=20, **fields)
    assert status == 200
    assert (engine.requests[-1].grammar is not None) is is_held
    if stream:
        events = [json.loads(line[6:]) for line in body.split("\n\n")[:-2]]
        deltas = [event["choices"][0]["delta"] for event in events]
        found = "".join(delta.get("content", "") for delta in deltas)
        thought = "".join(delta.get("reasoning", "") for delta in deltas)
    else:
        message = body["choices"][0]["message"]
        found, thought = message["content"], message.get("reasoning")
    assert (found, thought or None) == (content, thoughts)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_marks_of_a_ready_grammar_are_no_text(pocket: Tokenizer, size: int) -> None:
    marks = make_grammar(pocket, response_format={"type": "grammar", "grammar": "autoglm"}).marks
    text = '\n<think> a < b </think>\n<answer>\ndo(action="Back")</answer>\n'
    parser = ReplyParser(pocket, reasoning=marks)
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    reply = collect([e for piece in pieces for e in parser.feed(piece)] + parser.finish())
    assert (reply.reasoning, reply.content) == ("a < b", 'do(action="Back")')


def test_a_server_may_part_the_thoughts_of_its_grammar() -> None:
    defaults = {"grammar": "autoglm", "separate_reasoning": True}
    with running(lambda _: FakeEngine(THOUGHT), defaults=defaults) as server:
        message = server.chat(max_tokens=20)[2]["choices"][0]["message"]
    assert (message["content"], message["reasoning"]) == ('do(action="Back")', "I see it.")


def test_a_ready_grammar_by_its_name(pocket: Tokenizer) -> None:
    form = {"type": "grammar", "grammar": "autoglm"}
    plan = make_grammar(pocket, response_format=form)
    assert accepts(pocket, plan.grammar, 'Go.\ndo(action="Home")')
    with pytest.raises(InvalidRequestError, match="leave out tools"):
        make_grammar(pocket, response_format=form, tools=TOOLS)
    with pytest.raises(InvalidRequestError, match="unknown field 'strict'"):
        make_grammar(pocket, response_format={**form, "strict": True})


@pytest.mark.parametrize("grammar", ["autoglmm", "start: x", "no/such/file.lark"])
def test_a_default_grammar_that_is_none_is_said_at_the_start(grammar: str) -> None:
    with (
        pytest.raises(InvalidRequestError, match="grammar"),
        running(lambda _: FakeEngine(), defaults={"grammar": grammar}),
    ):
        pass
