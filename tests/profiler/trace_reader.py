"""A strict reader of Chrome's Trace Event Format (JSON object form), as far as this project writes it.

After Google's document of that name: every event has ph, pid, tid, name; X has ts and dur >= 0 and nests within
its thread; C has numbers only; M names a process or thread; what opens a thread must have named it.
"""

import json
import math
from pathlib import Path
from typing import Any

KEYS = {
    "X": {"ph", "name", "cat", "pid", "tid", "ts", "dur", "args"},
    "C": {"ph", "name", "pid", "tid", "ts", "args"},
    "M": {"ph", "name", "pid", "tid", "args"},
}


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The events; AssertionError for anything that the format does not allow."""
    trace = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    assert set(trace) == {"traceEvents", "displayTimeUnit", "otherData"}
    assert trace["displayTimeUnit"] in ("ms", "ns")
    events: list[dict[str, Any]] = trace["traceEvents"]
    for event in events:
        _check_event(event)
    _check_names(events)
    _check_nesting([event for event in events if event["ph"] == "X"])
    return events


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_event(event: dict[str, Any]) -> None:
    kind = event["ph"]
    assert set(event) == KEYS[kind], event
    assert isinstance(event["name"], str)
    assert event["name"]
    assert type(event["pid"]) is int
    assert type(event["tid"]) is int
    assert isinstance(event["args"], dict)
    if kind in "XC":
        assert _is_time(event["ts"])
        assert event["ts"] >= 0
    if kind == "X":
        assert _is_time(event["dur"])
        assert event["dur"] >= 0
        assert isinstance(event["cat"], str)
    if kind == "C":
        assert event["args"]
        assert all(_is_time(value) for value in event["args"].values())
    if kind == "M":
        assert event["name"] in ("process_name", "thread_name")
        assert list(event["args"]) == ["name"]
        assert isinstance(event["args"]["name"], str)


def _check_names(events: list[dict[str, Any]]) -> None:
    names = [(e["name"], e["pid"], e["tid"]) for e in events if e["ph"] == "M"]
    assert len(names) == len(set(names))
    processes = {pid for name, pid, _ in names if name == "process_name"}
    threads = {(pid, tid) for name, pid, tid in names if name == "thread_name"}
    for event in events:
        assert event["pid"] in processes
        assert event["ph"] != "X" or (event["pid"], event["tid"]) in threads


def _check_nesting(spans: list[dict[str, Any]]) -> None:
    """Two spans of a thread are apart or one holds the other; times are rounded to a nanosecond."""
    for thread in {(span["pid"], span["tid"]) for span in spans}:
        own = [span for span in spans if (span["pid"], span["tid"]) == thread]
        ends: list[float] = []
        for span in sorted(own, key=lambda s: (s["ts"], -s["dur"])):
            while ends and ends[-1] <= span["ts"] + 2e-3:
                ends.pop()
            end = span["ts"] + span["dur"]
            assert not ends or end <= ends[-1] + 2e-3, f"{span['name']} overlaps what is around it"
            ends.append(end)
