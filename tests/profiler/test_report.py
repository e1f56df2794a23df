"""The report: rows add up, stand in order, line up, and are dumped with a schema."""

import json
from pathlib import Path

import pytest

from mlx_edge.profiler import (
    Bandwidth,
    Memory,
    ObservationCost,
    OpProfile,
    Profiler,
    format_report,
    make_report,
    write_report,
)
from mlx_edge.profiler.operations import OpKey, OpTotal
from mlx_edge.profiler.table import format_table
from tests.profiler.ticking import Clock

ROOF = Bandwidth("CPU through numpy", 20.0, 25.0, 2, 256 << 20, 7, 1.5)
COST = ObservationCost(0.3, 0.2, 8, 8)
MS = 1_000_000


class Recorded(OpProfile):
    """An op profile that has run."""

    def totals(self) -> dict[OpKey, OpTotal]:
        return {
            OpKey("decode", "attention_block", "cpu", 0): OpTotal(2, 4 * MS, 4 * MS, 20_000_000),
            OpKey("decode", "attention_block", "cpu", 1): OpTotal(2, 6 * MS, 6 * MS, 20_000_000),
            OpKey("decode", "mlp_block", "cpu", 1): OpTotal(2, 8 * MS, 6 * MS, 40_000_000),
            OpKey("decode", "head", "cpu", None): OpTotal(2, 4 * MS, 4 * MS, 100_000_000),
        }


@pytest.fixture
def watch() -> Profiler:
    clock = Clock()
    watch = Profiler(clock=clock, sample=lambda: Memory(15_000_000, 22_000_000, 0, None, 1))
    with watch.phase("load"):
        clock.advance(5 * MS)
    clock.advance(3 * MS)
    with watch.phase("decode"), watch.start("layer_1"):
        clock.advance(24 * MS)
        with watch.phase("sample"):
            clock.advance(8 * MS)
    return watch


def test_phases_most_expensive_first(watch: Profiler) -> None:
    report = make_report(watch)
    assert [(row.name, row.calls, row.total_s) for row in report.phases] == [
        ("decode", 1, 0.024),
        ("sample", 1, 0.008),
        ("load", 1, 0.005),
    ]
    assert report.wall_s == 0.04
    assert [row.share for row in report.phases] == pytest.approx([0.6, 0.2, 0.125])
    assert report.ops == report.layers == []


def test_ops_and_layers(watch: Profiler) -> None:
    report = make_report(watch, ops=Recorded(watch), bandwidth=ROOF)
    rows = [(r.op, r.calls, r.total_s, r.share, r.gbs, r.roof_share) for r in report.ops]
    assert rows == [
        ("attention_block", 4, 0.01, 0.5, 4.0, 0.16),
        ("mlp_block", 2, 0.006, 0.3, 5.0, 0.2),  # bandwidth over the whole call
        ("head", 2, 0.004, 0.2, 25.0, 1.0),
    ]
    layers = [(r.layer, r.op, r.total_s, r.share) for r in report.layers]
    assert layers == [(1, None, 0.012, 0.6), (0, None, 0.004, 0.2)]


def test_the_table(watch: Profiler) -> None:
    report = make_report(watch, ops=Recorded(watch), bandwidth=ROOF, cost=COST)
    assert (
        format_report(report).splitlines()
        == """\
phase      calls     ms     %  active MB  peak MB  resident MB
decode         1  24.00  60.0       15.0     22.0
sample         1   8.00  20.0       15.0     22.0
load           1   5.00  12.5       15.0     22.0
(between)          3.00   7.5

op               phase   backend  calls     ms     %  us/call  MB/call   GB/s  % of roof
attention_block  decode  cpu          4  10.00  50.0     2500   10.000   4.00       16.0
mlp_block        decode  cpu          2   6.00  30.0     3000   20.000   5.00       20.0
head             decode  cpu          2   4.00  20.0     2000   50.000  25.00      100.0

layer  phase   ops     ms     %    MB  GB/s  % of roof
1      decode    4  12.00  60.0  60.0  4.29       17.1
0      decode    2   4.00  20.0  20.0  5.00       20.0

span              calls     ms  own ms  longest ms
decode > layer_1      1  32.00   24.00       32.00

Roof: 25.0 GB/s, CPU through numpy (read 20.0, copy 25.0; 2 threads, two buffers of 256 MiB, median of 7; \
measuring took 1.5 s)
Ops: 20.00 of the 24.00 ms of their phases; the rest is between them. Each was evaluated by itself, nothing \
overlaps. MB: what a call must move (weights, cache and inputs read once, results written)
Cost of observing: 300.0 ms with it, 200.0 ms without (1.50 times; 8 steps)""".splitlines()
    )


def test_runs_that_differ_are_not_compared_in_silence(watch: Profiler) -> None:
    text = format_report(make_report(watch, cost=ObservationCost(0.3, 0.1, 8, 3)))
    assert "8 steps against 3: not the same run" in text


def test_an_empty_report_is_no_error() -> None:
    assert format_report(make_report(Profiler())) == ""


def test_a_table_lines_up() -> None:
    assert format_table(("a", "long head"), [("name", "1"), ("x", "22")]) == (
        "a     long head\nname          1\nx            22"
    )


def test_json(watch: Profiler, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    report = make_report(watch, ops=Recorded(watch), bandwidth=ROOF, cost=COST)
    write_report(path, report)
    found = json.loads(path.read_text())
    assert (found["schema"], found["schema_version"]) == ("mlx_edge.profile", 1)
    assert set(found) == {
        "schema", "schema_version", "machine", "versions", "created", "wall_s", "phases", "spans", "ops",
        "layers", "is_traffic_exact", "bandwidth", "observation_cost", "dropped_spans",
    }  # fmt: skip
    assert found["versions"]["mlx"]
    assert found["machine"]["device"] in ("cpu", "gpu")
    assert found["bandwidth"]["gbs"] == 25.0
    assert found["observation_cost"]["ratio"] == pytest.approx(1.5)
    assert found["phases"][0]["memory"]["active"] == 15_000_000
    assert [row["op"] for row in found["ops"]] == ["attention_block", "mlp_block", "head"]
    assert found["spans"][0]["path"] == ["decode"]
