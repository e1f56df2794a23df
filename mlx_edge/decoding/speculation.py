"""Speculative decoding: a proposer drafts tokens, one forward pass verifies them all (Leviathan et al. 2022).

After each position of the pass the next token is chosen exactly as `loop.py` chooses it: the same processors,
constraint and sampler, in the same order, with the same draws. A draft is accepted when it is that token. So the
text is that of plain decoding, for greedy choice and for any sampler and seed; only the last bits of logits may
differ between a pass of several rows and one of a single row, which matters where two tokens are as good as equal.
Where nothing is proposed, a step begins before its token is known, as in plain decoding.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Generic, NamedTuple

import mlx.core as mx

from mlx_edge.decoding.loop import (
    PREFILL_STEP_SIZE,
    Choice,
    Step,
    check_options,
    explained,
    prefill,
    reserve,
    value_of,
)
from mlx_edge.decoding.processors import LogitsProcessor
from mlx_edge.decoding.proposers import Proposer, check_trimmable
from mlx_edge.decoding.sampling import Sampler, make_sampler
from mlx_edge.models.interface import Cache, Forward, LanguageModel, tell_images

if TYPE_CHECKING:  # slow to import
    from mlx_edge.decoding.constraints import Constraint
    from mlx_edge.models.vision.prompt import ImagePrompt


@dataclass(frozen=True)
class Speculation:
    """How drafting went so far."""

    drafted: int  # tokens proposed
    accepted: int  # of them, those that came true
    forward_passes: int  # of the large model, after the prompt's


class DraftedStep(NamedTuple):
    """A token, and where it came from."""

    token: int
    logprobs: mx.array  # (V,)
    from_draft: bool = False
    speculation: Speculation | None = None


def speculative_generate_step(
    prompt: mx.array,
    model: LanguageModel[Cache],
    proposer: Proposer,
    *,
    max_tokens: int = 256,
    sampler: Sampler | None = None,
    logits_processors: Sequence[LogitsProcessor] = (),
    constraint: "Constraint | None" = None,
    prompt_cache: Sequence[Cache] | None = None,
    prefill_step_size: int = PREFILL_STEP_SIZE,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
    images: "ImagePrompt | None" = None,
) -> Generator[DraftedStep, None, None]:
    """Yield the tokens that `generate_step` yields for the same options, with what the proposer had to do with it.

    A proposer sees no images, but the tokens that stand for them.

    After closing, the cache holds what was yielded, but perhaps the last token, and no drafts.

    Raises: InvalidRequestError as `generate_step` does, and for a cache that cannot take tokens back.
    """
    cache = model.make_cache() if prompt_cache is None else prompt_cache
    max_tokens = reserve(prompt, model, cache, max_tokens)
    check_options(prefill_step_size, constraint)
    check_trimmable(model, cache)
    proposer.start(prompt.tolist(), cache[0].offset)  # type: ignore[arg-type]
    choice = Choice(sampler or make_sampler(), logits_processors, prompt, cache)
    step = tell_images(model, images)
    rest = prefill(prompt, step, cache, prefill_step_size, prompt_progress_callback)
    passes = _Passes(step, cache, choice)
    try:
        passes.run(rest)
        for index, drafted in enumerate(_run(passes, choice, proposer, max_tokens, constraint)):
            if index == 0 and prompt_progress_callback is not None:
                prompt_progress_callback(prompt.size, prompt.size)
            yield drafted
    finally:
        choice.finish()
        passes.drop_rejected()
        proposer.finish()


def _run(
    passes: "_Passes[Cache]",
    choice: Choice,
    proposer: Proposer,
    max_tokens: int,
    constraint: "Constraint | None",
) -> Iterator[DraftedStep]:
    """One token after another; a pass has rows for as many as its drafts come true."""
    is_free = constraint is None  # else a choice must wait for the token before it
    following: Step | None = choice.make(passes.row) if is_free else None
    for index in range(max_tokens):
        token, logprobs = following or choice.make(passes.row, constraint)
        following = None
        num_left = max_tokens - index - 1
        begins_early = is_free and num_left > 0 and passes.is_used_up and proposer.is_waiting
        if begins_early:
            passes.run(token)
            following = choice.make(passes.row)
        value = value_of(token)
        proposer.take(value)
        if constraint is not None:
            constraint.advance(value)
        is_last = num_left == 0 or (constraint is not None and constraint.is_finished)
        from_draft = not begins_early and passes.accept(value)
        if not (is_last or begins_early):
            if not from_draft:
                passes.drop_rejected()
                drafts = proposer.propose(min(num_left - 1, passes.max_drafts))
                passes.run(mx.array([value, *drafts], dtype=mx.int32), drafts)
            if is_free:
                following = choice.make(passes.row)
        yield DraftedStep(value, logprobs, from_draft, passes.counts)
        if is_last:
            return


class _Passes(Generic[Cache]):
    """The large model's forward passes: the rows of the newest one, and how far its drafts have come true."""

    def __init__(self, step: Forward[Cache], cache: Sequence[Cache], choice: Choice) -> None:
        self._step, self._cache, self._choice = step, cache, choice
        self._logits: mx.array  # (1, 1 + drafts, V)
        self._drafts: Sequence[int] = ()
        self._num_true = 0  # drafts of the newest pass that came true
        self.counts = Speculation(0, 0, 0)

    @property
    def row(self) -> mx.array:
        """The logits (1, V) from which the next token is chosen."""
        return self._logits[:, self._num_true]

    @property
    def is_used_up(self) -> bool:
        """Whether the next token is not drafted."""
        return self._num_true == len(self._drafts)

    @property
    def max_drafts(self) -> int:
        """How many drafts a pass may verify, as far as the cache is concerned."""
        return max(0, min(layer.num_trimmable for layer in self._cache) - 1)

    @explained()
    def run(self, tokens: mx.array, drafts: Sequence[int] = ()) -> None:
        """Start a pass over the int32 tokens (L,): one that is chosen, and drafts."""
        logits = self._step(tokens[None], self._cache, logits_to_keep=1 + len(drafts))
        self._logits, self._drafts, self._num_true = logits, drafts, 0
        counts = self.counts
        self.counts = replace(
            counts,
            drafted=counts.drafted + len(drafts),
            forward_passes=counts.forward_passes + 1,
        )
        self._choice.start(logits)

    def accept(self, token: int) -> bool:
        """Whether the token was drafted here; then the next row is the one to choose from."""
        if self.is_used_up or self._drafts[self._num_true] != token:
            return False
        self._num_true += 1
        self.counts = replace(self.counts, accepted=self.counts.accepted + 1)
        return True

    def drop_rejected(self) -> None:
        """Take the drafts that did not come true out of the cache."""
        surplus = len(self._drafts) - self._num_true
        self._drafts = self._drafts[: self._num_true]
        if surplus:
            for layer in self._cache:
                layer.trim(surplus)
