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
from matplotlib.lines import Line2D  # type: ignore[import-not-found]

COLORS = {
    "rtn": "#8d8d8d",
    "gptq": "#d1495b",
    "awq": "#30638e",
    "dwq": "#3c8d5a",
    "smooth": "#edae49",
    "mx, nv": "#7b5ea7",
    "mixed, int8": "#444444",
}


def method(name: str) -> str:
    """Whose color a format has; those of the microscaling formats are one."""
    words = (word for word in COLORS if name.startswith(tuple(word.split(", "))))
    return next(words, "mixed, int8")


def draw_front(axes: Any, rows: list[dict[str, Any]], key: str) -> None:
    """A dot per format over its bits per weight; those that nothing beats are joined by a line, and named."""
    least = float("inf")
    front = []
    for row in sorted(rows, key=lambda row: (row["bits_per_weight"], row[key])):
        axes.plot(row["bits_per_weight"], row[key], "o", color=COLORS[method(row["name"])])
        if row[key] < least:
            least = row[key]
            front.append(row)
    places = [(row["bits_per_weight"], row[key]) for row in front]
    axes.step(*zip(*places, strict=True), where="post", color="#cccccc", linewidth=1.5, zorder=0)
    for row, place in zip(front, places, strict=True):
        axes.annotate(row["name"], place, (6, -3), textcoords="offset points", size=7)
    axes.margins(0.25, 0.12)
    axes.set_xlim(right=13)  # room for the last name
    used = {method(row["name"]) for row in rows}
    dots = [Line2D([], [], marker="o", linestyle="", color=COLORS[name]) for name in COLORS]
    shown = [(dot, name) for dot, name in zip(dots, COLORS, strict=True) if name in used]
    axes.legend(*zip(*shown, strict=True), fontsize=7)
    axes.set_xlabel("bits per weight, scales counted")


def draw(result: dict[str, Any], path: Path) -> None:
    """KL and lost answers of every model, and the speeds."""
    models = result["models"]
    num_lines = len(models) + len(models) // 2 + 1  # a speed more than there are models
    figure, grid = plt.subplots(num_lines, 2, figsize=(13, 5 * len(models) + 3), squeeze=False)
    for line, (name, model) in zip(grid, models.items(), strict=False):
        rows = [row for row in model["rows"] if row["bits_per_weight"] < 15]
        draw_front(line[0], rows, "kl")
        line[0].set_yscale("log")
        line[0].set_title(f"{name}: KL from the float model, nats per token", size=10)
        answered = [row for row in rows if row["loss"] is not None]
        draw_front(line[1], [row | {"lost": 100 * row["loss"]} for row in answered], "lost")
        line[1].set_yscale("symlog", linthresh=1)
        line[1].set_title(f"{name}: exact answers lost, %", size=10)
    speeds = [(result["speed"]["shape"], result["speed"]["rates"])]
    speeds += [(name, model["speed"]) for name, model in models.items()]
    places = grid[len(models) :].flatten()
    for axes in places[len(speeds) :]:
        axes.set_axis_off()
    for axes, (name, rates) in zip(places, speeds, strict=False):
        for index, (case, rate) in enumerate(reversed(rates.items())):
            low, high = rate["spread"]
            axes.barh(index, rate["ratio"], color=COLORS[method(case)])
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
