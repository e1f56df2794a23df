"""The result of bench/serving.py as one JSON object, as a table and as a picture; formulas: serving_summary.py."""

import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.serving_servers import LLAMA, MLXLM, OURS
from bench.serving_summary import Figure, Record, Rounds, further, null_runs, rows, summarize

NOISE = 0.1  # what ours against ours may be off before a run is called noisy
DIGITS = 4
COLUMNS = {
    "output_tokens_per_s": "tokens/s",
    "total_tokens_per_s": "with prompts",
    "ttft_ms_p50": "TTFT P50, ms",
    "ttft_ms_p99": "P99",
    "itl_ms_p50": "between tokens P50, ms",
    "itl_ms_p99": "P99",
    "requests_done": "requests",
    "errors": "errors",
    "server_cpu_share": "server CPU",
    "client_cpu_share": "client CPU",
    "peak_bytes": "peak, MB",
}


def make_result(
    records: Sequence[Record], facts: Mapping[str, Any], plan: Mapping[str, Any]
) -> dict[str, Any]:
    """`summary` is flat: a number or null for each key; spread, rounds and notes stand beside it by key.

    `plan` is the summary of bench/memory_plan.py, or why there is none, as "error".
    """
    rounds = Rounds(records)
    figures = summarize(rounds)
    summary = {key: _short(figure.median) for key, figure in figures.items()}
    summary["errors"] = rounds.errors(OURS)
    summary["plan_error_p95"] = plan.get("plan_error_p95")
    notes = {key: figure.note for key, figure in figures.items()}
    notes["errors"] = "failed requests of mlx_edge and runs of it that gave nothing, all loads"
    reason = plan.get("error") or "bench.memory_plan gave none"
    notes["plan_error_p95"] = (
        f"not measured: {reason}"
        if summary["plan_error_p95"] is None
        else f"bench.memory_plan: |predicted - measured| / measured peak, P95 of {plan.get('cells')} cells; "
        f"at most {plan.get('worst_under', 0.0):.3f} below the measured"
    )
    return {
        **facts,
        "summary": summary,
        "spread": {key: _spread(figure) for key, figure in figures.items()},
        "rounds": {key: len(figure.rounds) for key, figure in figures.items()},
        "notes": notes,
        "null": {key: _told(figure) for key, figure in null_runs(rounds).items()},
        "further": {key: _told(figure) for key, figure in further(rounds).items()},
        "peer_errors": {peer: rounds.errors(peer) for peer in (LLAMA, MLXLM)},
        "discarded": sum(r["discarded"] is not None for r in records),
        "skipped": sum(r["was_skipped"] for r in records),
        "failures": sorted({f"{r['job']}: {r['error']}" for r in records if r["error"]}),
        "rows": rows(records),
        "records": [_trimmed(record) for record in records],
    }


def _told(figure: Figure) -> dict[str, Any]:
    return {
        "median": _short(figure.median),
        "spread": _spread(figure),
        "rounds": len(figure.rounds),
        "note": figure.note,
    }


def _trimmed(record: Record) -> Record:
    """Without all but the first of its error lines."""
    values = dict(record["values"])
    values["errors"] = values.get("errors", [])[:3]
    return record | {"values": values}


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{DIGITS}g}")


def _spread(figure: Figure) -> list[float | None] | None:
    return [_short(min(figure.rounds)), _short(max(figure.rounds))] if figure.rounds else None


def make_markdown(result: Mapping[str, Any]) -> str:
    """The summary, then every load with what each server gave."""
    return "\n".join([*_summary_lines(result), "", *_row_lines(result), *_foot(result)]) + "\n"


def _summary_lines(result: Mapping[str, Any]) -> list[str]:
    lines = ["| figure | median | spread | rounds | what |", "|" + "---|" * 5]
    for key, value in result["summary"].items():
        note = result["notes"][key]
        if value is None:
            lines.append(f"| `{key}` | not measured | | 0 | {note} |")
            continue
        spread = result["spread"].get(key)
        said = f"{spread[0]:.2f} to {spread[1]:.2f}" if spread else ""
        shown = f"{value:.3f}" if key == "plan_error_p95" else f"{value:.2f}"
        shown = str(value) if key == "errors" else shown
        lines.append(f"| `{key}` | {shown} | {said} | {result['rounds'].get(key, '')} | {note} |")
    nulls = ", ".join(f"{name} {null['median']:.2f}" for name, null in result["null"].items())
    lines += ["", f"Ours against ours: {nulls or 'not run'}."]
    if any(abs(null["median"] - 1) > NOISE for null in result["null"].values()):
        lines.append(
            "**The machine was not quiet**: ours against ours is off, and so is everything else."
        )
    return lines


def _row_lines(result: Mapping[str, Any]) -> list[str]:
    lines = []
    loads = dict.fromkeys((r["model"], r["workload"], r["tool"]) for r in result["rows"])
    for model, workload, tool in loads:
        by = "" if tool == "exact" else f", by {tool}"
        title = f"**{model}**, prompt + new tokens {workload}{by}"
        lines += [f"| {title} | server | {' | '.join(COLUMNS.values())} |"]
        lines += ["|" + "---|" * (len(COLUMNS) + 2)]
        for row in result["rows"]:
            if (row["model"], row["workload"], row["tool"]) == (model, workload, tool):
                load = f"{row['clients']} clients" if row["clients"] else "half load, Poisson"
                name = row["server"] + (" again" if row["turn"] else "")
                cells = [_cell(column, row) for column in COLUMNS]
                lines.append(f"| {load} | {name} | {' | '.join(cells)} |")
        lines.append("")
    return lines


def _cell(column: str, row: Mapping[str, Any]) -> str:
    value = row.get(column)
    if value is None:
        return ""
    if column.endswith("_bytes"):
        return f"{value / 1e6:.0f}"
    if column.endswith("_share"):
        return f"{value:.0%}"
    if column == "output_tokens_per_s" and row["spread"][0] != row["spread"][1]:
        low, high = row["spread"]
        return f"{_digits(value)} ({_digits(low)}-{_digits(high)})"
    return _digits(value)


def _digits(value: float) -> str:
    return f"{value:.{0 if value >= 100 or value == int(value) else 1}f}"


def _foot(result: Mapping[str, Any]) -> list[str]:
    facts = result["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return [
        f"{facts['processor']} ({facts['instruction_sets']}), {facts['cores']} cores, {facts['system']}; {versions}. "
        f"Medians over {result['num_rounds']} interleaved rounds; {result['discarded']} runs discarded because the "
        f"client took over 15 % of the machine's CPU; llama.cpp with its best setting, {result['llama_setting']}. "
        "On an Apple machine: not measured."
    ]


def write_plot(python: Path, result: Path, picture: Path, say: Callable[[str], None]) -> None:
    """Draw the result in the peers' environment, which has matplotlib."""
    script = Path(__file__).with_name("serving_plot.py")
    words = [str(python), str(script), str(result), str(picture)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        say(f"no picture: {lines[-1]}")
