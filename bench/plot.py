"""The picture of a bench/peers.py result: ratios with their spread, and tokens per second. Needs matplotlib alone.

python bench/plot.py bench/results/peers.json OUT.png
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib  # type: ignore[import-not-found]

matplotlib.use("Agg")
from matplotlib import pyplot as plt

LESS_IS_BETTER = ("cold_first_token_vs_llamacpp", "peak_memory_over_weights")
FAMILIES = ("mlx_edge", "llama.cpp", "OpenVINO", "mlx-lm")
COLORS = dict(zip(FAMILIES, ("#d1495b", "#30638e", "#3c8d5a", "#8d8d8d"), strict=True))
RATES = {"prefill": "prompt of {} tokens", "decode": "decode after {} tokens"}


def draw_ratios(axes: Any, result: dict[str, Any]) -> None:
    """A dot per key, its rounds as a line, on a logarithmic axis; what is equal stands at 1."""
    keys = [key for key, value in result["summary"].items() if value is not None]
    for row, key in enumerate(reversed(keys)):
        low, high = result["spread"][key]
        axes.plot([low, high], [row, row], color="#555555", linewidth=2)
        axes.plot(result["summary"][key], row, "o", color=COLORS["mlx_edge"])
        text = f"{result['summary'][key]:.2f}"
        axes.annotate(text, (high, row), (6, 0), textcoords="offset points", va="center", size=8)
    axes.axvline(1.0, color="#999999", linewidth=1, linestyle="--")
    axes.set_xscale("log")
    axes.margins(x=0.2)
    names = [f"{key} (less is better)" if key in LESS_IS_BETTER else key for key in reversed(keys)]
    axes.set_yticks(range(len(keys)), names, size=8)
    axes.set_title("ours / theirs, median and spread over rounds", size=10)


def best_rates(group: dict[str, Any], column: str) -> dict[str, dict[str, float]]:
    """Each peer's best setting for one measurement."""
    best: dict[str, dict[str, float]] = {}
    for peer, values in group["peers"].items():
        family = next((name for name in FAMILIES if peer.startswith(name)), None)
        if family is None or column not in values or peer == "mlx_edge again":
            continue
        if family not in best or values[column]["median"] > best[family]["median"]:
            best[family] = values[column]
    return best


def draw_rates(axes: Any, group: dict[str, Any], column: str) -> None:
    """A bar for each peer's best setting, the spread as a line."""
    best = best_rates(group, column)
    for index, (family, value) in enumerate(best.items()):
        below, above = value["median"] - value["low"], value["high"] - value["median"]
        errors = [[below], [above]]
        axes.bar(index, value["median"], color=COLORS[family], yerr=errors, capsize=3)
        axes.annotate(
            f"{value['median']:.1f}",
            (index, value["high"]),
            (0, 3),
            textcoords="offset points",
            ha="center",
            size=7,
        )
    axes.set_xticks(range(len(best)), list(best), size=7)
    axes.margins(y=0.15)
    kind, number = column.rsplit("_", 1)
    axes.set_title(f"{group['shape']}, {RATES[kind].format(number)}", size=8)
    axes.set_ylabel("tokens/s", size=7)
    axes.tick_params(axis="y", labelsize=7)


def main() -> None:
    """Write the picture."""
    result = json.loads(Path(sys.argv[1]).read_text())
    panels = [
        (group, column)
        for group in result["measured"]
        if group["threads"] == 2
        for column in group["columns"]
        if column.rpartition("_")[0] in RATES and "mlx_edge" in best_rates(group, column)
    ]
    columns = max(2, min(4, len(panels)))
    rows = -(-len(panels) // columns)
    figure = plt.figure(figsize=(3.1 * columns, 4.2 + 2.4 * rows), layout="constrained")
    ratios, rates = figure.subfigures(2, 1, height_ratios=[4.2, 2.4 * rows or 0.1])
    draw_ratios(ratios.subplots(), result)
    for index, (group, column) in enumerate(panels):
        draw_rates(rates.add_subplot(rows, columns, index + 1), group, column)
    facts = result["machine"]
    figure.suptitle(
        f"{facts['processor']} ({facts['instruction_sets']}), two threads, {result['mode']} run",
        size=9,
    )
    figure.savefig(sys.argv[2], dpi=110)


if __name__ == "__main__":
    main()
