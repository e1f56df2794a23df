"""Samplers: from log-probabilities to a token, as plain callables in mlx-lm's form.

Order as users of mlx-lm know it: top-p, then min-p, XTC and top-k, each on the untempered distribution, and
the temperature last. All filters keep whole rows (B, V) and set what they drop to -inf.
"""

import math
import random
from collections.abc import Callable, Sequence

import mlx.core as mx

from mlx_edge import ops
from mlx_edge.errors import InvalidRequestError

Sampler = Callable[[mx.array], mx.array]  # log-probabilities (B, V) -> tokens (B,)


def make_sampler(
    temp: float = 0.0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    min_tokens_to_keep: int = 1,
    top_k: int = 0,
    xtc_probability: float = 0.0,
    xtc_threshold: float = 0.1,
    xtc_special_tokens: Sequence[int] = (),
    *,
    seed: int | None = None,
) -> Sampler:
    """A sampler; greedy at temperature 0.

    Args: `top_p` keeps the likeliest tokens of that total probability, `min_p` those at least that likely
    beside the likeliest (never fewer than `min_tokens_to_keep`), `top_k` that many; 1.0, 0.0 and 0 are off.
    With `xtc_probability` (0.0 is off) a step drops every token above `xtc_threshold` but the least likely of
    them, and never one of `xtc_special_tokens` (give the end-of-sequence tokens and the newline here).
    The same `seed` gives the same tokens, in any thread; a seeded sampler goes on where it stopped. Without one
    no two samplers draw alike. MLX's own random state is not used: each thread has one, and all begin the same.

    Raises: InvalidRequestError for a value outside its range.
    """
    _check("temp", temp, math.isfinite(temp) and temp >= 0, "a finite number from 0")
    _check("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1")
    _check("min_p", min_p, 0 <= min_p <= 1, "from 0 to 1")
    _check("min_tokens_to_keep", min_tokens_to_keep, min_tokens_to_keep >= 1, "at least 1")
    _check("top_k", top_k, top_k >= 0, "0 (off) or more")
    _check("xtc_probability", xtc_probability, 0 <= xtc_probability <= 1, "from 0 to 1")
    _check("xtc_threshold", xtc_threshold, 0 <= xtc_threshold <= 0.5, "from 0 to 0.5")
    spared = list(xtc_special_tokens)
    for token in spared:
        _check("a token of xtc_special_tokens", token, 0 <= token < 1 << 31, "a token id")
    if temp == 0:
        return ops.argmax

    next_key = _make_keys(seed)
    filters: list[Callable[[mx.array], mx.array]] = []
    if top_p < 1:
        filters.append(lambda logprobs: keep_top_p(logprobs, top_p))
    if min_p > 0:
        filters.append(lambda logprobs: keep_min_p(logprobs, min_p, min_tokens_to_keep))
    if xtc_probability > 0:
        filters.append(
            lambda logprobs: _exclude_sometimes(
                logprobs, xtc_probability, xtc_threshold, spared, next_key()
            )
        )
    if top_k > 0:
        filters.append(lambda logprobs: keep_top_k(logprobs, top_k))

    def sample(logprobs: mx.array) -> mx.array:
        for keep in filters:
            logprobs = keep(logprobs)
        return mx.random.categorical(logprobs * (1 / temp), key=next_key())

    return sample


def _make_keys(seed: int | None) -> Callable[[], mx.array]:
    """The keys of the draws, from a stream of their own; without a seed the operating system gives one.

    They are made on the host: a key split off another is a lazy array, which its own thread alone can compute.
    """
    if seed is not None:
        _check("seed", seed, 0 <= seed < 1 << 64, "from 0 to 2^64 - 1")
    source = random.Random(seed)
    return lambda: mx.random.key(source.getrandbits(64))


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


def exclude_top_choices(
    logprobs: mx.array, threshold: float, special_tokens: Sequence[int] = ()
) -> mx.array:
    """XTC (p-e-w, text-generation-webui #6335): of the tokens above `threshold` only the least likely stays.

    Probabilities are those of what earlier filters left. Equals of the least likely stay with it, so do
    `special_tokens`; where fewer than two tokens are above the threshold, nothing is dropped.

    Raises: InvalidRequestError for a special token beyond the vocabulary.
    """
    probabilities = mx.softmax(logprobs, axis=-1)
    above = mx.where(probabilities > threshold, probabilities, mx.inf)
    kept = probabilities <= above.min(axis=-1, keepdims=True)
    if special_tokens:
        if max(special_tokens) >= logprobs.shape[-1]:  # beyond the array MLX would write anywhere
            raise InvalidRequestError(
                f"xtc_special_tokens names token {max(special_tokens)}; "
                f"the vocabulary has {logprobs.shape[-1]}"
            )
        kept[..., mx.array(list(special_tokens), dtype=mx.int32)] = True
    return _drop(logprobs, kept)


def _exclude_sometimes(
    logprobs: mx.array,
    probability: float,
    threshold: float,
    special_tokens: Sequence[int],
    key: mx.array,
) -> mx.array:
    """XTC in each row with this probability; the rows of a batch draw each for itself."""
    is_used = mx.random.uniform(shape=(*logprobs.shape[:-1], 1), key=key) < probability
    return mx.where(is_used, exclude_top_choices(logprobs, threshold, special_tokens), logprobs)


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
