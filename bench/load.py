"""The load generator: a process of its own that plays one plan against one server and prints what it saw.

    python -m bench.load < plan.json

Closed loop: each of N clients sends its next request when its last has ended. Open loop: requests are due at times that
a seeded Poisson process drew before, and count from then, however late they are sent. What is counted lies within a
window after a warm-up; what still runs at its end is cut. Knows nothing of rounds and ratios.
"""

import asyncio
import gc
import json
import os
import random
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from bench.load_client import Exchange, Outcome, make_post, start

NS = 1_000_000_000


@dataclass(frozen=True)
class Prompt:
    """A text, what it asks for, and how many tokens it should be."""

    text: str
    tokens: int
    new_tokens: int


@dataclass(frozen=True)
class LoadPlan:
    """One run. Either `window_s`, or `requests`: then nothing is cut and all of it counts."""

    port: int
    prompts: tuple[Prompt, ...]
    model: str = "default_model"
    host: str = "127.0.0.1"
    path: str = "/v1/completions"
    clients: int = 1
    rate: float | None = None  # requests per second of an open loop; None: a closed one
    warm_s: float = 2.0
    window_s: float = 10.0
    requests: int | None = None  # of each client
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)  # further fields of the request
    is_exact: bool = True  # every request must bring just the tokens that it asked for

    @staticmethod
    def read(text: str) -> "LoadPlan":
        """From JSON."""
        plan = json.loads(text)
        prompts = tuple(Prompt(**prompt) for prompt in plan.pop("prompts"))
        return LoadPlan(prompts=prompts, **plan)

    def write(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    def body(self, prompt: Prompt) -> bytes:
        """The request for one prompt: streamed, greedy, with its usage."""
        fields: dict[str, Any] = {"model": self.model, "prompt": prompt.text}
        fields |= {"max_tokens": prompt.new_tokens, "temperature": 0.0, "stream": True}
        fields |= {"stream_options": {"include_usage": True}}
        return make_post(self.host, self.port, self.path, fields | self.options)


class Load:
    """A plan that is being played: what was sent, and what came of it."""

    def __init__(self, plan: LoadPlan):
        self.plan = plan
        self.sent: list[tuple[Prompt, Outcome]] = []
        self.running: set[Exchange] = set()
        self.is_over = False
        self.ran_out = False
        self._prompts = iter(plan.prompts)

    async def play(self) -> dict[str, Any]:
        """Run it to its end; the figures of its window."""
        plan = self.plan
        began, cpu_before = time.perf_counter_ns(), time.process_time()
        window = asyncio.create_task(self._watch_window())
        sources = (
            [self._closed() for _ in range(plan.clients)]
            if plan.rate is None
            else [self._open(began, plan.rate)]
        )
        tasks = [asyncio.create_task(source) for source in sources]
        if plan.requests is not None:
            await asyncio.gather(*tasks)
            window.cancel()
            begin, end, cpu = began, time.perf_counter_ns(), time.process_time() - cpu_before
        else:
            begin, end, cpu = await window
            self._cut()
            await asyncio.gather(*tasks)
        figures = summarize(self.sent, begin, end, is_exact=plan.is_exact)
        share = cpu / ((end - begin) / NS * (os.cpu_count() or 1))
        if self.ran_out:
            figures["errors"].append(f"all {len(plan.prompts)} prompts were used up")
        return figures | {"client_cpu_s": cpu, "client_cpu_share": share}

    async def _watch_window(self) -> tuple[int, int, float]:
        await asyncio.sleep(self.plan.warm_s)
        begin, cpu = time.perf_counter_ns(), time.process_time()
        await asyncio.sleep(self.plan.window_s)
        return begin, time.perf_counter_ns(), time.process_time() - cpu

    def _cut(self) -> None:
        self.is_over = True
        for exchange in list(self.running):
            exchange.cut()

    async def _closed(self) -> None:
        left = self.plan.requests
        while not self.is_over and (left is None or left > 0):
            await self._send(None)
            left = None if left is None else left - 1

    async def _open(self, began: int, rate: float) -> None:
        tasks = []
        for due in arrivals(rate, self.plan.warm_s + self.plan.window_s, self.plan.seed):
            due_ns = began + int(due * NS)
            await asyncio.sleep(max(0.0, (due_ns - time.perf_counter_ns()) / NS))
            if self.is_over:
                break
            tasks.append(asyncio.create_task(self._send(due_ns)))
        await asyncio.gather(*tasks)

    async def _send(self, due_ns: int | None) -> None:
        prompt = next(self._prompts, None)
        if prompt is None:
            self.ran_out = True
            self.is_over = self.plan.rate is None
            return
        plan = self.plan
        exchange = await start(plan.host, plan.port, plan.body(prompt), due_ns=due_ns)
        self.sent.append((prompt, exchange.outcome))
        self.running.add(exchange)
        if self.is_over:  # the run ended while it was being connected
            exchange.cut()
        await exchange.over.wait()
        self.running.discard(exchange)
        if exchange.outcome.error is not None:
            await asyncio.sleep(0.05)  # a server that refuses is not asked as fast as it can say no


def arrivals(rate: float, seconds: float, seed: int) -> Iterator[float]:
    """When requests are due: a Poisson process of `rate` per second, the same for the same seed."""
    chance, due = random.Random(seed), 0.0
    while (due := due + chance.expovariate(rate)) < seconds:
        yield due


def percentile(values: Iterable[float], percent: float) -> float | None:
    """By nearest rank: the smallest value that at least `percent` of all do not exceed; None of none."""
    ordered = sorted(values)
    if not ordered:
        return None
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(1, int(rank)) - 1]


def summarize(
    sent: Sequence[tuple[Prompt, Outcome]], begin: int, end: int, *, is_exact: bool
) -> dict[str, Any]:
    """The figures of a window. Milliseconds, and tokens per second.

    A stream's tokens are those of its usage, spread evenly over its events: an event may bring two tokens, and a token
    that is part of a character brings none. Whole streams say how many events a token has; cut ones are taken alike.
    """
    for prompt, outcome in sent:
        outcome.check(prompt.new_tokens if is_exact else None)
    good = [o for _, o in sent if o.error is None]
    whole = [o for o in good if not o.is_cut]
    counted = sum(len(o.times_ns) for o in whole)
    promised = sum(o.completion_tokens for o in whole)
    events = sum(begin <= t < end for o in good for t in o.times_ns)
    firsts = [(p, o) for p, o in sent if o.error is None and o.times_ns]
    firsts = [(p, o) for p, o in firsts if begin <= o.times_ns[0] < end]
    waits = [(o.times_ns[0] - o.begin_ns) / 1e6 for _, o in firsts]
    gaps = [gap / 1e6 for o in good for gap in gaps_within(o.times_ns, begin, end)]
    seconds = (end - begin) / NS
    scale = promised / counted if counted else 1.0
    rate = events * scale / seconds
    prompt_tokens = sum(o.prompt_tokens or p.tokens for p, o in firsts)
    return {
        "output_tokens_per_s": rate,
        "total_tokens_per_s": rate + prompt_tokens / seconds,
        "ttft_ms_p50": percentile(waits, 50),
        "ttft_ms_p99": percentile(waits, 99),
        "itl_ms_p50": percentile(gaps, 50),
        "itl_ms_p99": percentile(gaps, 99),
        "gaps": len(gaps),
        "events": events,
        "whole_events": counted,
        "whole_tokens": promised,
        "requests_sent": len(sent),
        "requests_done": sum(begin <= o.end_ns < end for o in whole),
        "requests_cut": sum(o.is_cut for o in good),
        "prompt_tokens": sorted({o.prompt_tokens - p.tokens for p, o in sent if o.prompt_tokens}),
        "cached_tokens": sum(o.cached_tokens for o in whole),
        "seconds": seconds,
        "errors": [o.error for _, o in sent if o.error is not None],
    }


def gaps_within(times: Sequence[int], begin: int, end: int) -> list[int]:
    """Between the events of one request; both must lie in the window."""
    inside = [t for t in times if begin <= t < end]
    return [later - earlier for earlier, later in pairwise(inside)]


def main() -> None:
    """Play the plan that standard input brings."""
    plan = LoadPlan.read(sys.stdin.read())
    gc.freeze()
    gc.disable()  # a collection would be a pause that is no server's
    print(json.dumps(asyncio.run(Load(plan).play())))


if __name__ == "__main__":
    main()
