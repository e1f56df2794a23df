"""One job: wake its server, let it come to rest, play the load from another process, read what it took.

Knows nothing of rounds and ratios.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.load import LoadPlan
from bench.serving_jobs import CHAT, LOADED, Job
from bench.serving_prompts import make_prompts
from bench.serving_servers import ROOT, Server, Servers, machine_ticks
from bench.serving_setup import ServedModel, locust_python

CLIENT_SHARE = 0.15  # of the machine's CPU; a run whose client took more is not counted
SPEEDS = {
    "llama-3.2-1b": 300.0,
    "pocket": 12000.0,
    "tiny": 12000.0,
}  # tokens/s that no server reaches
AGREEMENT = 0.02  # between tokens by usage and by events
Record = dict[str, Any]


@dataclass
class Measured:
    """What one job gave: figures by name, or why there are none."""

    values: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    discarded: str | None = None
    wall_s: float = 0.0


def run_job(
    job: Job, index: int, servers: Servers, model: ServedModel, done: Sequence[Record]
) -> Measured:
    """The figures of one job. `done` says what the server can do, for an open loop."""
    start = time.perf_counter()
    server = servers.wake((job.model, job.server))
    plan = make_plan(job, index, server, model, done)
    idle = settle(server)
    server.forget_peak()
    cpu, ticks, began = server.cpu_s(), machine_ticks(), time.perf_counter()
    values = play_locust(plan, servers) if job.tool == "locust" else play(plan)
    took = time.perf_counter() - began
    now = machine_ticks()
    values |= {"server_cpu_share": (server.cpu_s() - cpu) / took / servers.threads}
    values |= {"stolen_s": now["stolen"] - ticks["stolen"], "idle_cpu_share": idle}
    values |= {f"{name}_bytes": count for name, count in server.memory().items()}
    return judge(Measured(values, wall_s=time.perf_counter() - start), job)


def judge(measured: Measured, job: Job) -> Measured:
    """Whether a run counts, and why not."""
    values = measured.values
    share = values["client_cpu_share"]
    if share > CLIENT_SHARE and job.tool == "exact":
        measured.discarded = f"the client took {share:.0%} of the machine's CPU"
    tokens, events = values["whole_tokens"], values["whole_events"]
    if tokens and abs(events / tokens - 1) > AGREEMENT:
        values["disagreement"] = f"{events} events of {tokens} tokens"
    if not values["events"]:
        first = values["errors"][0] if values["errors"] else "no request of it was refused"
        measured.error = f"no token came within the window; {first}"
    return measured


def make_plan(
    job: Job, index: int, server: Server, model: ServedModel, done: Sequence[Record]
) -> LoadPlan:
    """The load of a job; the same prompts for all servers of a round, others in a null run."""
    workload, rate = job.workload, None
    if not job.clients:
        rate = 0.5 * capacity(job, done) / workload.new_tokens
    seed = zlib.crc32(f"{index} {job.what} {job.turn}".encode())
    if job.requests is not None:
        count = job.clients * job.requests
    else:
        seconds = job.warm_s + job.window_s
        count = int(SPEEDS[model.name] * seconds / workload.new_tokens) + 2 * job.clients + 8
        if rate is not None:
            count = int(2 * rate * seconds) + 16
    return LoadPlan(
        port=server.port,
        prompts=make_prompts(model.folder, workload, count, seed, is_story=model.is_story),
        model=server.model,
        clients=max(1, job.clients),
        rate=rate,
        warm_s=job.warm_s,
        window_s=job.window_s,
        requests=job.requests,
        seed=seed,
        options=server.spec.options,
        is_exact=server.spec.is_exact,
    )


def capacity(job: Job, done: Sequence[Record]) -> float:
    """Tokens per second that this server made with 16 clients, median of the rounds so far; ValueError without one."""
    found: list[float] = [
        record["values"]["output_tokens_per_s"]
        for record in done
        if (record["model"], record["server"]) == (job.model, job.server)
        and (record["clients"], record["workload"]) == (LOADED, CHAT.name)
        and not record["error"]
        and record["tool"] == "exact"
    ]
    if not found:
        raise ValueError(
            f"{job.server} did not run with {LOADED} clients, so half of it is unknown"
        )
    return statistics.median(found)


def settle(server: Server, limit_s: float = 10.0) -> float:
    """Wait until the server rests (it may still be at requests that were cut); its share of a core then."""
    share = 0.0
    end = time.perf_counter() + limit_s
    while time.perf_counter() < end:
        before, began = server.cpu_s(), time.perf_counter()
        time.sleep(0.4)
        share = (server.cpu_s() - before) / (time.perf_counter() - began)
        if share < 0.06:  # two ticks of the clock
            break
    return share


def play(plan: LoadPlan) -> dict[str, Any]:
    """In a process of its own, so that its CPU time is its own."""
    limit = plan.warm_s + plan.window_s + (600 if plan.requests else 60)
    done = subprocess.run(
        [sys.executable, "-m", "bench.load"],
        input=plan.write(),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=limit,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["without a word"]
        raise RuntimeError(f"the load generator ended with {done.returncode}: {lines[-1]}")
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def play_locust(plan: LoadPlan, servers: Servers) -> dict[str, Any]:
    """The same load by Locust, which is a cross-check: its users do what the exact client's do."""
    if reason := servers.place.failures.get("locust"):
        raise RuntimeError(reason)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        (Path(folder) / "plan.json").write_text(plan.write())
        seconds = plan.warm_s + plan.window_s
        words = [str(locust_python(servers.place)), "-m", "locust"]
        words += ["-f", str(ROOT / "bench" / "serving_locust.py"), "--headless", "--only-summary"]
        words += ["-u", str(plan.clients), "-r", str(plan.clients), "-t", f"{seconds + 1:.0f}s"]
        words += ["--host", f"http://{plan.host}:{plan.port}", "--stop-timeout", "0"]
        paths = {"LOAD_PLAN": f"{folder}/plan.json", "LOAD_OUT": str(out), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            words,
            cwd=folder,
            env={**os.environ, **paths},
            capture_output=True,
            text=True,
            timeout=seconds + 60,
            check=False,
        )
        if not out.exists():
            lines = done.stderr.strip().splitlines() or ["without a word"]
            raise RuntimeError(f"locust ended with {done.returncode}: {lines[-1]}")
        figures: dict[str, Any] = json.loads(out.read_text())
    return figures
