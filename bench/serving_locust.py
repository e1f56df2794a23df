"""The load of a plan by Locust, as a cross-check of bench/load.py. Runs in Locust's environment.

    LOAD_PLAN=plan.json LOAD_OUT=out.json locust -f bench/serving_locust.py --headless -u 8 -r 8 -t 30s --host URL

Each user is one client of a closed loop. The figures are made by the same function from the times that Locust's own
HTTP client gave.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from locust import HttpUser, constant, events, task  # type: ignore[import-not-found]

from bench.load import NS, LoadPlan, Prompt, summarize
from bench.load_client import Outcome

PLAN = LoadPlan.read(Path(os.environ["LOAD_PLAN"]).read_text())
PROMPTS = iter(PLAN.prompts)
SENT: list[tuple[Prompt, Outcome]] = []
WINDOW: list[
    int
] = []  # begin, end, and CPU time before, in nanoseconds; known when the users start


class Client(HttpUser):  # type: ignore[misc]
    """One client of the closed loop."""

    wait_time = constant(0)

    @task  # type: ignore[untyped-decorator]
    def complete(self) -> None:
        """One streamed completion, read line by line."""
        prompt = next(PROMPTS)
        outcome = Outcome(begin_ns=time.perf_counter_ns(), is_cut=True)
        SENT.append((prompt, outcome))
        fields: dict[str, Any] = {"model": PLAN.model, "prompt": prompt.text, "stream": True}
        fields |= {"max_tokens": prompt.new_tokens, "temperature": 0.0}
        fields |= {"stream_options": {"include_usage": True}, **PLAN.options}
        answer = self.client.post(PLAN.path, json=fields, stream=True)
        outcome.status = answer.status_code
        for line in answer.iter_lines(chunk_size=None):
            if line.startswith(b"data:"):
                take(outcome, line[5:].strip())
        outcome.end_ns = time.perf_counter_ns()
        outcome.is_cut = False


def take(outcome: Outcome, event: bytes) -> None:
    """One line of the stream."""
    now = time.perf_counter_ns()
    if event == b"[DONE]":
        outcome.is_done = True
        return
    said = json.loads(event)
    for choice in said.get("choices", ()):
        if choice.get("text"):
            outcome.times_ns.append(now)
        outcome.finish_reason = choice.get("finish_reason") or outcome.finish_reason
    if usage := said.get("usage"):
        outcome.prompt_tokens = usage["prompt_tokens"]
        outcome.completion_tokens = usage["completion_tokens"]


@events.test_start.add_listener  # type: ignore[untyped-decorator]
def begin(**_: Any) -> None:
    """The window. Locust itself takes a second to start, which is not the server's."""
    start = time.perf_counter_ns() + int(PLAN.warm_s * NS)
    WINDOW.extend((start, start + int(PLAN.window_s * NS), time.process_time_ns()))


@events.quitting.add_listener  # type: ignore[untyped-decorator]
def write(**_: Any) -> None:
    """The figures, in the form of bench/load.py."""
    begin, end, cpu_before = WINDOW
    figures = summarize(SENT, begin, end, is_exact=PLAN.is_exact)
    cpu = (time.process_time_ns() - cpu_before) / NS
    seconds = (time.perf_counter_ns() - begin) / NS + PLAN.warm_s
    figures |= {"client_cpu_s": cpu, "client_cpu_share": cpu / seconds / (os.cpu_count() or 1)}
    Path(os.environ["LOAD_OUT"]).write_text(json.dumps(figures))
