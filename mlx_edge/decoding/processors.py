"""Logits processors: what a user asks to make more or less likely, as plain callables in mlx-lm's form.

Each takes the int32 tokens so far (L,), prompt included, and the logits (B, V), and returns new logits of the
same shape and dtype; all stay on the device, so that the next step can be in flight. Knows neither samplers
nor grammars.
"""

import math
from collections.abc import Callable, Mapping

import mlx.core as mx

from mlx_edge.errors import InvalidRequestError

LogitsProcessor = Callable[[mx.array, mx.array], mx.array]


def make_logits_processors(
    logit_bias: Mapping[int, float] | None = None,
    repetition_penalty: float | None = None,
    repetition_context_size: int = 20,
    presence_penalty: float | None = None,
    presence_context_size: int = 20,
    frequency_penalty: float | None = None,
    frequency_context_size: int = 20,
) -> list[LogitsProcessor]:
    """The processors that were asked for, in mlx-lm's order: bias, repetition, presence, frequency.

    Args: `logit_bias` is added to the logits of its token ids. Each penalty looks at the last `*_context_size`
    tokens; None and 0 switch it off.

    Raises: InvalidRequestError for a value outside its range; when called, for a bias beyond the vocabulary.
    """
    processors: list[LogitsProcessor] = []
    if logit_bias:
        processors.append(_make_bias(logit_bias))
    penalties = (
        ("repetition", _penalize_repetition, repetition_penalty, repetition_context_size),
        ("presence", _penalize_presence, presence_penalty, presence_context_size),
        ("frequency", _penalize_frequency, frequency_penalty, frequency_context_size),
    )
    for name, penalize, penalty, context_size in penalties:
        _check_integer(f"{name}_context_size", context_size, at_least=1)
        if penalty is None:
            continue
        _check_number(f"{name}_penalty", penalty)
        if name == "repetition" and penalty < 0:
            raise InvalidRequestError(
                f"repetition_penalty is {penalty}, expected above 0, or 0 for none"
            )
        if penalty:
            processors.append(_make_penalty(penalize, penalty, context_size))
    return processors


def _make_bias(bias: Mapping[int, float]) -> LogitsProcessor:
    for token, value in bias.items():
        _check_integer("a token of logit_bias", token, at_least=0)
        _check_number(f"the logit_bias of token {token}", value)
    highest = max(bias)
    if highest >= 1 << 31:
        raise InvalidRequestError(f"logit_bias names token {highest}, expected 32-bit integers")
    tokens = mx.array(list(bias), dtype=mx.int32)
    values = mx.array(list(bias.values()), dtype=mx.float32)

    def process(_: mx.array, logits: mx.array) -> mx.array:
        if highest >= logits.shape[-1]:  # beyond the array MLX would write anywhere
            raise InvalidRequestError(
                f"logit_bias names token {highest}; the vocabulary has {logits.shape[-1]}"
            )
        return logits.at[:, tokens].add(values.astype(logits.dtype))

    return process


def _make_penalty(
    penalize: Callable[[mx.array, mx.array, float], mx.array], penalty: float, context_size: int
) -> LogitsProcessor:
    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        recent = tokens[-context_size:]
        return penalize(recent, logits, penalty) if recent.size else logits

    return process


def _penalize_repetition(recent: mx.array, logits: mx.array, penalty: float) -> mx.array:
    """What occurred has its logit divided, or multiplied where negative (CTRL, arXiv:1909.05858, section 4.1)."""
    found = mx.take(logits, recent, axis=-1)
    return _put(recent, logits, mx.where(found < 0, found * penalty, found / penalty))


def _penalize_presence(recent: mx.array, logits: mx.array, penalty: float) -> mx.array:
    """Subtract the penalty once from what occurred: mu_j - [c_j > 0] * penalty, as OpenAI's API defines it."""
    return _put(recent, logits, mx.take(logits, recent, axis=-1) - penalty)


def _penalize_frequency(recent: mx.array, logits: mx.array, penalty: float) -> mx.array:
    """Subtract the penalty per occurrence: mu_j - c_j * penalty, as OpenAI's API defines it."""
    return logits.at[:, recent].subtract(mx.array(penalty, logits.dtype))


def _put(recent: mx.array, logits: mx.array, values: mx.array) -> mx.array:
    """Write values (B, L) at the tokens (L,); a token that stands there twice has the same value twice."""
    where = mx.broadcast_to(recent[None], values.shape)
    return mx.put_along_axis(logits, where, values, axis=-1)


def _check_number(name: str, value: object) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):  # type: ignore[arg-type]
        raise InvalidRequestError(f"{name} is {value!r}, expected a finite number")


def _check_integer(name: str, value: object, *, at_least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise InvalidRequestError(f"{name} is {value!r}, expected an integer from {at_least}")
