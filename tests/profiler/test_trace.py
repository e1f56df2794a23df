"""The trace: a strict reader takes it, and what was observed stands in it."""

import json
import os
import threading
from pathlib import Path

import pytest

from mlx_edge.errors import InvalidRequestError
from mlx_edge.profiler import Memory, Profiler, make_trace, write_trace
from tests.profiler.ticking import Clock
from tests.profiler.trace_reader import read_trace


def observed() -> Profiler:
    clock = Clock()
    watch = Profiler(clock=clock, sample=lambda: Memory(clock.now, 0, 7, None, 0))
    with watch.phase("decode"):
        clock.advance(1_500_000)
        with watch.start("mlp_block", kind="op", details={"layer": 3}):
            clock.advance(2_500_000)

    def work() -> None:
        with watch.start("other"):
            clock.advance(10)

    thread = threading.Thread(target=work, name="engine")
    thread.start()
    thread.join()
    return watch


def test_events(tmp_path: Path) -> None:
    write_trace(tmp_path / "trace.json", observed())
    events = read_trace(tmp_path / "trace.json")
    spans = {e["name"]: e for e in events if e["ph"] == "X"}
    decode, block = spans["decode"], spans["mlp_block"]
    assert (decode["ts"], decode["dur"], decode["cat"]) == (0, 4000.0, "phase")
    assert (block["ts"], block["dur"], block["args"]) == (1500.0, 2500.0, {"layer": 3})
    assert {e["pid"] for e in events} == {os.getpid()}
    assert spans["other"]["tid"] != decode["tid"]
    names = [e["args"]["name"] for e in events if e["ph"] == "M"]
    assert names == ["mlx_edge", "MainThread", "engine"]
    counters = [e for e in events if e["ph"] == "C"]
    assert [c["args"] for c in counters] == [
        {"active": 1000, "cache": 7},
        {"active": 4_001_000, "cache": 7},
    ]


def test_an_empty_profiler_is_a_trace(tmp_path: Path) -> None:
    write_trace(tmp_path / "trace.json", Profiler())
    assert [e["ph"] for e in read_trace(tmp_path / "trace.json")] == ["M"]


def test_dropped_spans_are_counted() -> None:
    watch = Profiler(max_events=1)
    for _ in range(3):
        with watch.start("a"):
            pass
    assert make_trace(watch)["otherData"] == {"dropped_spans": 2}


def test_half_a_file_is_never_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trace.json"
    path.write_text("old")

    def refuse(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(InvalidRequestError, match="No space left on device; name another file"):
        observed().dump_trace(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_no_such_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="cannot be written: No such file or directory"):
        observed().dump_trace(tmp_path / "missing" / "trace.json")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("negative", {"dur": -1.0}),
        ("a string", {"ts": "1"}),
        ("no thread", {"tid": 9}),
        ("overlap", {"ts": 3000.0, "dur": 4000.0}),
    ],
)
def test_the_reader_is_strict(tmp_path: Path, name: str, change: dict[str, object]) -> None:
    trace = json.loads(json.dumps(make_trace(observed())))
    block = next(e for e in trace["traceEvents"] if e["name"] == "mlp_block")
    block.update(change)
    (tmp_path / "trace.json").write_text(json.dumps(trace))
    with pytest.raises(AssertionError):
        read_trace(tmp_path / "trace.json")
