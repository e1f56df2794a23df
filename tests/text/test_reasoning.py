"""Thoughts apart from the answer, and messages as chat templates want them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_edge.errors import InvalidRequestError
from mlx_edge.text import Tokenizer
from mlx_edge.text.reasoning import find_reasoning
from mlx_edge.text.tokenizer import load_tokenizer
from mlx_edge.text.tool_calls import Reply, ReplyParser, collect, to_template
from mlx_edge.weights.hub import find_model

Make = Callable[[str], Tokenizer]
HARMONY = "<|start|><|channel|>analysis<|message|>to=functions.x"


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def tokenizer(template: str) -> Tokenizer:
        source = find_model("pocket")
        config = json.loads((source / "tokenizer_config.json").read_text())
        (tmp_path / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
        config["chat_template"] = template
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return load_tokenizer(tmp_path)

    return tokenizer


def read(tokenizer: Tokenizer, text: str, prompt: str = "") -> Reply:
    replies = []
    for size in (1, 3, 1000):
        parser = ReplyParser(tokenizer, prompt=prompt)
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        replies.append(collect([e for p in pieces for e in parser.feed(p)] + parser.finish()))
    assert replies[0] == replies[1] == replies[2]
    return replies[0]


@pytest.mark.parametrize(
    ("template", "prompt", "text", "reasoning", "content"),
    [
        ("</think>", "", "<think>\na\n\nb\n</think>\n\nc ", "a\n\nb", "c "),
        ("</think>", "", " \n<think>a</think>", "a", ""),
        ("</think>", "", "<think>a", "a", ""),
        ("</think>", "", "c <think>a</think>", "", "c <think>a</think>"),
        ("</think>", "", "  c\n", "", "  c\n"),
        ("</think>", "user <think>\n", "a</think>c", "a", "c"),
        ("</think>", "user <think>\n\n</think>\n\n", "c", "", "c"),
        ("</think>", "the user says <think> and", "a", "", "a"),
        ("[THINK][/THINK]", "", "[THINK]a[/THINK]c", "a", "c"),
        ("", "<think>", "<think>a</think>", "", "<think>a</think>"),
        (
            HARMONY,
            "<|start|>assistant",
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>c",
            "a",
            "c",
        ),
    ],
)
def test_thoughts(
    make: Make, template: str, prompt: str, text: str, reasoning: str, content: str
) -> None:
    reply = read(make(template), text, prompt)
    assert (reply.reasoning, reply.content) == (reasoning, content)


def test_pocket_does_not_think() -> None:
    assert find_reasoning(load_tokenizer(find_model("pocket"))) is None


CALL = {"id": "call_1", "function": {"name": "now", "arguments": '{"a": "é"}'}}
MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "3"},
]
SHOWS = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ ARG }}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("shown", "given"),
    [
        ("c.function.arguments | tojson", {"a": "é"}),
        ("c.function | tojson", {"a": "é"}),
        ("c.function.arguments", '{"a": "é"}'),
        ("'x' + c.function.arguments", '{"a": "é"}'),
        (
            "c.function.arguments if c.function.arguments is string else c.function.arguments | tojson",
            {"a": "é"},
        ),
    ],
)
def test_arguments_as_the_template_reads_them(make: Make, shown: str, given: object) -> None:
    tokenizer = make(SHOWS.replace("ARG", shown))
    messages = to_template(tokenizer, MESSAGES)
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == given
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert '{"a": "é"}' in str(text)


def test_messages_are_completed_and_not_changed(make: Make) -> None:
    before = json.dumps(MESSAGES)
    messages = to_template(make("x"), MESSAGES)
    assert [m["content"] for m in messages] == ["x\ny", "", "3"]
    assert messages[2]["name"] == "now" and messages[2]["tool_call_id"] == "call_1"
    assert messages[1]["tool_calls"][0]["type"] == "function"
    assert json.dumps(MESSAGES) == before


def test_ids_of_nine_characters(make: Make) -> None:
    messages = to_template(make("[TOOL_CALLS]"), MESSAGES)
    (call,) = messages[1]["tool_calls"]
    assert len(call["id"]) == 9 and call["id"].isalnum()
    assert messages[2]["tool_call_id"] == call["id"] and messages[2]["name"] == "now"


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": 3}, r"messages\[0\].content is no text"),
        ({"content": [{"type": "image_url"}]}, r"content\[0\].type is 'image_url'"),
        ({"tool_calls": [{}]}, r"tool_calls\[0\].function is missing"),
        (
            {"tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
            "arguments is '\\[1\\]'",
        ),
        ({"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, "arguments is '{'"),
    ],
)
def test_messages_that_cannot_be_shown(make: Make, message: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidRequestError, match=text):
        to_template(make("x"), [{"role": "assistant", **message}])
