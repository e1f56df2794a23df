"""The generation loop: prefill in chunks, then one token after another with the next step in flight.

A constraint needs each token before it can say what may follow: then the next forward pass alone is in flight,
and the mask is made on the host while it runs.

A generation may begin, go on and be closed in any thread, in one at a time: whatever is left between two steps
has been handed to MLX, which lets another thread wait for it (a lazy array could be computed by its maker only).

Works on token ids only; text, stop strings and timing are `stream.py`'s. This loop is the oracle of the
batched engine: the same greedy tokens.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from traceback import clear_frames
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_edge import ops
from mlx_edge.decoding.processors import LogitsProcessor
from mlx_edge.decoding.sampling import Sampler, make_sampler
from mlx_edge.errors import InvalidRequestError
from mlx_edge.models.interface import (
    Cache,
    Forward,
    LanguageModel,
    LayerCache,
    ModelLimits,
    tell_images,
)

if TYPE_CHECKING:  # slow to import
    import numpy as np
    from numpy.typing import NDArray

    from mlx_edge.decoding.constraints import Constraint
    from mlx_edge.models.vision.prompt import ImagePrompt

PREFILL_STEP_SIZE = 2048
Step = tuple[mx.array, mx.array]  # token (1,), log-probabilities (V,)
STEPS_IN_FLIGHT = 2  # at most, when one fails
RESERVED = 8192  # positions: beyond the prompt, a cache is not allocated further ahead than this


def generate_step(
    prompt: mx.array,
    model: LanguageModel[Cache],
    *,
    max_tokens: int = 256,
    sampler: Sampler | None = None,
    logits_processors: Sequence[LogitsProcessor] = (),
    constraint: "Constraint | None" = None,
    prompt_cache: Sequence[Cache] | None = None,
    prefill_step_size: int = PREFILL_STEP_SIZE,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
    images: "ImagePrompt | None" = None,
) -> Generator[tuple[int, mx.array], None, None]:
    """Yield (token, log-probabilities (V,)) pairs that follow the int32 prompt (L,), at most max_tokens.

    Ends earlier only where the model's context ends, or where a `constraint` lets nothing follow; the token
    after which that is so is yielded. A constraint is applied after the processors: the log-probabilities
    are those among the allowed tokens. With a `prompt_cache` the prompt continues what it holds. `images` says what
    stands in the prompt where it has tokens of images; the positions in it are those of the cache.
    `prompt_progress_callback` is told (positions done, positions in all) during the prefill.

    Closing the generator ends it within a step; what the callback raises ends it during the prefill. Either way
    nothing is left running, and the cache holds whole steps: it may go on, also in another thread.

    Raises: InvalidRequestError for an empty prompt, one beyond the context, a token outside the vocabulary, or a
    constraint that has ended or cannot be followed.
    """
    cache = model.make_cache() if prompt_cache is None else prompt_cache
    max_tokens = reserve(prompt, model, cache, max_tokens)
    check_options(prefill_step_size, constraint)
    step = tell_images(model, images)

    @explained()  # a step with images waits for their features
    def forward(tokens: mx.array) -> mx.array:
        return step(tokens[None], cache, logits_to_keep=1)[:, -1]  # (1, V)

    choice = Choice(sampler or make_sampler(), logits_processors, prompt, cache)
    rest = prefill(prompt, step, cache, prefill_step_size, prompt_progress_callback)
    if constraint is None:
        steps = _run_free(rest, forward, choice, max_tokens)
    else:
        steps = _run_constrained(rest, forward, choice, max_tokens, constraint)
    try:
        for index, pair in enumerate(steps):
            if index == 0 and prompt_progress_callback is not None:
                prompt_progress_callback(prompt.size, prompt.size)
            yield pair
    finally:
        choice.finish()


def _run_free(
    rest: mx.array, forward: Callable[[mx.array], mx.array], choice: "Choice", max_tokens: int
) -> Iterator[tuple[int, mx.array]]:
    """One token after another, the next step always in flight."""
    following = choice.make(forward(rest))
    for index in range(max_tokens):
        token, logprobs = following
        if index + 1 < max_tokens:
            following = choice.make(forward(token))
        yield value_of(token), logprobs


def _run_constrained(
    rest: mx.array,
    forward: Callable[[mx.array], mx.array],
    choice: "Choice",
    max_tokens: int,
    constraint: "Constraint",
) -> Iterator[tuple[int, mx.array]]:
    """One token after another, the mask of each made while its forward pass runs."""
    logits = forward(rest)
    choice.start(logits)
    for index in range(max_tokens):
        token, logprobs = choice.make(logits, constraint)
        value = value_of(token)
        constraint.advance(value)
        is_last = constraint.is_finished or index + 1 == max_tokens
        if not is_last:
            logits = forward(token)
            choice.start(logits)
        yield value, logprobs
        if is_last:
            return


@contextmanager
def explained() -> Iterator[None]:
    """Around an evaluation: what the kernels throw there comes as an error of ours, once nothing runs any more.

    Raises: MemoryBudgetError where they found no memory. The caches of the step that failed are of no more use.
    """
    try:
        yield
    except RuntimeError as error:
        if not ops.is_failure(error):
            raise
        for _ in range(STEPS_IN_FLIGHT):
            with suppress(RuntimeError):  # a step in flight that needed this one fails like it
                mx.synchronize()
        clear_frames(error.__traceback__)  # whoever keeps the error must not keep the caches
        raise ops.explain(error) from error


@dataclass
class Choice:
    """From logits to a token: processors, constraint, sampler; the tokens so far are kept for processors alone."""

    sampler: Sampler
    processors: Sequence[LogitsProcessor]
    seen: mx.array  # int32 (L,)
    cache: Sequence[LayerCache]
    in_flight: mx.array | None = field(default=None, init=False)  # a result of the newest step

    def make(self, logits: mx.array, constraint: "Constraint | None" = None) -> Step:
        """Start to compute the token that follows these logits (1, V), one that the constraint allows."""
        token, row = self.pick(logits, constraint)
        self.start(token, row)
        return token, row

    def pick(self, logits: mx.array, constraint: "Constraint | None" = None) -> Step:
        """The token that follows these logits (1, V), one that the constraint allows; nothing is computed yet."""
        for process in self.processors:
            logits = process(self.seen, logits)
        if constraint is not None:
            allowed = _fit(constraint.mask(), logits.shape[-1])
            logits = mx.where(allowed, logits, mx.array(-mx.inf, logits.dtype))
        logprobs = ops.log_softmax(logits)
        token = self.sampler(logprobs)  # (1,)
        row = logprobs[0]  # before the evaluation: the caller may read it in another thread
        if self.processors:
            self.seen = mx.concatenate([self.seen, token.astype(self.seen.dtype)])
        return token, row

    @explained()
    def start(self, *results: mx.array) -> None:
        """Let MLX compute these, and all that the next step will find: the tokens so far and the cache."""
        kept = [array for layer in self.cache for array in layer.arrays]
        mx.async_eval(*results, self.seen, kept)  # type: ignore[no-untyped-call]
        # One result stands for the step. The cache's arrays must not be held: their next write would copy them.
        self.in_flight = results[0]

    def finish(self) -> None:
        """Wait until nothing runs any more; in whichever thread, as all of it has been started.

        Nobody has asked for the token of a step that is still in flight: where it fails, whoever goes on is told.
        """
        if self.in_flight is None:
            return
        try:
            mx.eval(self.in_flight)
        except RuntimeError as error:
            if not ops.is_failure(error):
                raise


@explained()
def value_of(token: mx.array) -> int:
    """The number of a token (1,), once it is computed.

    Raises: MemoryBudgetError when its step found no memory.
    """
    value = token.item()
    assert isinstance(value, int)
    return value


def _fit(mask: "NDArray[np.bool_]", vocab_size: int) -> mx.array:
    """A tokenizer's mask over the model's vocabulary, which may be padded beyond it, or shorter."""
    import numpy as np

    fitted = np.zeros(vocab_size, np.bool_)
    fitted[: mask.size] = mask[:vocab_size]
    if not fitted.any():
        raise InvalidRequestError(
            f"no token can follow: the constraint allows none of the model's {vocab_size} tokens"
        )
    return mx.array(fitted)


def prefill(
    prompt: mx.array,
    step: Forward[Cache],
    cache: Sequence[Cache],
    step_size: int,
    progress: Callable[[int, int], None] | None,
) -> mx.array:
    """Store a long prompt in chunks, all but the last of them; return that one, whose last logits are wanted."""
    begin = 0
    while True:
        if progress is not None:
            progress(begin, prompt.size)
        end = begin + longest_chunk(cache, step_size)
        if end >= prompt.size:
            return prompt[begin:]
        with explained():
            step(prompt[None, begin:end], cache, logits_to_keep=1)
            # Only what was stored is evaluated: no logits are computed before they are wanted.
            mx.eval([array for layer in cache for array in layer.arrays])
        begin = end


def longest_chunk(cache: Sequence[LayerCache], step_size: int) -> int:
    """How many of the next `step_size` tokens a step may bring: none that come after the rows are packed.

    So the same is computed wherever a prompt is cut: in chunks of another size, or behind a stored prefix.
    """
    ahead = (layer.num_until_packed for layer in cache)
    return min([step_size, *(count for count in ahead if count)])


def allowed_tokens(
    prompt: mx.array, model: LanguageModel[Cache], cache: Sequence[Cache], max_tokens: int
) -> int:
    """At most `max_tokens`, and what fits into the context after the prompt; the last one is not stored.

    Raises: InvalidRequestError for a prompt that cannot be served.
    """
    if prompt.ndim != 1 or prompt.size == 0:
        raise InvalidRequestError(
            f"the prompt has shape {prompt.shape}; expected one token or more"
        )
    extremes = prompt.min().item(), prompt.max().item()
    held = cache[0].offset + prompt.size
    return check_prompt(extremes, held, model.config, max_tokens)  # type: ignore[arg-type]


def check_prompt(
    extremes: tuple[int, int],
    num_tokens: int,
    limits: ModelLimits,
    max_tokens: int,
    context_size: int | None = None,
) -> int:
    """How many tokens may follow a prompt of `num_tokens`, whose lowest and highest ids are the `extremes`.

    `context_size` is the model's unless told. Raises: InvalidRequestError for a prompt that cannot be served.
    """
    _check_positive("max_tokens", max_tokens)
    lowest, highest = extremes
    if not 0 <= lowest <= highest < limits.vocab_size:
        raise InvalidRequestError(
            f"the prompt holds token {lowest if lowest < 0 else highest}; "
            f"the vocabulary has {limits.vocab_size}"
        )
    context = limits.context_size if context_size is None else context_size
    if num_tokens > context:
        raise InvalidRequestError(
            f"the prompt has {num_tokens} tokens, the model's context {context}; shorten the prompt"
        )
    return min(max_tokens, context - num_tokens + 1)


def reserve(
    prompt: mx.array, model: LanguageModel[Cache], cache: Sequence[Cache], max_tokens: int
) -> int:
    """Make room in the cache for the prompt and the tokens that follow it; how many may follow.

    Raises: InvalidRequestError for a prompt that cannot be served.
    """
    max_tokens = allowed_tokens(prompt, model, cache, max_tokens)
    for layer in cache:
        layer.reserve(layer.offset + prompt.size + min(max_tokens, RESERVED))
    return max_tokens


def check_options(prefill_step_size: int, constraint: "Constraint | None") -> None:
    """Raise InvalidRequestError for no steps at all, or a constraint that was used up."""
    _check_positive("prefill_step_size", prefill_step_size)
    if constraint is not None and constraint.is_finished:
        raise InvalidRequestError("the constraint has ended; make a new one for each generation")


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise InvalidRequestError(f"{name} is {value}, expected at least 1")
