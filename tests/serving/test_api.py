"""The official openai client, unchanged, on the bundled model: what it asks for it gets, a refusal it raises."""

import json
from typing import Annotated, Any, Literal

import openai
import pydantic
import pytest

import mlx_edge
from tests.serving.running import Running, running, wait_for

HI = [{"role": "user", "content": "Once upon a time"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "tap",
        "description": "Tap the screen",
        "parameters": {
            "type": "object",
            "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}},
            "required": ["x", "y"],
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ann", "Bob"]}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server() -> Any:
    with running() as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> Any:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def chat(client: openai.OpenAI, **options: Any) -> Any:
    given = {"model": "pocket", "messages": HI, "max_tokens": 12, **options}
    return client.chat.completions.create(**given)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["pocket"]
    assert client.models.retrieve("pocket").owned_by == "mlx_edge"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")


def test_a_completion_is_that_of_the_single_loop(client: openai.OpenAI) -> None:
    model, tokenizer = mlx_edge.load()
    expected = mlx_edge.generate(model, tokenizer, "Once upon a time", max_tokens=12)
    got = client.completions.create(model="pocket", prompt="Once upon a time", max_tokens=12)
    assert got.choices[0].text == expected
    tokens = tokenizer.encode("Once upon a time")
    both = client.completions.create(
        model="pocket", prompt=[tokens, tokenizer.encode("The dog")], max_tokens=12, n=2
    )
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.choices[0].text == both.choices[1].text == expected
    assert both.usage is not None
    assert both.usage.prompt_tokens == len(tokens) + len(tokenizer.encode("The dog"))


def test_chat_and_its_stream_say_the_same(client: openai.OpenAI) -> None:
    whole = chat(client)
    events = list(chat(client, stream=True, stream_options={"include_usage": True}))
    text = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
    assert text == whole.choices[0].message.content
    assert events[0].choices[0].delta.role == "assistant"
    assert events[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert events[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert not events[-1].choices
    assert len({event.id for event in events}) == 1


def test_usage_says_what_was_cached_or_why_not(client: openai.OpenAI) -> None:
    long = [{"role": "user", "content": "the little dog ran to the big tree and " * 8}]
    first, second = chat(client, messages=long).usage, chat(client, messages=long).usage
    assert first.prompt_tokens == second.prompt_tokens
    assert first.total_tokens == first.prompt_tokens + first.completion_tokens
    assert first.x_cache_miss
    assert second.prompt_tokens_details.cached_tokens > 0
    assert second.x_timings["total_s"] >= second.x_timings["first_token_s"] > 0


def test_seeds_and_choices(client: openai.OpenAI) -> None:
    def texts(**options: Any) -> list[str]:
        answer = chat(client, temperature=1.2, **options)
        return [choice.message.content for choice in answer.choices]

    assert texts(seed=7, n=3) == texts(seed=7, n=3)
    assert texts(seed=7, n=3)[0] == texts(seed=7)[0]
    assert len(set(texts(seed=7, n=4))) > 1
    assert texts(seed=7) != texts(seed=8)
    streamed: dict[int, str] = {}
    for event in chat(client, temperature=1.2, seed=7, n=3, stream=True):
        for choice in event.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + (choice.delta.content or "")
    assert [streamed[index] for index in range(3)] == texts(seed=7, n=3)


def test_stop_strings(client: openai.OpenAI) -> None:
    text = client.completions.create(model="pocket", prompt="Once upon a time", max_tokens=30)
    whole = text.choices[0].text
    stop = whole[10:14]
    cut = client.completions.create(
        model="pocket", prompt="Once upon a time", max_tokens=30, stop=[stop, "never in it"]
    )
    assert cut.choices[0].text == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_logprobs(client: openai.OpenAI) -> None:
    answer = chat(client, logprobs=True, top_logprobs=3, max_tokens=5)
    items = answer.choices[0].logprobs.content
    assert len(items) == answer.usage.completion_tokens
    for item in items:
        assert len(item.top_logprobs) == 3
        assert item.token == item.top_logprobs[0].token  # greedy
        assert item.logprob == item.top_logprobs[0].logprob <= 0
    streamed = [
        item
        for event in chat(client, logprobs=True, top_logprobs=3, max_tokens=5, stream=True)
        for choice in event.choices
        if choice.logprobs
        for item in choice.logprobs.content
    ]
    assert streamed == items
    old = client.completions.create(model="pocket", prompt="Once", max_tokens=3, logprobs=2)
    assert old.choices[0].logprobs is not None
    assert len(old.choices[0].logprobs.tokens or []) == 3


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_the_limit(client: openai.OpenAI, limit: str) -> None:
    answer = client.chat.completions.create(model="pocket", messages=HI, **{limit: 3})  # type: ignore[call-overload]
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (3, "length")


def test_logit_bias(client: openai.OpenAI) -> None:
    _, tokenizer = mlx_edge.load()
    token = tokenizer.encode("dog", add_special_tokens=False)[0]
    answer = chat(client, logit_bias={str(token): 100}, logprobs=True, max_tokens=2)
    assert [item.token for item in answer.choices[0].logprobs.content] == [
        tokenizer.decode([token])
    ] * 2


@pytest.mark.parametrize("stream", [False, True])
def test_json_of_a_schema(client: openai.OpenAI, stream: bool) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    answer = chat(client, response_format=form, max_tokens=100, stream=stream)
    if stream:
        text = "".join(e.choices[0].delta.content or "" for e in answer if e.choices)
    else:
        text = answer.choices[0].message.content
    value = json.loads(text)
    assert value["name"] in {"Ann", "Bob"}
    assert isinstance(value["age"], int)


def test_other_forms(client: openai.OpenAI) -> None:
    hi = [{"role": "user", "content": "Hi"}]
    form = {"type": "json_object"}
    text = chat(client, messages=hi, response_format=form).choices[0].message.content
    assert isinstance(json.loads(text), dict)
    regex = {"type": "regex", "regex": "(yes|no){2}"}
    text = chat(client, extra_body={"response_format": regex}).choices[0].message.content
    assert text in {"yesyes", "yesno", "noyes", "nono"}
    lark = {"type": "grammar", "grammar": 'start: "a"+ "b"'}
    text = chat(client, extra_body={"response_format": lark}).choices[0].message.content
    assert set(text) <= {"a", "b"}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "tap"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_tools(client: openai.OpenAI, choice: Any, stream: bool) -> None:
    options = {"tools": [TOOL], "tool_choice": choice, "parallel_tool_calls": False}
    answer = chat(client, stream=stream, max_tokens=120, **options)
    if stream:
        name, arguments, reason = "", "", None
        for event in answer:
            reason = event.choices[0].finish_reason or reason
            for call in event.choices[0].delta.tool_calls or []:
                assert call.index == 0
                name += call.function.name or ""
                arguments += call.function.arguments or ""
    else:
        call = answer.choices[0].message.tool_calls[0]
        name, arguments = call.function.name, call.function.arguments
        reason = answer.choices[0].finish_reason
        assert call.id
    assert (name, reason) == ("tap", "tool_calls")
    assert {"x", "y"} == set(json.loads(arguments))


SHORT_TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {
        "type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"]}}}
    for name in ("press", "swipe")
]  # fmt: skip


def test_parallel_calls_stream_as_they_are_whole(client: openai.OpenAI) -> None:
    options = {"tools": SHORT_TOOLS, "tool_choice": "required", "temperature": 1.0}
    options |= {"max_tokens": 100}
    for seed in range(20):  # whether there is a second call is the model's choice
        whole = chat(client, seed=seed, **options).choices[0].message.tool_calls or []
        if len(whole) > 1:
            break
    else:
        pytest.fail("none of 20 replies had a second call")
    streamed: dict[int, list[str]] = {}
    for event in chat(client, seed=seed, stream=True, **options):
        for call in event.choices[0].delta.tool_calls or []:
            parts = streamed.setdefault(call.index, ["", ""])
            parts[0] += call.function.name or ""
            parts[1] += call.function.arguments or ""
    assert [tuple(streamed[i]) for i in range(len(whole))] == [
        (call.function.name, call.function.arguments) for call in whole
    ]
    assert len({call.id for call in whole}) == len(whole)


@pytest.mark.parametrize("stream", [False, True])
def test_the_clients_own_parser_reads_a_strict_schema(client: openai.OpenAI, stream: bool) -> None:
    class Person(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="forbid")
        name: Literal["Ann", "Bob"]
        age: Annotated[int, pydantic.Field(ge=0, le=99)]

    given: Any = {"model": "pocket", "messages": HI, "max_tokens": 100, "response_format": Person}
    if stream:
        with client.beta.chat.completions.stream(**given) as events:
            answer = events.get_final_completion()
    else:
        answer = client.beta.chat.completions.parse(**given)
    person = answer.choices[0].message.parsed
    assert person is not None
    assert person.age in range(100)


def test_a_conversation_with_a_tools_answer(client: openai.OpenAI) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "tap", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Tap"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "c1", "content": "done"},
    ]
    assert chat(client, messages=messages, tools=[TOOL]).choices[0].message.role == "assistant"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"model": "gpt-4o"}, openai.NotFoundError),
        ({"temperature": -1}, openai.BadRequestError),
        ({"extra_body": {"foo": 1}}, openai.BadRequestError),
        ({"messages": [{"role": "user", "content": "dog " * 600}]}, openai.BadRequestError),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {
            "type": "string", "format": "no-such-format-at-all"}}}}, openai.BadRequestError),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_refusals_are_the_clients_exceptions(
    client: openai.OpenAI, options: dict[str, Any], error: type[openai.APIError], stream: bool
) -> None:
    with pytest.raises(error) as caught:
        chat(client, stream=stream, **options)
    assert caught.value.body["message"]  # type: ignore[index]


def test_leaving_a_stream_ends_its_request(client: openai.OpenAI, server: Running) -> None:
    stream = chat(client, max_tokens=400, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    wait_for(lambda: server.models.read_stats()["pocket"].running == 0)


def test_metrics(client: openai.OpenAI, server: Running) -> None:
    chat(client)
    status, _, text = server.ask("GET", "/metrics")
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[:1] != "#")
    assert status == 200
    assert float(figures['mlx_edge_requests_finished_total{model="pocket",reason="length"}']) >= 1
    assert float(figures['mlx_edge_time_to_first_token_seconds_count{model="pocket"}']) >= 1
    gaps = "mlx_edge_inter_token_latency_seconds"
    assert float(figures[f'{gaps}_count{{model="pocket"}}']) >= 11  # of 12 tokens
    assert (
        figures[f'{gaps}_bucket{{le="+Inf",model="pocket"}}']
        == figures[f'{gaps}_count{{model="pocket"}}']
    )
    assert float(figures['mlx_edge_generation_tokens_total{model="pocket"}']) >= 12
    assert float(figures['mlx_edge_requests_running{model="pocket"}']) == 0
    assert float(figures["mlx_edge_process_memory_bytes"]) > 1e6
