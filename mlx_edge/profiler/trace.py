"""The spans as a Chrome trace: open the file at ui.perfetto.dev or chrome://tracing.

The format is Google's "Trace Event Format", JSON object form: complete events (ph X) for spans, counters (ph C)
for memory, metadata (ph M) for the names of process and threads. Times are microseconds from the first event.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from mlx_edge.profiler.output import write_json
from mlx_edge.profiler.records import Event, Sample
from mlx_edge.profiler.timer import Profiler

PROCESS_NAME = "mlx_edge"


def write_trace(path: str | Path, profiler: Profiler) -> None:
    """Write all spans that have ended; raises InvalidRequestError where the disk refuses."""
    write_json(path, make_trace(profiler))


def make_trace(profiler: Profiler) -> dict[str, object]:
    """The trace as JSON will hold it. Spans beyond the profiler's `max_events` are not in it, only counted."""
    events, samples = profiler.events(), profiler.samples()
    times = [event.start_ns for event in events] + [sample.at_ns for sample in samples]
    origin = min(times, default=0)
    process = os.getpid()
    return {
        "traceEvents": [
            *_names(profiler, process),
            *(_complete(event, origin, process) for event in events),
            *(_counter(sample, origin, process) for sample in samples),
        ],
        "displayTimeUnit": "ms",
        "otherData": {"dropped_spans": profiler.num_dropped},
    }


def _names(profiler: Profiler, process: int) -> Iterator[dict[str, object]]:
    for number, name in ((0, PROCESS_NAME), *sorted(profiler.threads().items())):
        yield {
            "ph": "M",
            "name": "thread_name" if number else "process_name",
            "pid": process,
            "tid": number,
            "args": {"name": name},
        }


def _complete(event: Event, origin: int, process: int) -> dict[str, object]:
    return {
        "ph": "X",
        "name": event.path[-1],
        "cat": event.kind,
        "pid": process,
        "tid": event.thread,
        "ts": (event.start_ns - origin) / 1000,
        "dur": (event.end_ns - event.start_ns) / 1000,
        "args": dict(event.details),
    }


def _counter(sample: Sample, origin: int, process: int) -> dict[str, object]:
    memory = sample.memory
    held = {"active": memory.active, "cache": memory.cache, "resident": memory.resident}
    return {
        "ph": "C",
        "name": "memory (bytes)",
        "pid": process,
        "tid": 0,
        "ts": (sample.at_ns - origin) / 1000,
        "args": {name: value for name, value in held.items() if value is not None},
    }
