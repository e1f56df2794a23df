"""Trials: the same generation measured again and again; what `python -m mlx_edge.benchmark` runs.

Random tokens, greedy, no end token, so that every trial does the same work. A trial fills a new cache with `depth`
tokens, which is not timed; then the time to first token runs from the prompt to the first token on the host, and the
time per output token is the time of the others, divided by how many they are. One sequence runs through the loop that
`generate` uses. Knows no flags and prints nothing.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_edge import ops
from mlx_edge.cache import AnyKVCache
from mlx_edge.decoding.loop import PREFILL_STEP_SIZE, generate_step
from mlx_edge.errors import InvalidRequestError
from mlx_edge.models.decoder import Decoder, find_weights

SEED = 0


@dataclass(frozen=True)
class Plan:
    """What every trial does; lengths in tokens, of every row of the batch.

    Raises: InvalidRequestError for less than one token of prompt, two to generate and one row.
    """

    prompt_tokens: int
    generation_tokens: int
    depth: int = 0
    batch_size: int = 1

    def __post_init__(self) -> None:
        least = {"prompt_tokens": 1, "generation_tokens": 2, "depth": 0, "batch_size": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise InvalidRequestError(
                    f"{name} is {getattr(self, name)}, expected at least {low}"
                )

    def check_fits(self, context_size: int) -> None:
        """Raise InvalidRequestError when the tokens are more than the model's context."""
        total = self.depth + self.prompt_tokens + self.generation_tokens
        if total > context_size:
            raise InvalidRequestError(
                f"{self.depth} tokens of depth, {self.prompt_tokens} of prompt and {self.generation_tokens} "
                f"to generate are {total}, the model's context is {context_size}; take fewer"
            )


@dataclass(frozen=True)
class Trial:
    """One measurement; tokens per second of all rows together, memory in 10^9 bytes."""

    prompt_tps: float
    generation_tps: float
    ttft_ms: float  # to first token
    tpot_ms: float  # per output token after the first
    total_s: float
    peak_memory: float  # MLX's


class Trials:
    """A model and the work to be measured."""

    def __init__(
        self,
        model: Decoder,
        plan: Plan,
        make_cache: Callable[[], list[AnyKVCache]],
        *,
        prefill_step_size: int = PREFILL_STEP_SIZE,
    ) -> None:
        """Draws the tokens. Raises: InvalidRequestError for a plan beyond the model's context."""
        plan.check_fits(model.config.context_size)
        self.model, self.plan = model, plan
        self._make_cache, self._step_size = make_cache, prefill_step_size
        shape = (plan.batch_size, plan.depth + plan.prompt_tokens)
        drawn = np.random.default_rng(SEED).integers(0, model.config.vocab_size, shape)
        self._tokens = mx.array(drawn, mx.int32)
        self._cache_bytes = 0.0

    def run(self) -> Trial:
        """Measure once."""
        plan, cache = self.plan, self._make_cache()
        for layer in cache:
            layer.reserve(self._tokens.shape[1] + plan.generation_tokens)
        mx.clear_cache()
        mx.reset_peak_memory()
        if plan.depth:
            for _ in self._steps(self._tokens[:, : plan.depth], cache, 1):
                pass
        prompt = self._tokens[:, plan.depth :]
        start = time.perf_counter()
        steps = self._steps(prompt, cache, plan.generation_tokens)
        next(steps)
        first = time.perf_counter()
        stored = _stored_bytes(cache)
        for _ in steps:
            pass
        end = time.perf_counter()
        self._cache_bytes = (stored + _stored_bytes(cache)) / 2
        following = plan.generation_tokens - 1
        return Trial(
            prompt_tps=plan.batch_size * plan.prompt_tokens / (first - start),
            generation_tps=plan.batch_size * following / (end - first),
            ttft_ms=1e3 * (first - start),
            tpot_ms=1e3 * (end - first) / following,
            total_s=end - start,
            peak_memory=mx.get_peak_memory() / 1e9,
        )

    def step_bytes(self) -> float:
        """Bytes of weights and cache that a decode step of the newest trial had to read, on average."""
        return _weight_bytes((self.model.layers, self.model.head)) + self._cache_bytes

    def _steps(self, tokens: mx.array, cache: Sequence[AnyKVCache], count: int) -> Iterator[None]:
        """Read the tokens (B, L), then yield each time that every row has a token more on the host."""
        if self.plan.batch_size > 1:
            yield from self._batch_steps(tokens, cache, count)
            return
        for _ in generate_step(
            tokens[0],
            self.model,
            max_tokens=count,
            prompt_cache=cache,
            prefill_step_size=self._step_size,
        ):
            yield

    def _batch_steps(
        self, tokens: mx.array, cache: Sequence[AnyKVCache], count: int
    ) -> Iterator[None]:
        """The same for several rows, which all go to the end, the next step in flight."""
        last = tokens.shape[1] - 1
        for begin in range(0, last, self._step_size):
            self.model(tokens[:, begin : min(begin + self._step_size, last)], cache)
            mx.eval([array for layer in cache for array in layer.arrays])

        def step(tokens: mx.array) -> mx.array:
            chosen = ops.argmax(self.model(tokens, cache)[:, -1])[:, None]
            mx.async_eval(chosen)  # type: ignore[no-untyped-call]
            return chosen

        following = step(tokens[:, last:])
        for index in range(count):
            current = following
            if index + 1 < count:
                following = step(current)
            mx.eval(current)
            yield


def _weight_bytes(part: object) -> int:
    """Bytes of all weights in a record, packed ones included."""
    weights = find_weights(part)
    return sum(w.weight_bytes if isinstance(w, ops.Packed) else w.nbytes for w in weights)


def _stored_bytes(cache: Sequence[AnyKVCache]) -> int:
    return sum(layer.stored_bytes for layer in cache)
