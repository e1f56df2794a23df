"""The report: who took the time, phase by phase and, where ops were observed, op by op and layer by layer.

Turns what the profiler and the op profile collected into plain records, and those into JSON. Seconds, bytes and
GB/s of 10^9 bytes. How it looks in a terminal is for `table.py`; nothing here measures.
"""

import os
import platform
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_edge.profiler.memory import Memory
from mlx_edge.profiler.output import write_json
from mlx_edge.profiler.records import Total
from mlx_edge.profiler.timer import Profiler

if TYPE_CHECKING:  # these load MLX
    from mlx_edge.profiler.operations import OpKey, OpProfile, OpTotal
    from mlx_edge.profiler.phases import ObservationCost
    from mlx_edge.profiler.roofline import Bandwidth

SCHEMA = "mlx_edge.profile"
SCHEMA_VERSION = 1  # goes up when a field changes its meaning or leaves


@dataclass(frozen=True)
class PhaseRow:
    """All time in phases of one name, without the phases inside them: the rows add up."""

    name: str
    calls: int
    total_s: float
    share: float  # of the wall time from the first phase's start to the last one's end
    memory: Memory | None  # when the phase last ended


@dataclass(frozen=True)
class SpanRow:
    """All spans of one path."""

    path: tuple[str, ...]
    kind: str
    calls: int
    total_s: float
    self_s: float  # without the spans directly inside
    longest_s: float


@dataclass(frozen=True)
class OpRow:
    """All calls of one op in one phase, or (op is None) of all ops of one layer in one phase."""

    phase: str | None
    op: str | None
    backend: str | None
    layer: int | None
    calls: int
    total_s: float
    share: float  # of the time in all ops
    num_bytes: int
    gbs: float
    roof_share: float | None  # of the measured bandwidth; None without one


@dataclass(frozen=True)
class Report:
    """All there is to say, most expensive first."""

    machine: dict[str, str | int]
    versions: dict[str, str | None]
    created: str  # ISO 8601, UTC
    wall_s: float  # from the first phase's start to the last one's end
    phases: list[PhaseRow]
    spans: list[SpanRow]
    ops: list[OpRow]
    layers: list[OpRow]
    is_traffic_exact: bool  # else caches were counted as reserved, not as used
    bandwidth: "Bandwidth | None"
    observation_cost: "ObservationCost | None"
    dropped_spans: int  # in the rows, but not in a trace


def make_report(
    profiler: Profiler,
    *,
    ops: "OpProfile | None" = None,
    bandwidth: "Bandwidth | None" = None,
    cost: "ObservationCost | None" = None,
) -> Report:
    """What was collected so far; spans still open are not in it.

    `ops`, `bandwidth` and `cost` add the rows per op and layer, the roof, and what observing cost.
    """
    totals = profiler.totals()
    calls = list(ops.totals().items()) if ops is not None else []
    roof = bandwidth.gbs if bandwidth is not None else None
    wall_s = profiler.phases_wall_ns() / 1e9
    return Report(
        machine=describe_machine(),
        versions={name: _version(name) for name in ("mlx", "mlx-edge", "numpy")},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        wall_s=wall_s,
        phases=_phase_rows(totals, wall_s),
        spans=_span_rows(totals),
        ops=_op_rows(calls, lambda key: (key.phase, key.op, key.backend, None), roof),
        layers=_op_rows(
            [(key, total) for key, total in calls if key.layer is not None],
            lambda key: (key.phase, None, None, key.layer),
            roof,
            whole_ns=sum(total.self_ns for _, total in calls),
        ),
        is_traffic_exact=ops is None or ops.is_exact,
        bandwidth=bandwidth,
        observation_cost=cost,
        dropped_spans=profiler.num_dropped,
    )


def write_report(path: str | Path, report: Report) -> None:
    """Write the report as JSON; raises InvalidRequestError where the disk refuses."""
    body = asdict(report)
    if report.bandwidth is not None:
        body["bandwidth"]["gbs"] = report.bandwidth.gbs
    if report.observation_cost is not None:
        body["observation_cost"]["ratio"] = report.observation_cost.ratio
    write_json(path, {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **body})


def describe_machine() -> dict[str, str | int]:
    """System, processor and, once MLX is loaded, the device that it computes on."""
    machine: dict[str, str | int] = {
        "system": platform.platform(),
        "architecture": platform.machine(),
        "cores": os.cpu_count() or 1,
        "python": platform.python_version(),
    }
    mlx = sys.modules.get("mlx.core")
    if mlx is not None:
        machine["device"] = mlx.default_device().type.name
        machine["device_name"] = str(mlx.device_info().get("device_name", "unknown"))
    return machine


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _phase_rows(totals: dict[tuple[str, ...], Total], wall_s: float) -> list[PhaseRow]:
    by_name: dict[str, list[Total]] = {}
    for path, total in totals.items():
        if total.kind == "phase":
            by_name.setdefault(path[-1], []).append(total)
    rows = []
    for name, alike in by_name.items():
        seconds = sum(total.phase_ns for total in alike) / 1e9
        rows.append(
            PhaseRow(
                name,
                sum(total.calls for total in alike),
                seconds,
                seconds / wall_s if wall_s else 0.0,
                alike[-1].memory,
            )
        )
    return sorted(rows, key=lambda row: -row.total_s)


def _span_rows(totals: dict[tuple[str, ...], Total]) -> list[SpanRow]:
    rows = [
        SpanRow(path, t.kind, t.calls, t.total_ns / 1e9, t.self_ns / 1e9, t.longest_ns / 1e9)
        for path, t in totals.items()
    ]
    return sorted(rows, key=lambda row: (-row.total_s, row.path))


def _op_rows(
    calls: Iterable[tuple["OpKey", "OpTotal"]],
    group: "Callable[[OpKey], tuple[str | None, str | None, str | None, int | None]]",
    roof_gbs: float | None,
    whole_ns: int | None = None,
) -> list[OpRow]:
    """A row per group. Time and share leave observed ops inside out; bandwidth is over the whole of a call."""
    calls = list(calls)
    if whole_ns is None:
        whole_ns = sum(total.self_ns for _, total in calls)
    groups: dict[tuple[str | None, str | None, str | None, int | None], list[OpTotal]] = {}
    for key, total in calls:
        groups.setdefault(group(key), []).append(total)
    rows = []
    for name, alike in groups.items():
        self_ns = sum(total.self_ns for total in alike)
        moved = sum(total.num_bytes for total in alike)
        gbs = moved / max(1, sum(total.total_ns for total in alike))  # bytes per ns are GB/s
        rows.append(
            OpRow(
                *name,
                calls=sum(total.calls for total in alike),
                total_s=self_ns / 1e9,
                share=self_ns / whole_ns if whole_ns else 0.0,
                num_bytes=moved,
                gbs=gbs,
                roof_share=gbs / roof_gbs if roof_gbs else None,
            )
        )
    return sorted(rows, key=lambda row: -row.total_s)
