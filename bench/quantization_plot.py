"""The picture of a bench/quantization.py result: what each format costs in bytes and in damage. Needs matplotlib alone.

python bench/quantization_plot.py bench/results/quantization.json OUT.png
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib  # type: ignore[import-not-found]

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLORS = {
    "rtn": "#8d8d8d",
    "gptq": "#d1495b",
    "awq": "#30638e",
    "dwq": "#3c8d5a",
    "smooth": "#edae49",
    "mx": "#7b5ea7",
    "nv": "#7b5ea7",
}


def color(name: str) -> str:
    """One for each method; those of the microscaling formats are one."""
    return next((shade for word, shade in COLORS.items() if name.startswith(word)), "#444444")


def draw_front(axes: Any, rows: list[dict[str, Any]], key: str) -> None:
    """A dot per format over its bits per weight, and the line of those that nothing beats."""
    least = float("inf")
    front = []
    for row in sorted(rows, key=lambda row: (row["bits_per_weight"], row[key])):
        if row[key] < least:
            least = row[key]
            front.append((row["bits_per_weight"], row[key]))
    axes.step(*zip(*front, strict=True), where="post", color="#cccccc", linewidth=1.5, zorder=0)
    for index, row in enumerate(rows):
        place = (row["bits_per_weight"], row[key])
        axes.plot(*place, "o", color=color(row["name"]), markersize=5)
        below = -8 if index % 2 else 5
        axes.annotate(row["name"], place, (4, below), textcoords="offset points", size=6)
    axes.set_xlabel("bits per weight, scales counted")


def draw(result: dict[str, Any], path: Path) -> None:
    """KL and lost answers of every model, and the speeds."""
    models = result["models"]
    figure, grid = plt.subplots(
        len(models) + 1, 2, figsize=(13, 5 * len(models) + 3), squeeze=False
    )
    for line, (name, model) in zip(grid, models.items(), strict=False):
        rows = [row for row in model["rows"] if row["bits_per_weight"] < 15]
        draw_front(line[0], rows, "kl")
        line[0].set_yscale("log")
        line[0].set_title(f"{name}: KL from the float model, nats per token", size=10)
        draw_front(line[1], [row | {"lost": 100 * row["loss"]} for row in rows], "lost")
        line[1].set_yscale("symlog", linthresh=1)
        line[1].set_title(f"{name}: exact answers lost, %", size=10)
    speeds = [(result["speed"]["shape"], result["speed"]["rates"])]
    speeds += [(name, model["speed"]) for name, model in models.items()]
    for axes, (name, rates) in zip(grid[-1], speeds, strict=False):
        for index, (case, rate) in enumerate(reversed(rates.items())):
            low, high = rate["spread"]
            axes.barh(index, rate["ratio"], color=color(case))
            axes.plot([low, high], [index, index], color="#222222", linewidth=1.5)
            axes.annotate(
                f"{rate['tokens_per_s']:.0f}/s",
                (high, index),
                (4, -3),
                textcoords="offset points",
                size=7,
            )
        axes.set_yticks(range(len(rates)), list(reversed(rates)), size=7)
        axes.axvline(1, color="#999999", linestyle="--", linewidth=1)
        axes.set_title(f"decoding over float32: {name}", size=10)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
