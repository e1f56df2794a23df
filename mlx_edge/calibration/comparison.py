"""Two models on the same text: how far the second one's predictions are from the first one's.

Both go through the text side by side, a layer of each in memory; then the logits, some tokens at a time. Numbers are
float32, their sums float64. Knows no tokenizer and no file: tokens in, figures out.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_edge import ops
from mlx_edge.calibration.layerwise import LayerwiseModel
from mlx_edge.errors import InvalidRequestError, ModelFormatError
from mlx_edge.models.decoder import Layer

BLOCK_LOGITS = 1 << 23  # that are in memory at once, of each model
PIECE_LOGITS = 1 << 19  # that are measured at once: they stay in a processor's cache
CONTEXT_TOKENS = 24  # kept before a worst token
NUM_CHOICES = 2  # of each model, kept for a worst token

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Logits = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
Tokens = np.ndarray[tuple[int, ...], np.dtype[np.integer[Any]]]
LayerWatcher = Callable[[int, Layer, Layer], None]  # index, the reference's layer, the other's


@dataclass(frozen=True)
class Choice:
    """A token that a model may say next, and its probability."""

    token: int
    probability: float


@dataclass(frozen=True)
class WorstToken:
    """A place where the predictions are far apart: what each model would say after `context`."""

    row: int
    column: int  # of the last token of the context
    kl: float  # nats
    context: tuple[int, ...]
    target: int | None  # what the text says next; None at the end of its row
    reference: tuple[Choice, ...]  # likeliest first
    other: tuple[Choice, ...]


@dataclass(frozen=True)
class Comparison:
    """How far `other` is from `reference`, over all tokens of the text."""

    num_tokens: int
    kl_mean: float  # KL(reference || other), nats per token
    kl_p99: float
    kl_max: float
    top1: float  # share of tokens after which both would say the same
    topk: float  # share of the reference's `top_k` likeliest that are among the other's
    top_k: int
    reference_perplexity: float
    other_perplexity: float
    layer_errors: tuple[
        float, ...
    ]  # of hidden states: embedded, then after each layer; () for unlike models
    own_errors: tuple[
        float, ...
    ]  # of each layer given the reference's hidden states; () unless asked for
    worst: tuple[WorstToken, ...]
    kl: Floats = field(compare=False, repr=False)  # (R, L), of every token


def compare(
    reference: LayerwiseModel,
    other: LayerwiseModel,
    rows: mx.array,
    *,
    top_k: int = 5,
    num_worst: int = 10,
    with_own_errors: bool = False,
    watch_layers: LayerWatcher | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Compare the predictions after every token of rows (R, L) int32, and the perplexity of the tokens that follow.

    An error of hidden states is the mean over tokens of |difference| / |reference|, so that the few tokens with huge
    states do not hide the others. `with_own_errors` also runs each layer of `other` on the reference's states: which
    layer does the damage, and which passes it on; it costs half as much again. `watch_layers` sees each pair of layers.
    Where vocabularies differ in length, the tokens that only one has are left out. `on_progress` hears steps
    done, of all.

    Raises: InvalidRequestError for tokens that a model does not have and for a top_k beyond the vocabulary;
    ModelFormatError when a model's numbers are not finite.
    """
    vocab_size = min(reference.config.vocab_size, other.config.vocab_size)
    if not 1 <= top_k <= vocab_size:
        raise InvalidRequestError(
            f"top_k is {top_k}, expected 1 to {vocab_size}, the vocabulary's size"
        )
    if rows.shape[1] < 2 or int(rows.max()) >= vocab_size or int(rows.min()) < 0:
        raise InvalidRequestError(
            f"rows of {rows.shape[1]} tokens from {int(rows.min())} to {int(rows.max())}; expected at least 2 a row, "
            f"below {vocab_size}: compare models of one vocabulary"
        )
    block = max(1, BLOCK_LOGITS // vocab_size)
    steps = _Steps(reference.num_layers - (-rows.size // block), on_progress)
    states = _run_layers(reference, other, rows, with_own_errors, watch_layers, steps)
    measures = _Measures(rows, top_k, num_worst)
    for start, of_reference, of_other in _read_logits(reference, other, states, block, steps):
        measures.add(start, of_reference, of_other)
    return measures.finish(states.errors, states.own_errors)


@dataclass
class _Steps:
    total: int
    on_progress: Callable[[int, int], None] | None
    done: int = 0

    def advance(self) -> None:
        self.done += 1
        if self.on_progress is not None:
            self.on_progress(self.done, self.total)


@dataclass
class _States:
    """Hidden states (R, L, E) of both models, and how far apart they have been so far."""

    reference: mx.array
    other: mx.array
    errors: tuple[float, ...]
    own_errors: tuple[float, ...]


def _run_layers(
    reference: LayerwiseModel,
    other: LayerwiseModel,
    rows: mx.array,
    with_own_errors: bool,
    watch_layers: LayerWatcher | None,
    steps: _Steps,
) -> _States:
    shapes = [(m.num_layers, m.config.hidden_size) for m in (reference, other)]
    if shapes[0] != shapes[1]:
        ours = reference.run(rows, lambda _index: steps.advance())
        return _States(ours, other.run(rows), (), ())
    ours, theirs = reference.embed(rows), other.embed(rows)
    errors, own_errors = [relative_error(ours, theirs)], []
    for index in range(reference.num_layers):
        layer, their_layer = reference.read_layer(index), other.read_layer(index)
        after = reference.run_layer(layer, index, ours)
        if with_own_errors:
            own_errors.append(relative_error(after, other.run_layer(their_layer, index, ours)))
        ours, theirs = after, other.run_layer(their_layer, index, theirs)
        errors.append(relative_error(ours, theirs))
        if watch_layers is not None:
            watch_layers(index, layer, their_layer)
        del layer, their_layer  # before the next two are read
        steps.advance()
    return _States(ours, theirs, tuple(errors), tuple(own_errors))


def relative_error(reference: mx.array, other: mx.array) -> float:
    """Mean over all vectors (..., E) of |reference - other| / |reference|."""
    lengths = np.asarray(mx.linalg.norm(reference, axis=-1)).astype(np.float64)
    differences = np.asarray(mx.linalg.norm(reference - other, axis=-1))
    return float(np.mean(differences / np.maximum(lengths, 1e-30)))


def _read_logits(
    reference: LayerwiseModel, other: LayerwiseModel, states: _States, block: int, steps: _Steps
) -> Iterator[tuple[int, Logits, Logits]]:
    """The first token of a piece, and the logits (T, V) float32 of both models for it."""
    heads = reference.read_head(), other.read_head()
    flat = [x.reshape(1, -1, x.shape[-1]) for x in (states.reference, states.other)]
    vocab_size = min(reference.config.vocab_size, other.config.vocab_size)
    piece = max(1, PIECE_LOGITS // vocab_size)
    for start in range(0, flat[0].shape[1], block):
        logits = []
        for head, hidden, name in zip(heads, flat, ("reference", "other model"), strict=True):
            with ops.reference():
                both = ops.head(hidden[:, start : start + block], head)[0, :, :vocab_size]
            logits.append(np.asarray(both))
            if not np.isfinite(logits[-1].sum()):
                raise ModelFormatError(
                    f"the {name}'s logits hold NaN or infinity, expected numbers; its weights are broken, or its "
                    "scales left the range of their dtype: convert it again with --dtype bfloat16 or float32"
                )
        for begin in range(0, len(logits[0]), piece):
            end = begin + piece
            yield start + begin, logits[0][begin:end], logits[1][begin:end]
        steps.advance()


@dataclass(frozen=True)
class _Distribution:
    """What a model says may follow: log-probabilities (T, V) float32, and what the logits were reduced by."""

    logs: Logits
    shifted: Logits  # the largest is 0
    log_total: Floats  # (T,)

    @staticmethod
    def of(logits: Logits) -> "_Distribution":
        shifted = logits - logits.max(axis=-1, keepdims=True)
        log_total = np.log(np.exp(shifted).sum(axis=-1, dtype=np.float64))
        return _Distribution(shifted - log_total[:, None].astype(np.float32), shifted, log_total)

    def surprise(self, targets: Tokens) -> Floats:
        """-log p (T,) of the tokens that follow."""
        found: Floats = self.log_total - self.shifted[np.arange(len(targets)), targets]
        return found

    def likeliest(self, count: int) -> Tokens:
        """The `count` likeliest tokens of each place (T, count), in no order."""
        return np.argpartition(-self.logs, count - 1, axis=-1)[:, :count]

    def choices(self, place: int) -> tuple[Choice, ...]:
        """The likeliest tokens of one place, in order."""
        logs = self.logs[place]
        best = np.argsort(-logs, kind="stable")[:NUM_CHOICES]
        return tuple(Choice(int(token), float(np.exp(logs[token]))) for token in best)


def kl_divergence(reference: Logits, other: Logits) -> Floats:
    """KL(reference || other) in nats (T,) of log-probabilities (T, V) float32.

    Sums p * (exp(-d) - 1 + d) with d = log p - log q in place of p * d: the same, as both distributions sum to 1, but
    no term is negative, equal distributions give exactly 0, and rounded normalizers cancel to the second order.
    """
    d = reference - other
    p = np.exp(reference)
    series = (
        d * d * (1 / 2 - d * (1 / 6 - d * (1 / 24 - d / 120)))
    )  # near 0, where the rest cancels
    terms = np.where(np.abs(d) < 0.1, p * series, np.exp(other) - p + p * d)
    total: Floats = np.maximum(terms, 0).sum(axis=-1, dtype=np.float64)
    return total


class _Measures:
    """Gathers blocks of logits into figures."""

    def __init__(self, rows: mx.array, top_k: int, num_worst: int) -> None:
        self._rows = np.asarray(rows)
        self._flat = self._rows.reshape(-1)
        self._top_k, self._num_worst = top_k, num_worst
        self._kl = np.zeros(rows.size)
        self._same_first = self._same_top = 0
        self._surprise = np.zeros(2)
        self._worst: list[WorstToken] = []

    def add(self, start: int, of_reference: Logits, of_other: Logits) -> None:
        """Logits (T, V) of both models after the tokens `start` and following."""
        both = _Distribution.of(of_reference), _Distribution.of(of_other)
        places = np.arange(start, start + of_reference.shape[0])
        kl = kl_divergence(both[0].logs, both[1].logs)
        self._kl[places] = kl
        self._same_first += int((of_reference.argmax(-1) == of_other.argmax(-1)).sum())
        top, their_top = (x.likeliest(self._top_k) for x in both)
        self._same_top += int((top[:, :, None] == their_top[:, None, :]).sum())
        width = self._rows.shape[1]
        has_next = places % width != width - 1
        following = self._flat[np.minimum(places + 1, self._kl.size - 1)]
        for index, distribution in enumerate(both):
            self._surprise[index] += distribution.surprise(following)[has_next].sum()
        self._keep_worst(start, kl, *both)

    def _keep_worst(
        self, start: int, kl: Floats, reference: _Distribution, other: _Distribution
    ) -> None:
        width = self._rows.shape[1]
        for place in np.argsort(-kl, kind="stable")[: self._num_worst]:
            is_full = len(self._worst) >= self._num_worst
            if kl[place] <= 0 or (is_full and kl[place] <= self._worst[-1].kl):
                break
            row, column = divmod(start + int(place), width)
            tokens = self._rows[row]
            worst = WorstToken(
                row,
                column,
                float(kl[place]),
                tuple(map(int, tokens[max(0, column + 1 - CONTEXT_TOKENS) : column + 1])),
                int(tokens[column + 1]) if column + 1 < width else None,
                reference.choices(int(place)),
                other.choices(int(place)),
            )
            self._worst = sorted([*self._worst, worst], key=lambda w: -w.kl)[: self._num_worst]

    def finish(self, errors: tuple[float, ...], own_errors: tuple[float, ...]) -> Comparison:
        """The figures over all blocks."""
        num_tokens = self._kl.size
        perplexity = np.exp(self._surprise / (num_tokens - len(self._rows)))
        return Comparison(
            num_tokens=num_tokens,
            kl_mean=float(self._kl.mean()),
            kl_p99=float(np.quantile(self._kl, 0.99)),
            kl_max=float(self._kl.max()),
            top1=self._same_first / num_tokens,
            topk=self._same_top / (num_tokens * self._top_k),
            top_k=self._top_k,
            reference_perplexity=float(perplexity[0]),
            other_perplexity=float(perplexity[1]),
            layer_errors=errors,
            own_errors=own_errors,
            worst=tuple(self._worst),
            kl=self._kl.reshape(self._rows.shape),
        )
