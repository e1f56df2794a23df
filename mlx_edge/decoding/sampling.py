"""Samplers: from log-probabilities to a token, as plain callables in mlx-lm's form.

Order as users of mlx-lm know it: top-p, then min-p, then top-k, each on the untempered distribution, and
the temperature last. All filters keep whole rows (B, V) and set what they drop to -inf.
"""

import math
from collections.abc import Callable

import mlx.core as mx

from mlx_edge.errors import InvalidRequestError

Sampler = Callable[[mx.array], mx.array]  # log-probabilities (B, V) -> tokens (B,)


def make_sampler(
    temp: float = 0.0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    min_tokens_to_keep: int = 1,
    top_k: int = 0,
    *,
    seed: int | None = None,
) -> Sampler:
    """A sampler; greedy at temperature 0.

    Args: `top_p` keeps the likeliest tokens of that total probability, `min_p` those at least that likely
    beside the likeliest (never fewer than `min_tokens_to_keep`), `top_k` that many; 1.0, 0.0 and 0 are off.
    The same `seed` gives the same tokens; without one, MLX's global random state is used.

    Raises: InvalidRequestError for a value outside its range.
    """
    _check("temp", temp, math.isfinite(temp) and temp >= 0, "a finite number from 0")
    _check("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1")
    _check("min_p", min_p, 0 <= min_p <= 1, "from 0 to 1")
    _check("min_tokens_to_keep", min_tokens_to_keep, min_tokens_to_keep >= 1, "at least 1")
    _check("top_k", top_k, top_k >= 0, "0 (off) or more")
    if temp == 0:
        return lambda logprobs: mx.argmax(logprobs, axis=-1)

    filters: list[Callable[[mx.array], mx.array]] = []
    if top_p < 1:
        filters.append(lambda logprobs: keep_top_p(logprobs, top_p))
    if min_p > 0:
        filters.append(lambda logprobs: keep_min_p(logprobs, min_p, min_tokens_to_keep))
    if top_k > 0:
        filters.append(lambda logprobs: keep_top_k(logprobs, top_k))
    draw = _make_draw(seed)

    def sample(logprobs: mx.array) -> mx.array:
        for keep in filters:
            logprobs = keep(logprobs)
        return draw(logprobs * (1 / temp))

    return sample


def _make_draw(seed: int | None) -> Sampler:
    """Draw from unnormalised log-probabilities, with a random state of its own when seeded."""
    if seed is None:
        return mx.random.categorical
    _check("seed", seed, 0 <= seed < 1 << 64, "from 0 to 2^64 - 1")
    key = mx.random.key(seed)

    def draw(logits: mx.array) -> mx.array:
        nonlocal key
        key, used = mx.random.split(key)
        return mx.random.categorical(logits, key=used)

    return draw


def keep_top_p(logprobs: mx.array, top_p: float) -> mx.array:
    """Nucleus sampling (Holtzman et al. 2020): the fewest likeliest tokens that reach top_p together."""
    order = mx.argsort(-logprobs, axis=-1)
    ranked = mx.exp(mx.take_along_axis(logprobs, order, axis=-1).astype(mx.float32))
    before = mx.cumsum(ranked, axis=-1) - ranked  # what the likelier ones have already
    kept = mx.put_along_axis(mx.zeros(logprobs.shape, mx.bool_), order, before < top_p, axis=-1)
    return _drop(logprobs, kept)


def keep_min_p(logprobs: mx.array, min_p: float, min_tokens_to_keep: int = 1) -> mx.array:
    """Tokens at least min_p times as likely as the likeliest (Nguyen et al. 2024)."""
    kept = logprobs >= logprobs.max(axis=-1, keepdims=True) + math.log(min_p)
    return _drop(logprobs, kept | _is_among_top(logprobs, min_tokens_to_keep))


def keep_top_k(logprobs: mx.array, top_k: int) -> mx.array:
    """The top_k likeliest tokens; of equals, those with the lowest numbers."""
    return _drop(logprobs, _is_among_top(logprobs, top_k))


def _is_among_top(logprobs: mx.array, count: int) -> mx.array:
    if count >= logprobs.shape[-1]:
        return mx.ones(logprobs.shape, mx.bool_)
    best = mx.argsort(-logprobs, axis=-1)[..., :count]
    return mx.put_along_axis(mx.zeros(logprobs.shape, mx.bool_), best, mx.array(True), axis=-1)


def _drop(logprobs: mx.array, kept: mx.array) -> mx.array:
    return mx.where(kept, logprobs, mx.array(-mx.inf, logprobs.dtype))


def _check(name: str, value: float, is_good: bool, expected: str) -> None:
    if not is_good:
        raise InvalidRequestError(f"{name} is {value}, expected {expected}")
