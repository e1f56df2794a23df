"""The result of a run as one JSON object, and its picture. Formulas are in bench/peer_summary.py."""

import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.peer_summary import Figure, Record, Rounds, null_runs, summarize

DIGITS = 4  # significant ones; the rest is noise


def make_result(
    records: Sequence[Record],
    shapes: Mapping[str, str],
    cache_bytes: Mapping[str, int],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """`summary` is flat: a number or null for each key; spread, rounds, ahead and notes stand beside it by key.

    `shapes` names the model of "1b" and of "06b"; `cache_bytes` is what a position takes in 16 bits, by model.
    """
    rounds = Rounds(records)

    def cache(shape: str, positions: int) -> int:
        return cache_bytes[shape] * positions

    figures = summarize(rounds, shapes, cache)
    return {
        **facts,
        "summary": {key: _short(figure.median) for key, figure in figures.items()},
        "spread": {key: _spread(figure) for key, figure in figures.items()},
        "rounds": {key: len(figure.ratios) for key, figure in figures.items()},
        "ahead": {key: _ahead(key, figure) for key, figure in figures.items()},
        "notes": {key: figure.note for key, figure in figures.items()},
        "null": {
            key: {
                "median": _short(figure.median),
                "spread": _spread(figure),
                "rounds": len(figure.ratios),
            }
            for key, figure in null_runs(rounds, shapes["1b"]).items()
        },
        "measured": measured(rounds),
        "stolen_s": _short(sum(record.get("stolen_s", 0.0) for record in records)),
        "failures": sorted({f"{r['job']}: {r['error']}" for r in records if r["error"]}),
        "records": [dict(record) for record in records],
    }


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{DIGITS}g}")


def _spread(figure: Figure) -> list[float | None] | None:
    return [_short(min(figure.ratios)), _short(max(figure.ratios))] if figure.ratios else None


SMALLER_IS_BETTER = ("cold_first_token_vs_llamacpp", "peak_memory_over_weights")


def _ahead(key: str, figure: Figure) -> int:
    """The rounds in which ours was at least as good."""
    if key in SMALLER_IS_BETTER:
        return sum(ratio <= 1 for ratio in figure.ratios)
    return sum(ratio >= 1 for ratio in figure.ratios)


def measured(rounds: Rounds) -> list[dict[str, Any]]:
    """Every peer and setting: median, lowest and highest of each value, a group for each model and thread count."""
    groups = dict.fromkeys((r["shape"], r["threads"]) for r in rounds.records)
    found = []
    for shape, threads in groups:
        records = [r for r in rounds.records if (r["shape"], r["threads"]) == (shape, threads)]
        columns = dict.fromkeys(name for record in records for name in record["values"])
        peers = {
            peer: {
                name: {
                    "median": _short(series.median),
                    "low": _short(min(series.values.values())),
                    "high": _short(max(series.values.values())),
                    "rounds": len(series.values),
                }
                for name in columns
                if (series := rounds.series(shape, peer, name, threads)).values
            }
            for peer in dict.fromkeys(record["peer"] for record in records)
        }
        group = {"shape": shape, "threads": threads, "columns": sorted(columns), "peers": peers}
        found.append(group)
    return found


def write_plot(python: Path, result: Path, picture: Path, say: Callable[[str], None]) -> None:
    """Draw the result in the peers' environment, which has matplotlib."""
    script = Path(__file__).with_name("plot.py")
    done = subprocess.run(
        [str(python), str(script), str(result), str(picture)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        say(f"no picture: {lines[-1]}")
