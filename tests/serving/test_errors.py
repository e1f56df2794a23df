"""What a client is told: status, OpenAI's shape, a clear line that names the field; also in the middle of a stream."""

import json
from typing import Any

import pytest

from mlx_edge.errors import (
    EngineClosedError,
    InvalidRequestError,
    MemoryBudgetError,
    QueueFullError,
    UnsupportedModelError,
)
from tests.serving.fake_engine import FakeEngine
from tests.serving.running import Running, running

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server() -> Any:
    with running(lambda _: FakeEngine()) as found:
        yield found


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
        ({"repeat_penalty": 1.1}, "repeat_penalty", "did you mean 'repetition_penalty'"),
        ({"temperature": "1"}, "temperature", "valid number"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"max_tokens": 1.5}, "max_tokens", "integer"),
        ({"seed": 1 << 70}, "seed", "less than"),
        ({"logprobs": 3}, "logprobs", "boolean"),
        ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        ({"functions": [{"name": "f"}]}, "functions", "use tools"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"max_completion_tokens": 5}, "max_tokens", "send one of them"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "match"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "the vocabulary has 2048"),
        ({"messages": []}, "messages", "at least 1 item"),
        (
            {"messages": [{"role": "alien", "content": "x"}]},
            "messages.0",
            "system, developer, user",
        ),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "missing"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "string"),
        ({"messages": [{"role": "user", "content": "x", "foo": 1}]}, "messages.0.foo", "unknown"),
        ({"response_format": {"type": "yaml"}}, "response_format", "json_schema, regex or grammar"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "sets itself"),
        ({"tools": [{"type": "web"}]}, "tools.0.type", "function"),
    ],
)
def test_a_bad_field_is_named(
    server: Running, fields: dict[str, Any], param: str, words: str
) -> None:
    status, _, body = server.chat(**fields)
    error = body["error"]
    assert status == 400
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]
    assert "\n" not in error["message"]
    assert error["param"].startswith(param)


@pytest.mark.parametrize(("kind", "noun"), [("input_audio", "audio"), ("file", "files")])
def test_parts_that_no_model_reads(server: Running, kind: str, noun: str) -> None:
    part = {"type": kind, kind: {"url": "http://127.0.0.1:1/x.png"}}
    status, _, body = server.chat(messages=[{"role": "user", "content": [part]}])
    assert (status, body["error"]["message"]) == (400, f"this model takes no {noun}")


@pytest.mark.parametrize(
    ("data", "status", "words"),
    [
        (b"", 415, "Content-Type"),
        (b"{", 400, "not JSON"),
        (b"[1]", 400, "JSON object"),
        (b"[" * 100_000, 400, "not JSON"),
        (b'{"messages": ' + b"[" * 500 + b"]" * 500 + b"}", 400, "not JSON"),
        (b'{"messages": "\xff\xfe"}', 400, "not JSON"),
        (b'{"messages": "\\ud800"}', 400, "not JSON"),
        (b'{"temperature": NaN}', 400, "not JSON"),
        (b'{"temperature": 1e999}', 400, ""),
    ],
)
def test_bodies_that_are_no_requests(server: Running, data: bytes, status: int, words: str) -> None:
    got, _, body = server.ask("POST", CHAT, data)
    assert got == status
    assert words in body["error"]["message"]


def test_text_is_not_taken_for_json(server: Running) -> None:
    status, _, _ = server.ask("POST", CHAT, b'{"messages": []}', Content_Type="text/plain")
    assert status == 415  # what a foreign page may send without asking first


@pytest.mark.parametrize(("path", "status"), [("/v1/nothing", 404), (CHAT, 405), ("/page/x", 404)])
def test_addresses_that_are_none(server: Running, path: str, status: int) -> None:
    got, _, body = server.ask("GET", path)
    assert got == status
    assert body["error"]["code"]


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/v1/embeddings"])
def test_apis_that_are_not_served_name_those_that_are(server: Running, path: str) -> None:
    status, _, body = server.ask("POST", path, {"model": "pocket", "input": "Hi"})
    assert (status, body["error"]["code"]) == (404, "not_found")
    assert "/v1/chat/completions, /v1/completions" in body["error"]["message"]


@pytest.mark.parametrize(
    "name", ["gpt-4o", "../../etc", "/etc/passwd", "pocket/../..", "a\x00b", "~"]
)
def test_a_model_that_is_not_served(server: Running, name: str) -> None:
    status, _, body = server.chat(model=name)
    assert (status, body["error"]["code"]) == (404, "model_not_found")
    assert body["error"]["message"].endswith("expected one of: pocket")


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (InvalidRequestError("no"), 400, None),
        (UnsupportedModelError("no"), 400, None),
        (MemoryBudgetError("needs 1 GB, has 1 MB"), 400, "memory_budget_exceeded"),
        (QueueFullError("256 wait"), 429, "queue_full"),
        (EngineClosedError("closed"), 503, "closing"),
        (RuntimeError("secret of ours"), 500, "internal_error"),
    ],
)
@pytest.mark.parametrize("is_late", [False, True])
def test_what_the_engine_raises(error: Exception, status: int, code: str, is_late: bool) -> None:
    engine = FakeEngine(error=None if is_late else error, late_error=error if is_late else None)
    with running(lambda _: engine) as server:
        got, headers, body = server.chat()
        assert (got, body["error"]["code"]) == (status, code)
        assert ("retry-after" in headers) == (status in {429, 503})
        assert "secret" not in body["error"]["message"]


def test_an_error_in_a_stream_is_its_last_event() -> None:
    with running(lambda _: FakeEngine(late_error=MemoryBudgetError("full"))) as server:
        status, _, text = server.chat(stream=True)
    events = [line[6:] for line in text.split("\n\n") if line]
    assert status == 200
    assert json.loads(events[-1])["error"]["code"] == "memory_budget_exceeded"
    assert "[DONE]" not in text


def test_a_prompt_that_leaves_no_room() -> None:
    with running(lambda _: FakeEngine(context_size=20)) as server:
        for content in ("one two three four five six " * 3, "x" * 10_000_000):
            status, _, body = server.chat(messages=[{"role": "user", "content": content}])
            assert (status, body["error"]["code"]) == (400, "context_length_exceeded")


def test_ignored_fields_are_listed(server: Running) -> None:
    status, headers, _ = server.chat(
        store=True,
        metadata={"a": "b"},
        service_tier=None,
        reasoning_effort="low",
        modalities=["text"],
        stream_options={"include_obfuscation": False},
        functions=None,
    )
    assert status == 200
    assert headers["x-mlx-edge-ignored-fields"] == (
        "metadata, modalities, reasoning_effort, store, stream_options.include_obfuscation"
    )
