"""The generation loop: prefill in chunks, then one token after another with the next step in flight.

Works on token ids only; text, stop strings and timing are `stream.py`'s. This loop is the oracle of the
batched engine: the same greedy tokens.
"""

from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx

from mlx_edge.cache import KVCache
from mlx_edge.decoding.sampling import Sampler, make_sampler
from mlx_edge.errors import InvalidRequestError
from mlx_edge.models.decoder import Decoder

LogitsProcessor = Callable[
    [mx.array, mx.array], mx.array
]  # (tokens so far, logits (1, V)) -> logits
PREFILL_STEP_SIZE = 2048
RESERVED = 8192  # positions: beyond the prompt, a cache is not allocated further ahead than this


def generate_step(
    prompt: mx.array,
    model: Decoder,
    *,
    max_tokens: int = 256,
    sampler: Sampler | None = None,
    logits_processors: Sequence[LogitsProcessor] = (),
    prompt_cache: Sequence[KVCache] | None = None,
    prefill_step_size: int = PREFILL_STEP_SIZE,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[int, mx.array]]:
    """Yield (token, log-probabilities (V,)) pairs that follow the int32 prompt (L,), at most max_tokens.

    Ends earlier only where the model's context ends. With a `prompt_cache` the prompt continues what it
    holds. `prompt_progress_callback` is told (positions done, positions in all) during the prefill.

    Raises: InvalidRequestError for an empty prompt, one beyond the context, or a token outside the vocabulary.
    """
    cache = model.make_cache() if prompt_cache is None else prompt_cache
    max_tokens = allowed_tokens(prompt, model, cache, max_tokens)
    _check_positive("prefill_step_size", prefill_step_size)
    for layer in cache:
        layer.reserve(layer.offset + prompt.size + min(max_tokens, RESERVED))
    sampler = sampler or make_sampler()
    seen = prompt if logits_processors else None

    def step(tokens: mx.array) -> tuple[mx.array, mx.array]:
        nonlocal seen
        logits = model(tokens[None], cache)[:, -1]  # (1, V)
        if seen is not None:
            for process in logits_processors:
                logits = process(seen, logits)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        token = sampler(logprobs)  # (1,)
        if seen is not None:
            seen = mx.concatenate([seen, token.astype(seen.dtype)])
        mx.async_eval(token, logprobs)  # type: ignore[no-untyped-call]
        return token, logprobs[0]

    rest = _prefill(prompt, model, cache, prefill_step_size, prompt_progress_callback)
    following = step(rest)
    for index in range(max_tokens):
        token, logprobs = following
        if index + 1 < max_tokens:
            following = step(token)
        value = token.item()
        if index == 0 and prompt_progress_callback is not None:
            prompt_progress_callback(prompt.size, prompt.size)
        assert isinstance(value, int)
        yield value, logprobs


def _prefill(
    prompt: mx.array,
    model: Decoder,
    cache: Sequence[KVCache],
    step_size: int,
    progress: Callable[[int, int], None] | None,
) -> mx.array:
    """Store all but the last chunk of the prompt; return that chunk, whose logits are wanted."""
    done = 0
    while prompt.size - done > step_size:
        if progress is not None:
            progress(done, prompt.size)
        model(prompt[None, done : done + step_size], cache)
        # Only what was stored is evaluated: the head of this chunk is never computed.
        mx.eval([array for layer in cache for array in layer.arrays])
        done += step_size
    if progress is not None:
        progress(done, prompt.size)
    return prompt[done:]


def allowed_tokens(
    prompt: mx.array, model: Decoder, cache: Sequence[KVCache], max_tokens: int
) -> int:
    """At most `max_tokens`, and what fits into the context after the prompt; the last one is not stored.

    Raises: InvalidRequestError for a prompt that cannot be served.
    """
    _check_positive("max_tokens", max_tokens)
    if prompt.ndim != 1 or prompt.size == 0:
        raise InvalidRequestError(
            f"the prompt has shape {prompt.shape}; expected one token or more"
        )
    lowest, highest = prompt.min().item(), prompt.max().item()
    if not 0 <= lowest <= highest < model.config.vocab_size:  # type: ignore[operator]
        raise InvalidRequestError(
            f"the prompt holds token {lowest if lowest < 0 else highest}; "  # type: ignore[operator]
            f"the vocabulary has {model.config.vocab_size}"
        )
    held = cache[0].offset + prompt.size
    context = model.config.context_size
    if held > context:
        raise InvalidRequestError(
            f"the prompt has {held} tokens, the model's context {context}; shorten the prompt"
        )
    return min(max_tokens, context - held + 1)


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise InvalidRequestError(f"{name} is {value}, expected at least 1")
