"""The exact client and its loops: what it counts, and what it calls an error."""

import asyncio
import re
from typing import Any

import pytest

from bench import load_client
from bench.load import Load, LoadPlan, Prompt, arrivals, percentile, summarize
from bench.load_client import Exchange, Outcome
from tests.bench.fake_server import FakeServer, events

MS = 1_000_000


def framed(pieces: list[bytes], framing: str) -> bytes:
    body = b"".join(pieces)
    if framing == "chunked":
        chunks = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
        return b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
    length = b"Content-Length: %d\r\n" % len(body) if framing == "length" else b""
    return b"HTTP/1.0 200 OK\r\n" + length + b"\r\n" + body


@pytest.mark.parametrize("framing", ["chunked", "length", "until closed"])
@pytest.mark.parametrize("size", [1, 7, 64, 100_000])
def test_a_stream_is_read_however_it_is_cut_into_packets(framing: str, size: int) -> None:
    pieces = [b": keepalive 1/2\n\n", *events(3, prompt_tokens=9)]
    data = framed(pieces, framing)
    exchange = Exchange(b"", Outcome(0), keeps_text=True)
    for begin in range(0, len(data), size):
        assert not exchange.over.is_set()
        exchange.data_received(data[begin : begin + size])
    if framing == "until closed":
        exchange.connection_lost(None)
    outcome = exchange.outcome
    outcome.check(max_tokens=3)
    assert exchange.over.is_set()
    assert (outcome.error, outcome.text, len(outcome.times_ns)) == (None, " w0 w1 w2", 3)
    assert (outcome.prompt_tokens, outcome.completion_tokens) == (9, 3)
    assert outcome.finish_reason == "length"


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (framed(events(2), "chunked")[:-30], "connection lost"),
        (framed(events(2)[:-1], "chunked"), r"before \[DONE\]"),
        (framed([events(2)[-1]], "chunked"), "no finish_reason"),
        (framed(events(2, completion_tokens=3), "chunked"), "3 tokens, expected 2"),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 2\r\n\r\nno", "status 503: no"),
        (framed([b'data: {"error": {"message": "memory"}}\n\n'], "chunked"), "memory"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", "bad framing"),
    ],
    ids=["cut", "not done", "no finish", "other count", "status", "error event", "framing"],
)
def test_what_is_no_whole_answer_is_an_error(data: bytes, error: str) -> None:
    exchange = Exchange(b"", Outcome(0))
    exchange.data_received(data)
    exchange.connection_lost(None)
    exchange.outcome.check(max_tokens=2)
    assert re.search(error, exchange.outcome.error or "none")


def test_each_event_has_the_time_at_which_its_packet_came(monkeypatch: Any) -> None:
    now = iter([5 * MS, 25 * MS, 26 * MS, 30 * MS])
    monkeypatch.setattr(load_client.time, "perf_counter_ns", lambda: next(now))
    pieces = events(4)
    exchange = Exchange(b"", Outcome(begin_ns=0))
    head = b"HTTP/1.1 200 OK\r\n\r\n"
    for packet in (head + pieces[0], pieces[1] + pieces[2], b"".join(pieces[3:])):
        exchange.data_received(packet)
    assert exchange.outcome.times_ns == [5 * MS, 25 * MS, 25 * MS, 26 * MS]


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        (range(1, 101), 50, 50),
        (range(1, 101), 99, 99),
        ([3, 1, 2], 50, 2),
        ([7], 99, 7),
        ([1, 2], 99, 2),
        ([], 50, None),
    ],
)
def test_percentiles_are_nearest_ranks(values: Any, percent: float, expected: Any) -> None:
    assert percentile(values, percent) == expected


def test_arrivals_are_those_of_their_seed() -> None:
    one, again, other = (list(arrivals(50.0, 200.0, seed)) for seed in (1, 1, 2))
    assert one == again != other
    assert one == sorted(one)
    assert one[-1] < 200.0
    assert 9_500 < len(one) < 10_500  # 10,000 expected, its standard deviation is 100


def outcome(begin: int, times: list[int], end: int, **facts: Any) -> tuple[Prompt, Outcome]:
    known: dict[str, Any] = {"status": 200, "is_done": True, "finish_reason": "length"}
    known |= {"completion_tokens": len(times), "prompt_tokens": 4}
    stamps = [t * MS for t in times]
    whole = Outcome(begin * MS, end * MS, stamps, **(known | facts))
    return Prompt("", 4, whole.completion_tokens), whole


def test_a_window_counts_what_lies_in_it() -> None:
    sent = [
        outcome(0, [50, 100, 150], 151),  # its first token came before the window
        outcome(90, [110, 120, 160], 161),
        outcome(150, [190, 210], 0, is_cut=True, is_done=False, completion_tokens=0),
        outcome(150, [160], 170, status=500),
    ]
    found = summarize(sent, 100 * MS, 200 * MS, is_exact=True)
    assert found["events"] == 2 + 3 + 1
    assert found["output_tokens_per_s"] == pytest.approx(60)
    assert found["total_tokens_per_s"] == pytest.approx(60 + 2 * 4 / 0.1)
    assert (found["ttft_ms_p50"], found["ttft_ms_p99"]) == (20, 40)
    assert (found["gaps"], found["itl_ms_p50"], found["itl_ms_p99"]) == (3, 40, 50)
    assert (found["requests_done"], found["requests_cut"]) == (2, 1)
    assert found["errors"] == ["status 500, expected 200"]


def test_tokens_are_those_of_the_usage() -> None:
    sent = [outcome(0, [10, 20, 30], 40, completion_tokens=6)]
    found = summarize(sent, 0, 100 * MS, is_exact=False)
    assert found["output_tokens_per_s"] == pytest.approx(60)
    assert (found["whole_events"], found["whole_tokens"]) == (3, 6)


def play(server: FakeServer, **plan: Any) -> dict[str, Any]:
    async def both() -> dict[str, Any]:
        async with server:
            prompts = tuple(Prompt(f"p{i}", 4, 5) for i in range(plan.pop("count", 40)))
            return await Load(LoadPlan(server.port, prompts, **plan)).play()

    return asyncio.run(both())


def test_a_closed_loop_sends_every_prompt_once() -> None:
    server = FakeServer()
    found = play(server, clients=3, requests=4)
    assert sorted(server.prompts) == sorted(f"p{i}" for i in range(12))
    assert (found["requests_done"], found["errors"]) == (12, [])
    assert found["whole_events"] == found["whole_tokens"] == 60
    assert found["prompt_tokens"] == [0]


def test_an_open_loop_does_not_wait_for_answers() -> None:
    server = FakeServer(gap_s=30.0)
    found = play(server, rate=200.0, warm_s=0.0, window_s=0.1)
    assert len(server.prompts) == len(list(arrivals(200.0, 0.1, 0)))
    assert found["requests_cut"] == found["requests_sent"] > 5
    assert found["errors"] == []


@pytest.mark.parametrize(
    ("fault", "error"),
    [("busy", "status 429"), ("broken", "connection lost"), ("short", "4 tokens, expected 5")],
)
def test_failed_requests_are_counted(fault: str, error: str) -> None:
    found = play(FakeServer(fault=fault), clients=2, requests=1)
    assert len(found["errors"]) == 2
    assert all(said.startswith(error) for said in found["errors"])


def test_too_few_prompts_are_said() -> None:
    found = play(FakeServer(), clients=1, requests=3, count=2)
    assert found["errors"] == ["all 2 prompts were used up"]


def test_a_plan_goes_through_json() -> None:
    plan = LoadPlan(1, (Prompt("é", 2, 3),), rate=0.5, options={"ignore_eos": True})
    assert LoadPlan.read(plan.write()) == plan
