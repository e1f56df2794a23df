"""Tool calls: every form is read, any cut of the text gives the same events, and nothing is lost."""

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from mlx_edge.errors import InvalidRequestError
from mlx_edge.text.reasoning import Reasoning
from mlx_edge.text.tool_calls import (
    ArgumentText,
    CallBegun,
    CallDone,
    ContentText,
    Event,
    Note,
    Reply,
    collect,
    read_functions,
)
from mlx_edge.text.tools.events import join
from mlx_edge.text.tools.families import FORMATS, ToolFormat, find_format
from mlx_edge.text.tools.formats import Function
from mlx_edge.text.tools.reader import ReplyReader

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}
FUNCTIONS = {"weather": Function("weather", WEATHER), "now": Function("now", {"type": "object"})}
THINK = Reasoning("<think>", "</think>")
BOTH = [("weather", {"city": "Oslo", "days": 3}), ("now", {})]
ONE = BOTH[:1]
# The sign by which a template names its form, a text in it, and what the text calls.
WRITTEN: list[tuple[str, str, list[tuple[str, dict[str, Any]]]]] = [
    (
        "<tool_call>",
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 3}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        BOTH,
    ),
    (
        "<tool_call>",  # two in one, arguments before the name, none at all
        '<tool_call>{"arguments": {"city": "Oslo", "days": 3}, "name": "weather"}\n{"name": "now"}</tool_call>',
        BOTH,
    ),
    (
        "<tool_call>",  # arguments as a text, more fields, and an end that never came
        '<tool_call>{"id": [1, {"a": null}], "name": "weather", '
        '"arguments": "{\\"city\\": \\"Oslo\\", \\"days\\": 3}"}',
        ONE,
    ),
    (
        "<function= <parameter=",
        "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        "</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
        BOTH,
    ),
    (
        "<seed:tool_call>",
        "<seed:tool_call><function=weather><parameter=city>Oslo</parameter><parameter=days>3</parameter>"
        "</function></seed:tool_call>",
        ONE,
    ),
    (
        "<arg_key> <arg_value>",
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n<arg_key>days</arg_key>\n"
        "<arg_value>3</arg_value>\n</tool_call><tool_call>now</tool_call>",
        BOTH,
    ),
    (
        "<minimax:tool_call>",
        '<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">Oslo</parameter>\n'
        '<parameter name="days">3</parameter>\n</invoke>\n<invoke name="now">\n</invoke>\n</minimax:tool_call>',
        BOTH,
    ),
    (
        "<|python_tag|>",
        '{"name": "weather", "parameters": {"city": "Oslo", "days": 3}}; {"name": "now", "parameters": {}}',
        BOTH,
    ),
    ("<|python_tag|>", '<|python_tag|>{"name": "now", "parameters": {}}', BOTH[1:]),
    (
        "<function= </function>",
        '<function=weather>{"city": "Oslo", "days": 3}</function><function=now>{}</function>',
        BOTH,
    ),
    (
        "[TOOL_CALLS]",
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Oslo", "days": 3}, "id": "abcdef123"}, '
        '{"name": "now", "arguments": {}}]',
        BOTH,
    ),
    (
        "[TOOL_CALLS] [ARGS]",
        '[TOOL_CALLS]weather[ARGS]{"city": "Oslo", "days": 3}[TOOL_CALLS]now[CALL_ID]abcdef123[ARGS]{}',
        BOTH,
    ),
    (
        "<|tool_call|>",
        '<|tool_call|>[{"name": "weather", "arguments": {"city": "Oslo", "days": 3}}]',
        ONE,
    ),
    (
        "<|tool_call|> <|/tool_call|>",
        '<|tool_call|>[{"name": "weather", "arguments": {"city": "Oslo", "days": 3}}]<|/tool_call|>',
        ONE,
    ),
    (
        "<TOOLCALL>",
        '<TOOLCALL>[{"name": "weather", "arguments": {"city": "Oslo", "days": 3}}, {"name": "now"}]</TOOLCALL>',
        BOTH,
    ),
    (
        "<｜tool▁sep｜> ```json",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        '{"city": "Oslo", "days": 3}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n'
        "```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        BOTH,
    ),
    (
        "<｜tool▁sep｜>",
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Oslo", "days": 3}'
        "<｜tool▁call▁end｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        BOTH,
    ),
    (
        "<|tool_call_argument_begin|>",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
        '{"city": "Oslo", "days": 3}<|tool_call_end|><|tool_call_begin|>functions.now:1'
        "<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
        BOTH,
    ),
    (
        "to=functions. <|channel|>",
        "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
        '{"city": "Oslo", "days": 3}<|call|>',
        ONE,
    ),
]


def read(
    form: ToolFormat | None,
    pieces: list[str],
    *,
    reasoning: Reasoning | None = THINK,
    is_open: bool = False,
    is_bound: bool = False,
) -> list[Event]:
    reader = ReplyReader(form, reasoning, FUNCTIONS, is_open=is_open, is_bound=is_bound)
    events = [event for piece in pieces for event in reader.feed(piece)] + reader.finish()
    assert reader.finish() == []
    return join(events)


def shape(events: list[Event]) -> list[Any]:
    """The events without the ids, which are random."""
    return [(e.index, e.name) if isinstance(e, CallBegun) else e for e in events]


def cuts(text: str, seed: int) -> Iterator[list[str]]:
    yield list(text)
    rng = random.Random(seed)
    for longest in (3, 9, 40):
        pieces, at = [], 0
        while at < len(text):
            end = at + rng.randint(1, longest)
            pieces.append(text[at:end])
            at = end
        yield pieces


def calls_of(reply: Reply) -> list[tuple[str, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in reply.calls]


@pytest.mark.parametrize(("signs", "text", "calls"), WRITTEN)
def test_each_form_is_found_and_read(
    signs: str, text: str, calls: list[tuple[str, dict[str, Any]]]
) -> None:
    form = find_format(f"{{% if tools %}}{signs}{{% endif %}}")
    for before, after in [("", ""), ("<think>\nIs it?\n</think>\n\n", ""), ("Well:\n", "\n")]:
        if form.is_bare and before == "Well:\n" and not text.startswith("<"):
            continue
        events = read(form, [before + text + after])
        reply = collect(events)
        assert calls_of(reply) == calls
        assert reply.content == before.strip() * ("think" not in before) and not reply.notes
        assert reply.reasoning == "Is it?" * ("think" in before)
        assert len({call.id for call in reply.calls}) == len(calls)
        for pieces in cuts(before + text + after, len(text)):
            assert shape(read(form, pieces)) == shape(events)
            bound = read(form, pieces, is_bound=True)
            assert shape(bound) == shape(events)


def test_every_form_is_tried() -> None:
    assert {find_format(signs).name for signs, _, _ in WRITTEN} == {form.name for form in FORMATS}


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_no_mark_holds_another(form: ToolFormat) -> None:
    """What the search for the first mark counts on."""
    marks = [*form.openers, *form.wrappers]
    assert not [(a, b) for a in marks for b in marks if a != b and a in b]


BROKEN = [
    ("<tool_call>", '<tool_call>{"name": "now", "arguments": {"a": 1}</tool_call>'),
    ("<tool_call>", '<tool_call>{"name": "now", "arguments": {"a": 1,}}</tool_call>'),
    ("<tool_call>", '<tool_call>{"name": "now", "arguments": [1]}</tool_call>'),
    ("<tool_call>", '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
    ("<tool_call>", '<tool_call>{"arguments": {}}</tool_call>'),
    ("<tool_call>", '<tool_call>{"name": "now", "arguments": {"a": "'),
    ("<tool_call>", '<tool_call>{"name": "now", "arguments": {"a": NaN}}</tool_call>'),
    ("<tool_call>", '<tool_call>{"name": "now", "arguments": {"a": "\\x"}}</tool_call>'),
    ("<tool_call>", '<tool_call>{"name": "now", "arguments": ' + '{"a":' * 200),
    ("<tool_call>", "the tag <tool_call> and </tool_call>"),
    ("<function= <parameter=", "<tool_call>\n<function=now>\n<parameter=a>\n1\n"),
    ("<function= <parameter=", "a <tool_call> b <parameter=c> </tool_call> d"),
    ("<arg_key> <arg_value>", "<tool_call>now <arg_key>a</arg_key>b</tool_call>"),
    ("[TOOL_CALLS] [ARGS]", "[TOOL_CALLS]now(1)"),
    ("<|python_tag|>", '{"name": "Ann", "parameters": {}}'),
    ("<|python_tag|>", '{"answer": [1, 2]}'),
    ("<|python_tag|>", "a; b; {}"),
    ("<|tool_call_argument_begin|>", "<|tool_calls_section_begin|>hm<|tool_calls_section_end|>"),
]


@pytest.mark.parametrize(("signs", "text"), BROKEN)
def test_what_is_no_call_is_content(signs: str, text: str) -> None:
    form = find_format(signs)
    for pieces in [[text], [f"{text}\n "], *cuts(text, 7)]:
        events = read(form, pieces)
        reply = collect(events)
        assert reply.content == "".join(pieces) and not reply.calls
        opened = any(mark in text for mark in form.openers) or (form.is_bare and text[0] == "{")
        assert bool(reply.notes) == opened


def test_a_sound_call_after_a_broken_one_is_read() -> None:
    broken, sound = '<tool_call>{"name": now}', '<tool_call>{"name": "now"}</tool_call>'
    reply = collect(read(find_format(""), [broken + sound]))
    assert reply.content == broken and calls_of(reply) == [("now", {})]
    listed = '[TOOL_CALLS][{"name": "now"}, {"name": 3}]'
    reply = collect(read(find_format("[TOOL_CALLS]"), [listed]))
    assert calls_of(reply) == [("now", {})] and reply.content == ', {"name": 3}]'


def test_a_bound_reply_flows() -> None:
    reader = ReplyReader(find_format(""), None, FUNCTIONS, is_open=False, is_bound=True)
    assert reader.feed('<tool_call>\n{"name": "weather", "argum') != []
    assert reader.feed('ents": {"ci') == [ArgumentText(0, '{"ci')]
    assert reader.num_calls == 1
    assert reader.feed('ty": "O') == [ArgumentText(0, 'ty": "O')]
    assert reader.finish() == [] and reader.num_calls == 1  # cut: what came stays
    whole = ReplyReader(find_format(""), None, FUNCTIONS, is_open=False, is_bound=True)
    assert whole.feed('<tool_call>{"name": "now"}')[1:] == [ArgumentText(0, "{}"), CallDone(0)]


def test_strings_between_tags_stay_as_they_are() -> None:
    form = find_format("<function= <parameter=")
    head, tail = "<tool_call>\n<function=weather>\n", "</function>\n</tool_call>"
    cases = {"123": "123", "null": "null", " a\n\nb ": " a\n\nb ", '"x"': '"x"', "a</p>": "a</p>"}
    for value, city in cases.items():
        text = f"{head}<parameter=city>\n{value}\n</parameter>\n{tail}"
        assert calls_of(collect(read(form, [text]))) == [("weather", {"city": city})]
    for value, days in {"3": 3, "[1]": [1], "soon": "soon", "1e999": None, "NaN": "NaN"}.items():
        text = f"{head}<parameter=days>{value}</parameter>{tail}"
        (call,) = collect(read(form, [text])).calls
        assert days is None or json.loads(call.arguments) == {"days": days}


def test_raw_line_breaks_in_strings_are_escaped() -> None:
    text = '<tool_call>{"name": "now", "arguments": {"a": "x\ny\t"}}</tool_call>'
    (call,) = collect(read(find_format(""), [text])).calls
    assert json.loads(call.arguments) == {"a": "x\ny\t"}


PARTS = [
    *("<tool_call>", "</tool_call>", "<think>", "</think>", "\n", "  ", "{", "}", "[", "]", ",", ":", ";", '"'),
    *('"name"', '"now"', '"arguments"', '{"name": "now", "parameters": {}}', "{}", "1", "\\", "\\u00e", "é", "😀"),
    *("<function=", "<function=now>", "</function>", "<parameter=a>", "</parameter>", "now", "<arg_key>"),
    *("</arg_key>", "<arg_value>", "</arg_value>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<", ">", "x"),
    *("<|channel|>", "analysis", "<|message|>", "<|end|>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<|call|>"),
]  # fmt: skip


@pytest.mark.parametrize("form", [None, *FORMATS], ids=lambda form: form.name if form else "none")
def test_any_text_in_any_pieces(form: ToolFormat | None) -> None:
    rng = random.Random(form.name if form else "none")
    parts = PARTS + list((*form.openers, *form.wrappers, form.lead) if form else ()) * 4
    for round_ in range(60):
        text = "".join(rng.choices(parts, k=rng.randint(0, 30)))
        reasoning = THINK if round_ % 2 else None
        events = read(form, [text], reasoning=reasoning)
        for pieces in cuts(text, round_):
            assert shape(read(form, pieces, reasoning=reasoning)) == shape(events), text
        for is_bound in (True, False):
            read(form, list(text), reasoning=reasoning, is_open=True, is_bound=is_bound)
        reply = collect(events)
        if not reply.calls and not reasoning:
            assert reply.content == text
        for call in reply.calls:
            assert isinstance(json.loads(call.arguments), dict)
        if not form:
            assert not any(isinstance(event, Note) for event in events)


def test_a_long_reply_is_read_in_time_of_its_length() -> None:
    value = json.dumps("a\n<tool_call>{é" * 20_000)
    text = f'<tool_call>{{"name": "now", "arguments": {{"a": {value}, "b": {[1] * 9000}}}}}</tool_call>'
    (call,) = collect(read(find_format(""), [text])).calls
    assert len(call.arguments) > 300_000
    half = len(text) // 2
    assert collect(read(find_format(""), [text[:half]])).content == text[:half]


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([{"type": "retrieval"}], r"tools\[0\].type is 'retrieval'"),
        ([{"type": "function"}], r"tools\[0\].function is missing"),
        ([{"type": "function", "function": {"name": "a b"}}], r"function.name is 'a b'"),
        ([{"type": "function", "function": {"name": "a", "x": 1}}], "unknown field 'x'"),
        ([{"type": "function", "function": {"name": "a"}, "y": 1}], "unknown field 'y'"),
        ([{"type": "function", "function": {"name": "a", "parameters": []}}], "parameters is no"),
        ([{"type": "function", "function": {"name": "a", "strict": 1}}], "strict is 1"),
        ([{"type": "function", "function": {"name": "a"}}] * 2, "given twice"),
    ],
)
def test_tools_that_are_none(tools: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        read_functions(tools)


def test_content_flows() -> None:
    reader = ReplyReader(find_format(""), THINK, FUNCTIONS, is_open=False, is_bound=False)
    assert reader.feed("Hello") == [ContentText("Hello")]
    assert reader.feed(" <tool") == []
    assert reader.feed("box") == [ContentText(" <toolbox")]
