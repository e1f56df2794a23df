"""The picture of a diagnosis: error by layer, and how the KL of single tokens is spread. Needs matplotlib."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_edge.errors import InvalidRequestError

if TYPE_CHECKING:
    from mlx_edge.calibration.diagnosis import Diagnosis

FLOW, OWN, MEAN, P99 = "#30638e", "#d1495b", "#3c8d5a", "#8d8d8d"
SMALLEST_KL = 1e-9  # nats; what is below is drawn there


def check_plotting(path: Path) -> None:
    """Raises InvalidRequestError when `path` cannot become a picture, before anything was measured."""
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InvalidRequestError(f"{path}: a plot ends in .png, .svg or .pdf")
    if not path.parent.is_dir():
        raise InvalidRequestError(f"{path}: there is no folder {path.parent}")
    if find_spec("matplotlib") is None:
        raise InvalidRequestError(
            "--plot needs matplotlib, which is not installed: pip install 'mlx-edge[plot]', or leave --plot out"
        )


def draw_diagnosis(diagnosis: "Diagnosis", path: Path) -> None:
    """Write the picture of a diagnosis, in the format of the file's ending."""
    check_plotting(path)
    from matplotlib.figure import Figure  # type: ignore[import-not-found]

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    layers, tokens = figure.subplots(1, 2)
    _draw_layers(layers, diagnosis)
    _draw_tokens(tokens, diagnosis)
    for axes in (layers, tokens):
        axes.spines[["top", "right"]].set_visible(False)
    c = diagnosis.comparison
    figure.suptitle(
        f"B: {_short(diagnosis.names[1])} ({diagnosis.bits[1]:.2f} bits/weight)   against   "
        f"A: {_short(diagnosis.names[0])} ({diagnosis.bits[0]:.2f})\n"
        f"KL {c.kl_mean:.4f} nats/token, top-1 {c.top1:.1%}, "
        f"perplexity {c.reference_perplexity:.3f} to {c.other_perplexity:.3f}",
        size=10,
    )
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise InvalidRequestError(f"{path} cannot be written: {error.strerror or error}") from None


def _short(name: str) -> str:
    return name if len(name) <= 40 else "..." + name[-37:]


def _draw_layers(axes: Any, diagnosis: "Diagnosis") -> None:
    """Bars: what a layer does by itself; a line: what has come together so far."""
    c = diagnosis.comparison
    axes.set_title("Error of hidden states, |A - B| / |A|", size=10)
    if not c.layer_errors:
        axes.text(0.5, 0.5, "layers are not alike", ha="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    own = [100 * error for error in c.own_errors]
    axes.bar(range(1, len(own) + 1), own, color=OWN, alpha=0.75, label="the layer alone")
    flow = [100 * error for error in c.layer_errors]
    style = "o-" if len(flow) <= 48 else "-"
    axes.plot(range(len(flow)), flow, style, color=FLOW, markersize=4, label="so far")
    step = max(1, len(own) // 12)
    places = [0, *range(1, len(own) + 1, step)]
    axes.set_xticks(places, ["emb.", *(str(place - 1) for place in places[1:])], size=8)
    axes.set_xlabel("after layer")
    axes.yaxis.set_major_formatter("{x:g} %")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def _draw_tokens(axes: Any, diagnosis: "Diagnosis") -> None:
    """A histogram over a logarithmic axis, with the mean and the 99th percentile."""
    c = diagnosis.comparison
    axes.set_title("KL of single tokens", size=10)
    values = np.maximum(c.kl.reshape(-1), SMALLEST_KL)
    high = max(float(values.max()), 10 * SMALLEST_KL)
    low = min(max(float(np.quantile(values, 0.002)), SMALLEST_KL), high / 10)
    edges = np.geomspace(low, high, 49)
    shares = np.full(values.size, 100 / values.size)
    axes.hist(np.maximum(values, low), edges, weights=shares, color=FLOW, alpha=0.8)
    axes.set_xscale("log")
    marks = (("mean", c.kl_mean, MEAN), ("P99", c.kl_p99, P99))
    for word, value, color in marks:
        if value > 0:
            axes.axvline(value, color=color, linewidth=1.6, label=f"{word} {value:.3g}")
    axes.set_xlabel("nats")
    axes.yaxis.set_major_formatter("{x:g} %")
    axes.set_ylabel("share of tokens")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, loc="upper left")
