"""The picture of a bench/metal_counts.py result: the keys, the calibration, predicted steps. Needs matplotlib alone.

python bench/metal_plot.py bench/results/metal_counts.json OUT.png
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib  # type: ignore[import-not-found]

matplotlib.use("Agg")
from matplotlib import pyplot as plt

OURS, MLX = "#d1495b", "#8d8d8d"
COLORS = ("#30638e", "#3c8d5a", "#edae49", "#d1495b", "#6d597a")


def draw_summary(axes: Any, result: dict[str, Any]) -> None:
    """A pair of dots per key, ours and MLX's, on a logarithmic axis."""
    keys = list(result["notes"])
    for row, key in enumerate(reversed(keys)):
        for name, color in ((f"mlx_{key}", MLX), (key, OURS)):
            value = result["summary"][name]
            if value is not None:
                axes.plot(value, row, "o", color=color)
                above = (0, 6) if color == OURS else (0, -12)
                text = f"{value:.3g}"
                axes.annotate(
                    text, (value, row), above, textcoords="offset points", ha="center", size=7
                )
    axes.set_xscale("log")
    axes.margins(x=0.15, y=0.12)
    axes.set_yticks(range(len(keys)), list(reversed(keys)), size=8)
    axes.set_title("counted: ours (red) and MLX's (grey); less is better", size=9)


def draw_calibration(axes: Any, result: dict[str, Any]) -> None:
    """How far the model is from each published point."""
    rows = result["calibration"]
    axes.barh(range(len(rows)), [row["off"] for row in rows], color=[
        OURS if row["is_missed"] else MLX for row in rows
    ])  # fmt: skip
    axes.axvspan(-0.25, 0.25, color="#eeeeee", zorder=0)
    axes.set_yticks(range(len(rows)), [f"{row['point']} ({row['chip']})" for row in rows], size=6)
    axes.invert_yaxis()
    axes.set_title("the model over published points, minus 1", size=9)


def draw_steps(axes: Any, result: dict[str, Any], rows: int) -> None:
    """Predicted steps, ours over MLX's: a group of bars per model and context, a bar per chip."""
    found = [r for r in result["steps"] if r["rows"] == rows and r["ours_over_mlx"] is not None]
    groups = list(dict.fromkeys((r["model"], r["context"]) for r in found))
    chips = list(dict.fromkeys(r["chip"] for r in found))
    for r in found:
        place = groups.index((r["model"], r["context"])) + 0.16 * chips.index(r["chip"])
        color = COLORS[chips.index(r["chip"]) % len(COLORS)]
        axes.bar(place, r["ours_over_mlx"], 0.15, color=color)
    axes.axhline(1, color="#999999", linewidth=1, linestyle="--")
    names = [f"{model}\n{context}" for model, context in groups]
    axes.set_xticks([i + 0.32 for i in range(len(groups))], names, size=5, rotation=90)
    plural = "row" if rows == 1 else "rows"
    axes.set_title(
        f"predicted, not measured: {rows} {plural}, ours / MLX, {chips[0]} to {chips[-1]}", size=8
    )


def main() -> None:
    """Write the picture."""
    result = json.loads(Path(sys.argv[1]).read_text())
    numbers = sorted({r["rows"] for r in result["steps"] if r["ours_over_mlx"] is not None})
    figure = plt.figure(figsize=(12, 5 + 2.6 * -(-len(numbers) // 2)), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[4.4, 2.6 * max(1, -(-len(numbers) // 2))])
    left, right = above.subplots(1, 2)
    draw_summary(left, result)
    draw_calibration(right, result)
    for index, rows in enumerate(numbers):
        draw_steps(below.add_subplot(-(-len(numbers) // 2), 2, index + 1), result, rows)
    figure.suptitle(f"Metal kernels counted in an emulator, {result['mode']} run", size=10)
    figure.savefig(sys.argv[2], dpi=110)


if __name__ == "__main__":
    main()
