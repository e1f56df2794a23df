"""Ten minutes at overload with hostile clients beside healthy ones: does the server stay as it was?

    python -m bench.serving_soak --json OUT                     # ten minutes with pocket
    python -m bench.serving_soak --minutes 1 --model FOLDER

The server's prefix cache is small and full before the soak begins: filling it would look like a leak.
First a calm part: the healthy clients and a flood of good requests, more than are run at once. Then hostile clients
take the places of good ones that ask for as much. Ends with 1 when something that must hold does not; every such thing
stands in `broken`. Knows nothing of speeds against others.
"""

import argparse
import asyncio
import itertools
import json
import random
import statistics
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.load import NS, Prompt, percentile
from bench.load_client import Outcome
from bench.peer_setup import machine_facts
from bench.serving_prompts import Workload, make_prompts
from bench.serving_servers import Server, ServerFailed, end_on_sigterm, our_spec
from bench.serving_setup import POCKET, ServedModel
from bench.soak_clients import HOSTILE, Target, Visit, ask, flood, linger

HEALTHY, FLOOD, LINGER = 6, 18, 10  # clients; more than the 16 that run at once
CALM = 0.15  # of the time
PREFIX_BYTES = 2 << 20  # of the prefix cache
FILLED = 0.8  # of it, before the soak begins
MOST_FILLING = 200  # requests
WARM = 0.15  # of the hostile part, after which memory has to be flat
FLAT = 0.02
HELD = 1.5  # P99 of the hostile part over that of the calm one
REFUSALS = (429, 503)  # the server may say that it is full
ANSWERED = ("stop", "length")


@dataclass
class Soak:
    """What happened so far."""

    target: Target
    texts: dict[str, str] = field(
        default_factory=dict
    )  # the answer of each prompt, from a calm server
    healthy: list[tuple[float, Outcome]] = field(
        default_factory=list
    )  # with the second it ended in
    wrong: list[str] = field(default_factory=list)
    visits: dict[str, Counter[str]] = field(default_factory=dict)
    memory: list[tuple[float, int]] = field(default_factory=list)  # second, private bytes
    began: float = field(default_factory=time.perf_counter)
    is_over: bool = False

    def now(self) -> float:
        """Seconds since the soak began."""
        return time.perf_counter() - self.began

    async def learn(self) -> None:
        """The answers, one request at a time."""
        for prompt in self.target.prompts:
            outcome = await ask(self.target, prompt)
            if outcome.error or outcome.text is None:
                raise ServerFailed(f"a request alone failed: {outcome.error}")
            self.texts[prompt.text] = outcome.text

    async def fill(self, read_bytes: Callable[[], int], wanted: int) -> None:
        """Ask for other prompts until so many bytes of prefixes are kept."""
        for number in range(MOST_FILLING):
            if await asyncio.to_thread(read_bytes) >= wanted:
                return
            prompt = self.target.prompts[number % len(self.target.prompts)]
            other = replace(prompt, text=f"{number} {prompt.text}", new_tokens=200)
            await ask(self.target, other)
        raise ServerFailed(
            f"{MOST_FILLING} requests did not fill the prefix cache to {wanted} bytes"
        )

    async def stay_healthy(self, chance: random.Random) -> None:
        """A client that asks, checks the answer, and asks again."""
        while not self.is_over:
            prompt = chance.choice(self.target.prompts)
            outcome = await ask(self.target, prompt)
            if self.is_over:
                return
            self.healthy.append((self.now(), outcome))
            if outcome.status in REFUSALS:
                await asyncio.sleep(0.2)
            elif outcome.error is not None:
                self.wrong.append(outcome.error)
            elif outcome.text != self.texts[prompt.text]:
                self.wrong.append(f"another text for {prompt.text[:40]!r}")

    async def visit(self, kind: Visit, pause_s: float, chance: random.Random) -> None:
        """One hostile client after the other."""
        said = self.visits.setdefault(kind.__name__, Counter())
        while not self.is_over:
            try:
                answer = await kind(self.target, chance)
                said["no answer" if answer is None else str(answer)] += 1
            except OSError as failure:
                said[type(failure).__name__] += 1
            await asyncio.sleep(chance.expovariate(1 / pause_s))

    async def watch(self, server: Server) -> None:
        """Memory, twice a second."""
        while not self.is_over and server.is_alive():
            self.memory.append((self.now(), server.memory()["private"]))
            await asyncio.sleep(0.5)


async def soak(
    server: Server, prompts: Sequence[Prompt], seconds: float, prefix_bytes: int
) -> Soak:
    """All of it, on a server that keeps at most so many bytes of prefixes."""
    run = Soak(Target(server.port, server.model, tuple(prompts)))
    await run.learn()
    await run.fill(lambda: _prefix_bytes(server.port), int(FILLED * prefix_bytes))
    run.began = time.perf_counter()
    seeds = itertools.count()

    def chance() -> random.Random:
        return random.Random(next(seeds))

    tasks = [asyncio.create_task(run.stay_healthy(chance())) for _ in range(HEALTHY)]
    tasks += [asyncio.create_task(run.visit(flood, 0.01, chance())) for _ in range(FLOOD)]
    tasks.append(asyncio.create_task(run.watch(server)))
    stand_ins = [asyncio.create_task(run.visit(linger, 0.1, chance())) for _ in range(LINGER)]
    await asyncio.sleep(seconds * CALM)
    for task in stand_ins:
        task.cancel()
    for kind, number, pause_s in HOSTILE:
        visits = (run.visit(kind, pause_s, chance()) for _ in range(number))
        tasks += [asyncio.create_task(visit) for visit in visits]
    await asyncio.sleep(seconds * (1 - CALM))
    run.is_over = True
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.sleep(2.0)
    last = await ask(run.target, run.target.prompts[0])
    if last.error or last.text != run.texts[run.target.prompts[0].text]:
        run.wrong.append(f"after the soak: {last.error or 'another text'}")
    return run


def _prefix_bytes(port: int) -> int:
    """What the server keeps of prefixes."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=20) as answer:
        return int(json.load(answer)["data"][0]["x_memory"]["prefix_bytes"])


def judge(run: Soak, seconds: float, is_alive: bool) -> dict[str, Any]:
    """The figures, and in `broken` what does not hold."""
    calm = seconds * CALM
    parts = [(0.05 * seconds, calm), (calm, seconds)]
    waits, gaps = ([_latencies(run, kind, *part) for part in parts] for kind in ("wait", "gap"))
    warm = calm + WARM * (seconds - calm)
    growth, drift = flatness([(t, m) for t, m in run.memory if t >= warm])
    answered = [o for _, o in run.healthy if o.finish_reason in ANSWERED and o.error is None]
    faults = sum(
        number
        for said in run.visits.values()
        for answer, number in said.items()
        if answer.startswith("5") and answer != "503"
    )
    summary: dict[str, Any] = {
        "minutes": seconds / 60,
        "healthy_answered": len(answered),
        "healthy_refused": sum(o.status in REFUSALS for _, o in run.healthy),
        "healthy_wrong": len(run.wrong),
        "hostile_visits": sum(
            said.total() for kind, said in run.visits.items() if kind not in ("flood", "linger")
        ),
        "server_faults": faults,
        "memory_growth": growth,
        "memory_drift": drift,
        "memory_bytes": statistics.median(m for _, m in run.memory) if run.memory else 0,
    }
    for name, (before, after) in (("ttft", waits), ("itl", gaps)):
        p99 = [percentile(part, 99) for part in (before, after)]
        summary |= {f"{name}_p99_calm_ms": p99[0], f"{name}_p99_hostile_ms": p99[1]}
        summary[f"{name}_p99_ratio"] = p99[1] / p99[0] if p99[0] and p99[1] else None
    return {
        "summary": summary,
        "broken": broken(summary, is_alive),
        "wrong": run.wrong[:20],
        "visits": {kind: dict(said) for kind, said in run.visits.items()},
        "memory": [(round(t, 1), m) for t, m in run.memory],
    }


def broken(summary: dict[str, Any], is_alive: bool) -> list[str]:
    """What must hold and does not, in words."""
    found = [] if is_alive else ["the server has ended"]
    if summary["healthy_wrong"] or not summary["healthy_answered"]:
        found.append(f"{summary['healthy_wrong']} healthy requests lost, doubled or changed")
    if summary["server_faults"]:
        found.append(f"{summary['server_faults']} answers of 500 and above, other than 503")
    for name in ("memory_growth", "memory_drift"):
        if summary[name] is None or abs(summary[name]) > FLAT:
            found.append(f"{name} is {summary[name]}, expected within {FLAT}")
    for name in ("ttft_p99_ratio", "itl_p99_ratio"):
        if summary[name] is None or summary[name] > HELD:
            found.append(f"{name} is {summary[name]}, expected at most {HELD}")
    return found


def _latencies(run: Soak, kind: str, begin: float, end: float) -> list[float]:
    """Milliseconds until the first token, or between tokens, of healthy requests that ended in this part."""
    own = [o for t, o in run.healthy if begin <= t < end and o.times_ns and o.error is None]
    if kind == "wait":
        return [(o.times_ns[0] - o.begin_ns) * 1e3 / NS for o in own]
    return [(b - a) * 1e3 / NS for o in own for a, b in itertools.pairwise(o.times_ns)]


def flatness(memory: Sequence[tuple[float, int]]) -> tuple[float | None, float | None]:
    """Growth by a straight line over the whole time, and last third over first third - 1, both of the mean."""
    if len(memory) < 9:
        return None, None
    times, sizes = zip(*memory, strict=True)
    mean = statistics.fmean(sizes)
    slope = statistics.linear_regression(times, sizes).slope
    third = len(sizes) // 3
    first, last = statistics.median(sizes[:third]), statistics.median(sizes[-third:])
    return slope * (times[-1] - times[0]) / mean, last / first - 1


def main() -> int:
    """Start a server, soak it, judge."""
    parser = argparse.ArgumentParser(
        "bench.serving_soak", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--model", type=Path, default=POCKET, help="a folder; pocket if not said")
    parser.add_argument(
        "--prompt-cache-bytes", type=int, default=PREFIX_BYTES, help="of the prefix cache; 0: none"
    )
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    end_on_sigterm()
    prompts = make_prompts(args.model, Workload(24, 32), 12, seed=0)
    model = ServedModel(args.model.name, args.model, args.model, {})
    with TemporaryDirectory() as folder:
        flag = ("--prompt-cache-bytes", str(args.prompt_cache_bytes))
        server = Server(our_spec(model, *flag), Path(folder), threads=2)
        try:
            server.wait_ready()
            run = asyncio.run(soak(server, prompts, args.minutes * 60, args.prompt_cache_bytes))
            result = judge(run, args.minutes * 60, server.is_alive())
        finally:
            server.stop()
    result = {"machine": machine_facts(), **result}
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("summary", "visits", "broken")}, indent=1))
    return int(bool(result["broken"]))


if __name__ == "__main__":
    sys.exit(main())
