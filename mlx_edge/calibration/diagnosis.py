"""Two models side by side, in words: how far the second is from the first, which layer does it, and where it shows.

For `python -m mlx_edge.convert --diagnose A B`. Measures with `comparison.py`; knows folders and tokenizers.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_edge import ops
from mlx_edge.calibration.comparison import Choice, Comparison, WorstToken, compare
from mlx_edge.calibration.layerwise import LayerwiseModel, as_dense
from mlx_edge.calibration.measurement import count_weights
from mlx_edge.calibration.text import BUILT_IN, HELD_OUT, Sample, cut_samples, read_text
from mlx_edge.errors import InvalidRequestError
from mlx_edge.models.config import ModelConfig
from mlx_edge.models.decoder import Layer
from mlx_edge.text import Tokenizer, load_tokenizer
from mlx_edge.weights import Checkpoint
from mlx_edge.weights.hub import find_model

MAX_WEIGHTS = 12  # of the linears in the table, those with the largest errors
MAX_CONTEXT = 60  # characters shown before a worst token
EMBED_ROWS = 4096  # of the embedding that are compared at once


@dataclass(frozen=True)
class WeightError:
    """How far one weight matrix of the second model is from the first one's."""

    name: str
    error: float  # |first - second| / |first|, Frobenius
    first_bits: float  # per value, scales counted
    second_bits: float


@dataclass(frozen=True)
class Diagnosis:
    """Everything that is known of the two; `lines` says it."""

    names: tuple[str, str]
    bits: tuple[float, float]  # per weight, over all tensors
    sample: Sample
    comparison: Comparison
    weights: tuple[WeightError, ...]  # in the order of the model; () for unlike models
    tokenizer: Tokenizer

    def lines(self) -> list[str]:
        """For a terminal."""
        parts = [self._summary(), self._layers(), self._weights(), self._worst()]
        return [line for part in parts if part for line in ["", *part]][1:]

    def _summary(self) -> list[str]:
        c = self.comparison
        share = c.other_perplexity / c.reference_perplexity - 1
        return [
            f"A  {self.names[0]}, {self.bits[0]:.2f} bits per weight",
            f"B  {self.names[1]}, {self.bits[1]:.2f} bits per weight",
            f"on {c.num_tokens} tokens of {self.sample.source} (sha256 {self.sample.sha256[:12]})",
            "",
            f"KL(A || B)         {c.kl_mean:.6f} nats/token, P99 {c.kl_p99:.4f}, largest {c.kl_max:.4f}",
            f"Top-1 agreement    {c.top1:.2%}",
            f"Top-{c.top_k} agreement    {c.topk:.2%}",
            f"Perplexity         A {c.reference_perplexity:.4f}, B {c.other_perplexity:.4f} ({share:+.2%})",
        ]

    def _layers(self) -> list[str]:
        c = self.comparison
        if not c.layer_errors:
            return ["Layers are not compared: the models differ in their number or width."]
        rows = [f"{'embedding':<12}{c.layer_errors[0]:>10.4%}"]
        widest = max(max(c.own_errors, default=0.0), 1e-12)
        for index, (after, own) in enumerate(zip(c.layer_errors[1:], c.own_errors, strict=True)):
            bar = "#" * round(24 * own / widest)
            rows.append(f"{f'layer {index}':<12}{after:>10.4%}{own:>10.4%}  {bar}".rstrip())
        title = "Hidden states: error after each layer, and what the layer alone adds to A's"
        return [title, f"{'':<12}{'so far':>10}{'its own':>10}", *rows]

    def _weights(self) -> list[str]:
        if not self.weights:
            return []
        worst = sorted(self.weights, key=lambda w: -w.error)[:MAX_WEIGHTS]
        width = max(len(weight.name) for weight in worst)
        of = (
            f", the {MAX_WEIGHTS} largest of {len(self.weights)}"
            if self.weights[MAX_WEIGHTS:]
            else ""
        )
        return [
            f"Weights: |A - B| / |A|{of}, and bits per value",
            *(
                f"{w.name:<{width}}  {w.error:>9.4%}  {w.first_bits:>6.2f} -> {w.second_bits:.2f}"
                for w in worst
            ),
        ]

    def _worst(self) -> list[str]:
        if not self.comparison.worst:
            return ["No token differs: the models say the same."]
        lines = ["Worst tokens: what the text says next, and what A and B would say"]
        for worst in self.comparison.worst:
            lines += self._describe(worst)
        return lines

    def _describe(self, worst: WorstToken) -> list[str]:
        context = _quote(self.tokenizer.decode(list(worst.context)), end=MAX_CONTEXT)
        after = "the row ends" if worst.target is None else self._token(worst.target)
        return [
            f"  KL {worst.kl:.3f}  row {worst.row}, token {worst.column}: {context} -> {after}",
            f"    A  {self._choices(worst.reference)}",
            f"    B  {self._choices(worst.other)}",
        ]

    def _choices(self, choices: tuple[Choice, ...]) -> str:
        return ", ".join(f"{self._token(c.token)} {c.probability:.1%}" for c in choices)

    def _token(self, token: int) -> str:
        return _quote(self.tokenizer.decode([token]) or str(self.tokenizer.id_to_token(token)))


def _quote(text: str, end: int | None = None) -> str:
    """A text in quotes on one line, its last `end` characters."""
    cut = text if end is None or len(text) <= end else "..." + text[-end:]
    return (
        '"' + cut.encode("unicode_escape").decode() + '"' if not cut.isprintable() else f'"{cut}"'
    )


def diagnose(
    first: str,
    second: str,
    *,
    text: str = BUILT_IN,
    num_rows: int = 16,
    length: int = 256,
    top_k: int = 5,
    plot: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Diagnosis:
    """Compare two models, each a folder, a hub id or a bundled one, on the held-out rows of a text; `plot` is a PNG.

    Raises: InvalidRequestError when their tokenizers differ, the text is too short, or there is nothing to plot with;
    what `find_model` and `ModelConfig` raise for a model that cannot be had.
    """
    if plot is not None:
        from mlx_edge.calibration.plot import check_plotting

        check_plotting(plot)
    folders = find_model(first), find_model(second)
    tokenizer = load_tokenizer(folders[0])
    check_same_vocabulary(tokenizer, load_tokenizer(folders[1]), (first, second))
    content, source = read_text(text)
    samples = cut_samples(
        tokenizer, content, source, num_rows=(HELD_OUT - 1) * num_rows, length=length
    )
    with ExitStack() as stack:
        models = [_open(folder, stack) for folder in folders]
        watch = _WeightWatch(models[0], models[1])
        comparison = compare(
            models[0],
            models[1],
            samples.held_out.rows,
            top_k=top_k,
            with_own_errors=True,
            watch_layers=watch.see,
            on_progress=on_progress,
        )
        bits = [count_weights(m.checkpoint, m.config).bits_per_weight for m in models]
        weights = watch.finish() if comparison.layer_errors else ()
    found = Diagnosis(
        (first, second), (bits[0], bits[1]), samples.held_out, comparison, weights, tokenizer
    )
    if plot is not None:
        from mlx_edge.calibration.plot import draw_diagnosis

        draw_diagnosis(found, plot)
    return found


def _open(folder: Path, stack: ExitStack) -> LayerwiseModel:
    checkpoint = stack.enter_context(Checkpoint.open(folder))
    return LayerwiseModel(checkpoint, ModelConfig.from_folder(folder))


def check_same_vocabulary(first: Tokenizer, second: Tokenizer, names: tuple[str, str]) -> None:
    """Raises InvalidRequestError unless every id that both have means the same token to both."""
    for index in range(min(first.vocab_size, second.vocab_size)):
        ours, theirs = first.id_to_token(index), second.id_to_token(index)
        if ours != theirs:
            raise InvalidRequestError(
                f"token {index} is {ours!r} to {names[0]}, and {theirs!r} to {names[1]}; only models with the same "
                "vocabulary can be compared: choose two of one family"
            )


class _WeightWatch:
    """Compares the weights of each pair of layers that goes by."""

    def __init__(self, first: LayerwiseModel, second: LayerwiseModel) -> None:
        self._models = first, second
        self._errors: list[WeightError] = []

    def see(self, index: int, first: Layer, second: Layer) -> None:
        """The linears of a layer; of another shape they have no error."""
        theirs = self._models[1].find_linears(second, index)
        for name, linear in self._models[0].find_linears(first, index).items():
            other = theirs.get(name)
            if other is not None and other.shape == linear.shape:
                self._add(name, [(_values(linear), _values(other))])

    def finish(self) -> tuple[WeightError, ...]:
        """With the embedding before and the head behind them, if it is another matrix."""
        layers, self._errors = self._errors, []
        first, second = self._models
        family, size = first.config.family, first.config.vocab_size
        if size == second.config.vocab_size:
            starts = range(0, size, EMBED_ROWS)
            ids = (mx.arange(start, min(size, start + EMBED_ROWS))[None] for start in starts)
            self._add(family.embedding, [(first.embed(i)[0], second.embed(i)[0]) for i in ids])
            self._errors += layers
            if not first.is_tied:
                heads = [_values(model.read_head().projection) for model in self._models]
                self._add(family.head, [(heads[0], heads[1])])
            return tuple(self._errors)
        return tuple(layers)

    def _add(self, name: str, pairs: list[tuple[mx.array, mx.array]]) -> None:
        squares = np.zeros(2)
        for ours, theirs in pairs:
            squares += [_sum_squares(ours - theirs), _sum_squares(ours)]
        error = float(np.sqrt(squares[0] / max(squares[1], 1e-300)))
        bits = [_bits(model, name, sum(a.size for a, _ in pairs)) for model in self._models]
        self._errors.append(WeightError(name, error, *bits))


def _values(linear: ops.Linear) -> mx.array:
    return as_dense(linear).weight


def _sum_squares(array: mx.array) -> float:
    """Of a matrix: rows in float32, over them in float64."""
    return float(np.asarray((array * array).sum(axis=-1)).sum(dtype=np.float64))


def _bits(model: LayerwiseModel, name: str, num_values: int) -> float:
    names = model.checkpoint.names()
    parts = [f"{name}.{part}" for part in ("weight", "scales", "biases")]
    num_bytes = sum(model.checkpoint.entry(part).num_bytes for part in parts if part in names)
    return 8 * num_bytes / num_values
