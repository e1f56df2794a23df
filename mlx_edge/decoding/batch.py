"""Many prompts at once: rows of different lengths in one batch, each with the tokens it would have alone.

All rows step together until the last one ends; a row that has ended stores nothing more. Works on token ids
and gives text at the end; requests that come and go are the engine's business.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_edge import ops
from mlx_edge.cache import AnyKVCache
from mlx_edge.decoding.loop import PREFILL_STEP_SIZE, allowed_tokens
from mlx_edge.decoding.sampling import Sampler, make_sampler
from mlx_edge.decoding.stream import Prompt, encode_prompt
from mlx_edge.errors import InvalidRequestError
from mlx_edge.models.decoder import Decoder
from mlx_edge.models.interface import refuse_places
from mlx_edge.runtime import peak_memory_gb
from mlx_edge.text import Tokenizer


@dataclass(frozen=True)
class BatchStats:
    """What a batch took; tokens of all rows together, times in seconds, memory in 10^9 bytes."""

    prompt_tokens: int
    prompt_time: float
    generation_tokens: int
    generation_time: float
    peak_memory: float

    @property
    def prompt_tps(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / max(self.prompt_time, 1e-9)

    @property
    def generation_tps(self) -> float:
        """Generated tokens per second, all rows together."""
        return self.generation_tokens / max(self.generation_time, 1e-9)


@dataclass(frozen=True)
class BatchResponse:
    """The text and the tokens of each prompt, in their order; tokens without the one that ended a row."""

    texts: list[str]
    token_ids: list[list[int]]
    stats: BatchStats


def batch_generate(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    max_tokens: int | Sequence[int] = 128,
    *,
    sampler: Sampler | Sequence[Sampler] | None = None,
    prefill_step_size: int = PREFILL_STEP_SIZE,
    max_kv_size: int | None = None,
) -> BatchResponse:
    """Generate for every prompt, each until its end token, its `max_tokens` or the end of the context.

    `sampler` is one for all rows, or one per row: the same tokens as alone need one each, unless it is greedy.
    Prompts are of text alone: for images there is the engine.

    Raises: InvalidRequestError for no prompts, or for one that could not be served alone, or has a place for an image.
    """
    if not prompts:
        raise InvalidRequestError("no prompts were given; a batch needs one or more")
    rows = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    for row in rows:
        refuse_places(model, row)
    cache = model.make_cache(max_kv_size=max_kv_size)
    wanted = [max_tokens] * len(rows) if isinstance(max_tokens, int) else list(max_tokens)
    limits = [allowed_tokens(r, model, cache, n) for r, n in zip(rows, wanted, strict=True)]
    for layer in cache:
        layer.reserve(max(r.size + n for r, n in zip(rows, limits, strict=True)))
    start = time.perf_counter()
    tokens = _prefill(rows, model, cache, prefill_step_size)
    prompt_time = time.perf_counter() - start
    start = time.perf_counter()
    outputs = _decode(tokens, model, cache, limits, tokenizer.eos_token_ids, _per_row(sampler))
    stats = BatchStats(
        prompt_tokens=sum(row.size for row in rows),
        prompt_time=prompt_time,
        generation_tokens=sum(map(len, outputs)),
        generation_time=time.perf_counter() - start,
        peak_memory=peak_memory_gb(),
    )
    return BatchResponse([tokenizer.decode(output) for output in outputs], outputs, stats)


def _prefill(
    rows: Sequence[mx.array], model: Decoder, cache: Sequence[AnyKVCache], step_size: int
) -> mx.array:
    """Store all but the last token of every row; return those last ones (B,)."""
    longest = max(row.size for row in rows) - 1
    padded = mx.stack([mx.pad(row[:-1], (0, longest - row.size + 1)) for row in rows])
    for begin in range(0, longest, step_size):
        lengths = [min(max(row.size - 1 - begin, 0), step_size) for row in rows]
        chunk = padded[:, begin : begin + step_size]
        model(chunk, cache, lengths=[min(n, chunk.shape[1]) for n in lengths])
        mx.eval([array for layer in cache for array in layer.arrays])
    return mx.stack([row[-1] for row in rows])


def _decode(
    tokens: mx.array,
    model: Decoder,
    cache: Sequence[AnyKVCache],
    limits: Sequence[int],
    ends: frozenset[int],
    sampler: Sampler,
) -> list[list[int]]:
    """Step all rows, the next step in flight, until each has ended; the tokens of each row."""
    outputs: list[list[int]] = [[] for _ in limits]
    is_active = [True] * len(limits)

    def step(tokens: mx.array) -> mx.array:
        logits = model(tokens[:, None], cache, lengths=[int(active) for active in is_active])[:, -1]
        found = sampler(ops.log_softmax(logits))
        mx.async_eval(found)  # type: ignore[no-untyped-call]
        return found

    following = step(tokens)
    for index in range(max(limits)):
        current = following
        # A row at its limit needs no further step; one that ends with `current` is found out too late for that.
        is_active = [a and index + 1 < limit for a, limit in zip(is_active, limits, strict=True)]
        running = [len(out) == index for out in outputs]
        if any(is_active):
            following = step(current)
        values: list[int] = current.tolist()  # type: ignore[assignment]
        for row, token in enumerate(values):
            if running[row] and token in ends:
                is_active[row] = False
            elif running[row] and index < limits[row]:
                outputs[row].append(token)
        if not any(is_active):
            break
    return outputs


def _per_row(sampler: Sampler | Sequence[Sampler] | None) -> Sampler:
    if sampler is None:
        return make_sampler()
    if callable(sampler):
        return sampler
    samplers = list(sampler)
    return lambda logprobs: mx.concatenate(
        [sample(logprobs[row : row + 1]) for row, sample in enumerate(samplers)]
    )
