"""The picture of a bench/serving.py result: tokens per second and the wait between tokens over the number of clients.

python bench/serving_plot.py bench/results/serving.json OUT.png      (needs matplotlib alone)
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib  # type: ignore[import-not-found]

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLORS = {"mlx_edge": "#d1495b", "llama.cpp": "#30638e", "mlx-lm": "#8d8d8d"}
PANELS = (
    ("output_tokens_per_s", "output tokens/s", "linear"),
    ("ttft_ms_p50", "first token, P50, ms", "log"),
    ("itl_ms_p99", "between tokens, P99, ms", "log"),
)


def loads(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Models and workloads that ran with more than two numbers of clients, or with two where there are no others."""
    found: dict[tuple[str, str], set[int]] = {}
    for row in result["rows"]:
        if row["tool"] == "exact" and row["clients"] and row["rounds"]:
            found.setdefault((row["model"], row["workload"]), set()).add(row["clients"])
    many = [load for load, clients in found.items() if len(clients) > 2]
    return many or [load for load, clients in found.items() if len(clients) == 2]


def draw(axes: Any, result: dict[str, Any], load: tuple[str, str], value: str) -> None:
    """One line for each server; the half load of ours as a dashed line."""
    ticks: set[int] = set()
    for server, color in COLORS.items():
        own = [
            row
            for row in result["rows"]
            if (row["model"], row["workload"], row["server"]) == (*load, server)
            and (row["tool"], row["turn"]) == ("exact", 0)
            and row.get(value) is not None
        ]
        points = sorted((row["clients"], row[value]) for row in own if row["clients"])
        if points:
            ticks |= {clients for clients, _ in points}
            axes.plot(*zip(*points, strict=True), "o-", color=color, label=server, markersize=4)
        if value == "output_tokens_per_s":
            for row in own:
                if row["clients"] and row["spread"]:
                    axes.plot([row["clients"]] * 2, row["spread"], color=color, linewidth=1)
        half = [row[value] for row in own if not row["clients"]]
        if half and value == "itl_ms_p99":
            axes.axhline(half[0], color=color, linestyle=":", linewidth=1)
            note = f"{server}, half load"
            axes.annotate(note, (1, half[0]), (2, 2), textcoords="offset points", size=7)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(ticks), [str(tick) for tick in sorted(ticks)], size=8)
    axes.minorticks_off()


def main() -> None:
    """Write the picture."""
    result = json.loads(Path(sys.argv[1]).read_text())
    rows = loads(result)
    size = (4.2 * len(PANELS), 3.2 * len(rows) + 0.4)
    figure, grid = plt.subplots(
        len(rows), len(PANELS), figsize=size, squeeze=False, layout="constrained"
    )
    for line, load in zip(grid, rows, strict=True):
        for axes, (value, title, scale) in zip(line, PANELS, strict=True):
            axes.set_yscale(scale)
            draw(axes, result, load, value)
            if scale == "linear":
                axes.set_ylim(bottom=0)
            axes.set_title(f"{load[0]}, {load[1]} tokens: {title}", size=9)
            axes.set_xlabel("clients", size=8)
            axes.tick_params(labelsize=8)
            axes.grid(alpha=0.25)
        line[0].legend(fontsize=8)
    facts = result["machine"]
    figure.suptitle(
        f"{facts['processor']} ({facts['instruction_sets']}), {result['mode']} run", size=9
    )
    figure.savefig(sys.argv[2], dpi=110)


if __name__ == "__main__":
    main()
