"""bench/serving.py around the measurements: prompts, jobs, records to figures, the soak's verdict."""

import asyncio
import json
from collections import Counter
from typing import Any

import pytest

from bench.load_client import Outcome
from bench.serving_jobs import (
    CHAT,
    FULL,
    LOADED,
    LONG,
    MODES,
    QUICK,
    SHARED,
    SHORT,
    Job,
    make_round,
)
from bench.serving_prompts import Workload, make_prompts, open_tokenizer
from bench.serving_report import make_markdown, make_result
from bench.serving_runs import CLIENT_SHARE, Measured, capacity, judge
from bench.serving_servers import LLAMA, MLXLM, OURS, ServerFailed, Servers, our_spec
from bench.serving_setup import POCKET, ServedModel
from bench.serving_soak import FLAT, Soak, broken, flatness
from bench.serving_soak import judge as judge_soak
from bench.serving_summary import RATE, Rounds, added, scaling, slowest_against, summarize, versus
from bench.soak_clients import Target, ask
from tests.bench.fake_server import FakeServer

KEYS = {
    "throughput_16_over_1",
    "p99_inter_token_added_ms",
    "throughput_vs_llamacpp_1b_8",
    "throughput_vs_llamacpp_1b_16",
    "throughput_vs_mlxlm_min",
    "pocket_throughput_16_over_1",
    "pocket_p99_inter_token_added_ms",
    "errors",
    "plan_error_p95",
}
MACHINE = {"processor": "none", "instruction_sets": "", "cores": 2, "system": "none"}
FACTS = {"mode": "test", "machine": MACHINE, "versions": {"mlx": "0"}}
FACTS |= {"num_rounds": 1, "llama_setting": "Q4_0"}


def record(index: int, server: str, clients: int, rate: float, **facts: Any) -> dict[str, Any]:
    known: dict[str, Any] = {"model": "1b", "workload": CHAT.name, "turn": 0, "tool": "exact"}
    known |= {"error": None, "discarded": None, "was_skipped": False}
    known |= {"job": f"{server} {clients}", "round": index, "server": server, "clients": clients}
    values = {RATE: rate, "itl_ms_p99": facts.pop("p99", 10.0), "errors": facts.pop("errors", [])}
    return known | {"values": values} | facts


@pytest.mark.parametrize(
    ("workload", "is_story"), [(CHAT, False), (CHAT, True), (LONG, False), (SHARED, False)]
)
def test_prompts_are_as_many_tokens_as_they_say(workload: Workload, is_story: bool) -> None:
    prompts = make_prompts(POCKET, workload, 40, seed=1, is_story=is_story)
    tokenizer = open_tokenizer(POCKET)
    rows = [tokenizer.encode(p.text, add_special_tokens=False).ids for p in prompts]
    assert {len(row) for row in rows} == {workload.prompt_tokens}
    alike = workload.shared_tokens
    assert len({tuple(row[: max(0, alike - 1)]) for row in rows}) == 1
    assert len({tuple(row[: alike + 8]) for row in rows}) == len(rows)
    new = [p.new_tokens for p in prompts]
    assert min(new) >= workload.new_tokens // 2
    assert max(new) <= workload.new_tokens * 3 // 2
    assert len(set(new)) > 10


def test_prompts_are_those_of_their_seed() -> None:
    first, again, other = (make_prompts(POCKET, CHAT, 8, seed) for seed in (1, 1, 2))
    assert first == again
    assert not {p.text for p in first} & {p.text for p in other}


@pytest.mark.parametrize("mode", MODES.values(), ids=lambda mode: mode.name)
def test_a_round_has_both_sides_of_every_ratio(mode: Any) -> None:
    for index in range(mode.rounds):
        jobs = make_round(mode, index)
        names = [job.name for job in jobs]
        assert len(set(names)) == len(names)
        loads = Counter(job.what for job in jobs if not job.turn)
        peers = {job.what for job in jobs if job.server != OURS}
        assert all(loads[what] == 2 for what in peers)
        for model in ("1b", "pocket"):
            ours = [job for job in jobs if (job.model, job.server) == (model, OURS)]
            clients = [job.clients for job in ours if job.workload == CHAT and job.tool == "exact"]
            assert {0, 1, LOADED} <= set(clients)
            assert clients.count(LOADED) == 2  # the null run
            assert ours[-1].clients == 0 or clients[-1] == 0  # half load comes after its capacity


def test_other_rounds_go_backwards() -> None:
    even, odd = (
        [j.name for j in make_round(FULL, i) if j.model == "pocket" and j.clients] for i in (2, 3)
    )
    assert even == odd[::-1]


def test_the_summary_is_flat_and_whole() -> None:
    records = [
        *(record(i, OURS, n, rate) for i in range(2) for n, rate in ((1, 20.0), (8, 40.0))),
        record(0, OURS, 16, 50.0, errors=["status 500"]),
        record(1, OURS, 16, 70.0),
        record(0, OURS, 0, 25.0, p99=22.0),
        record(0, LLAMA, 8, 20.0),
        record(0, LLAMA, 16, 25.0),
        record(0, OURS, 16, 55.0, turn=1),
        record(0, MLXLM, 1, 2.0, workload=SHORT.name),
        record(0, OURS, 1, 8.0, workload=SHORT.name),
    ]
    result = make_result(records, FACTS, {"plan_error_p95": 0.03})
    summary = result["summary"]
    assert set(summary) == KEYS
    assert summary["throughput_16_over_1"] == 3.0
    assert summary["p99_inter_token_added_ms"] == 12.0
    assert summary["throughput_vs_llamacpp_1b_8"] == 2.0
    assert summary["throughput_vs_llamacpp_1b_16"] == 2.0
    assert summary["throughput_vs_mlxlm_min"] == 4.0
    assert (summary["errors"], summary["plan_error_p95"]) == (1, 0.03)
    assert result["null"]["1b 16 clients"]["median"] == pytest.approx(1.1)
    table = make_markdown(result)
    assert all(f"`{key}`" in table for key in KEYS)
    json.dumps(result)


def test_what_was_not_measured_is_null_with_a_reason() -> None:
    failed = record(0, OURS, 16, 1.0, error="ServerFailed: no")
    result = make_result([failed], FACTS, {"error": "no such module"})
    assert result["summary"]["throughput_16_over_1"] is None
    assert result["summary"]["errors"] == 1
    assert "no such module" in result["notes"]["plan_error_p95"]
    assert "not measured" in make_markdown(result)


def test_a_busy_client_makes_a_run_that_does_not_count() -> None:
    job = Job("1b", OURS, CHAT, 16, 1.0, 1.0)
    values = {"whole_tokens": 100, "whole_events": 100, "events": 90, "errors": []}
    calm = judge(Measured(values | {"client_cpu_share": CLIENT_SHARE - 0.01}), job)
    busy = judge(Measured(values | {"client_cpu_share": CLIENT_SHARE + 0.01}), job)
    assert calm.discarded is None
    assert busy.discarded is not None
    records = [
        record(0, OURS, 1, 10.0),
        record(0, OURS, 16, 90.0, discarded=busy.discarded),
        record(1, OURS, 1, 10.0),
        record(1, OURS, 16, 30.0),
    ]
    assert scaling(Rounds(records), "1b").rounds == (3.0,)
    assert make_result(records, FACTS, {})["discarded"] == 1


def test_tokens_by_usage_and_by_events_have_to_agree() -> None:
    values = {"client_cpu_share": 0.0, "events": 9, "errors": [], "whole_tokens": 100}
    job = Job("1b", OURS, CHAT, 1, 1.0, 1.0)
    assert "disagreement" in judge(Measured(values | {"whole_events": 90}), job).values
    assert "disagreement" not in judge(Measured(values | {"whole_events": 99}), job).values


def test_ratios_are_made_within_a_round() -> None:
    records = [record(i, OURS, 8, 10.0 * (i + 1)) for i in range(3)]
    records += [record(i, LLAMA, 8, 10.0) for i in (0, 2)]
    assert versus(Rounds(records), "1b", LLAMA, 8).rounds == (1.0, 3.0)


def test_the_least_ratio_is_of_any_load() -> None:
    pairs = [
        ("1b", SHORT.name, 1, 8.0),
        ("pocket", CHAT.name, 4, 3.0),
        ("pocket", CHAT.name, 16, 5.0),
    ]
    records = []
    for model, workload, clients, rate in pairs:
        facts = {"model": model, "workload": workload}
        records += [
            record(0, OURS, clients, rate, **facts),
            record(0, MLXLM, clients, 2.0, **facts),
        ]
    figure = slowest_against(Rounds(records), MLXLM)
    assert figure.median == 1.5
    assert "pocket, 4 clients" in figure.note


def test_added_latency_is_a_difference() -> None:
    records = [record(0, OURS, 1, 1.0, p99=30.0), record(0, OURS, 0, 1.0, p99=47.0)]
    assert added(Rounds(records), "1b").rounds == (17.0,)
    assert summarize(Rounds([]))["p99_inter_token_added_ms"].median is None


def test_half_load_needs_a_capacity() -> None:
    half = Job("1b", OURS, CHAT, 0, 1.0, 1.0)
    records = [record(0, OURS, 16, 60.0), record(1, OURS, 16, 80.0), record(0, OURS, 8, 1.0)]
    assert capacity(half, records) == 70.0
    with pytest.raises(ValueError, match="did not run with 16 clients"):
        capacity(half, records[2:])


def test_a_server_that_cannot_start_says_why(tmp_path: Any) -> None:
    from bench.peer_setup import Workplace

    (tmp_path / "logs").mkdir()
    missing = ServedModel("none", tmp_path / "none", tmp_path, {})
    spec = our_spec(missing)
    words = (*spec.words[:1], "-c", "raise SystemExit('no such model')")
    servers = Servers({("1b", OURS): type(spec)(OURS, words, tmp_path)}, Workplace(tmp_path), 2)
    for _ in range(2):  # the second time it is not started again
        with pytest.raises(ServerFailed, match="no such model"):
            servers.wake(("1b", OURS))
    servers.stop()


def test_quick_has_every_key_of_the_summary() -> None:
    whats = {job.what for job in make_round(QUICK, 0)}
    assert {f"1b / {CHAT.name} / {n} clients" for n in (1, 8, 16)} <= whats
    assert f"pocket / {CHAT.name} / half load" in whats


@pytest.mark.parametrize(("growth", "is_flat"), [(0.0, True), (0.015, True), (0.05, False)])
def test_memory_is_flat_or_not(growth: float, is_flat: bool) -> None:
    sizes = [(float(t), int(1e8 * (1 + growth * t / 300 + 0.002 * (t % 3)))) for t in range(300)]
    slope, thirds = flatness(sizes)
    assert slope == pytest.approx(growth, abs=3e-3)
    assert (abs(slope or 0.0) <= FLAT and abs(thirds or 0.0) <= FLAT) == is_flat


def good(**facts: Any) -> dict[str, Any]:
    summary = {"healthy_wrong": 0, "healthy_answered": 5, "server_faults": 0}
    summary |= {"memory_growth": 0.0, "memory_drift": 0.0}
    return summary | {"ttft_p99_ratio": 1.0, "itl_p99_ratio": 1.0} | facts


@pytest.mark.parametrize(
    "fault",
    [
        {"healthy_wrong": 1},
        {"healthy_answered": 0},
        {"server_faults": 1},
        {"memory_growth": 0.03},
        {"memory_drift": -0.03},
        {"ttft_p99_ratio": 2.0},
        {"itl_p99_ratio": None},
    ],
    ids=str,
)
def test_each_fault_breaks_a_soak(fault: dict[str, Any]) -> None:
    assert broken(good(), is_alive=True) == []
    assert len(broken(good(**fault), is_alive=True)) == 1
    assert len(broken(good(), is_alive=False)) == 1


@pytest.mark.parametrize("change", ["none", "text", "status"])
def test_a_changed_answer_is_wrong(change: str) -> None:
    async def run() -> Soak:
        prompts = make_prompts(POCKET, CHAT, 2, seed=0)
        async with FakeServer(fault="short" if change == "status" else "") as server:
            soak = Soak(Target(server.port, "m", prompts))
            texts = {p.text: (await ask(soak.target, p)).text or "" for p in prompts}
            soak.texts = {p: t + "!" if change == "text" else t for p, t in texts.items()}
            import random

            client = asyncio.create_task(soak.stay_healthy(random.Random(0)))
            while len(soak.healthy) < 3:
                await asyncio.sleep(0.01)
            soak.is_over = True
            await client
            return soak

    soak = asyncio.run(run())
    assert len(soak.wrong) == (0 if change == "none" else len(soak.healthy))
    soak.healthy = [(9.0, outcome) for _, outcome in soak.healthy] + [(9.0, Outcome(0, status=429))]
    summary = judge_soak(soak, 10.0, is_alive=True)["summary"]
    assert summary["healthy_wrong"] == len(soak.wrong)
    assert summary["healthy_refused"] == 1
