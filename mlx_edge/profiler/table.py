"""The report as aligned text for a terminal, most expensive first. Knows how it looks, not how it was measured.

Milliseconds, MB of 10^6 bytes, GB/s of 10^9 bytes, percent.
"""

from collections.abc import Sequence

from mlx_edge.profiler.report import OpRow, PhaseRow, Report

PHASE_HEADS = ("phase", "calls", "ms", "%", "active MB", "peak MB", "resident MB")
OP_HEADS = ("op", "phase", "backend", "calls", "ms", "%", "us/call", "MB/call", "GB/s", "% of roof")
LAYER_HEADS = ("layer", "phase", "ops", "ms", "%", "MB", "GB/s", "% of roof")
SPAN_HEADS = ("span", "calls", "ms", "own ms", "longest ms")


def format_report(report: Report) -> str:
    """Phases, then whatever else was observed: ops, layers, spans; and what the figures are worth."""
    parts = []
    if report.phases:
        rows = [_phase_cells(row) for row in report.phases]
        covered = sum(row.total_s for row in report.phases)
        rest = max(0.0, report.wall_s - covered)
        rows.append(("(between)", "", _ms(rest), _percent(rest / (report.wall_s or 1)), "", "", ""))
        parts.append(format_table(PHASE_HEADS, rows))
    if report.ops:
        parts.append(format_table(OP_HEADS, [_op_cells(row) for row in report.ops], num_texts=3))
    if report.layers:
        parts.append(
            format_table(LAYER_HEADS, [_layer_cells(row) for row in report.layers], num_texts=2)
        )
    spans = [row for row in report.spans if row.kind == "span"]
    if spans:
        cells = [
            (" > ".join(row.path), str(row.calls), _ms(row.total_s), _ms(row.self_s), _ms(row.longest_s))
            for row in spans
        ]  # fmt: skip
        parts.append(format_table(SPAN_HEADS, cells))
    parts.append("\n".join(_notes(report)))
    return "\n\n".join(part for part in parts if part)


def format_table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, num_texts: int = 1) -> str:
    """Columns two spaces apart; the first `num_texts` are text and stand left, the others right."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = []
    for row in (heads, *rows):
        cells = [
            cell.ljust(width) if index < num_texts else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _phase_cells(row: PhaseRow) -> tuple[str, ...]:
    memory = row.memory
    held = ("", "", "")
    if memory is not None:
        resident = "" if memory.resident is None else _mb(memory.resident)
        held = (_mb(memory.active), _mb(memory.peak), resident)
    return (row.name, str(row.calls), _ms(row.total_s), _percent(row.share), *held)


def _op_cells(row: OpRow) -> tuple[str, ...]:
    return (
        row.op or "",
        row.phase or "-",
        row.backend or "",
        str(row.calls),
        _ms(row.total_s),
        _percent(row.share),
        f"{row.total_s / row.calls * 1e6:.0f}",
        f"{row.num_bytes / row.calls / 1e6:.3f}",
        f"{row.gbs:.2f}",
        _roof(row),
    )


def _layer_cells(row: OpRow) -> tuple[str, ...]:
    return (
        str(row.layer),
        row.phase or "-",
        str(row.calls),
        _ms(row.total_s),
        _percent(row.share),
        f"{row.num_bytes / 1e6:.1f}",
        f"{row.gbs:.2f}",
        _roof(row),
    )


def _notes(report: Report) -> list[str]:
    notes = []
    bandwidth, cost = report.bandwidth, report.observation_cost
    if bandwidth is not None:
        where = f"{bandwidth.num_threads} threads" if bandwidth.num_threads else "the device"
        notes.append(
            f"Roof: {bandwidth.gbs:.1f} GB/s, {bandwidth.device} (read {bandwidth.read_gbs:.1f}, copy "
            f"{bandwidth.copy_gbs:.1f}; {where}, two buffers of {bandwidth.buffer_bytes >> 20} MiB, median of "
            f"{bandwidth.rounds}; measuring took {bandwidth.cost_s:.1f} s)"
        )
    if report.ops:
        phases = {row.phase for row in report.ops}
        in_ops = sum(row.total_s for row in report.ops if row.phase is not None)
        in_phases = sum(row.total_s for row in report.phases if row.name in phases)
        notes.append(
            f"Ops: {_ms(in_ops)} of the {_ms(in_phases)} ms of their phases; the rest is between them. Each was "
            "evaluated by itself, nothing overlaps. MB: what a call must move (weights, cache and inputs read "
            "once, results written)"
            + ("" if report.is_traffic_exact else "; caches are counted as reserved, not as used")
        )
    if cost is not None:
        steps = f"{cost.num_steps} steps"
        if cost.num_steps != cost.num_plain_steps:
            steps = f"{cost.num_steps} steps against {cost.num_plain_steps}: not the same run"
        notes.append(
            f"Cost of observing: {cost.observed_s * 1e3:.1f} ms with it, {cost.plain_s * 1e3:.1f} ms without "
            f"({cost.ratio:.2f} times; {steps})"
        )
    if report.dropped_spans:
        notes.append(f"{report.dropped_spans} spans are in these sums, but not in a trace")
    return notes


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f}"


def _percent(share: float) -> str:
    return f"{share * 100:.1f}"


def _roof(row: OpRow) -> str:
    return "-" if row.roof_share is None else _percent(row.roof_share)
