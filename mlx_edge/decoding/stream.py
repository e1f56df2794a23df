"""From a prompt to text as it comes: `stream_generate` and `generate`, with the names and fields of mlx-lm.

Puts the loop, the tokenizer and the stop conditions together, and times them; knows no command line.
"""

import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_edge.decoding.loop import PREFILL_STEP_SIZE, allowed_tokens, generate_step
from mlx_edge.decoding.processors import LogitsProcessor
from mlx_edge.decoding.proposers import Proposer, make_proposer
from mlx_edge.decoding.sampling import Sampler
from mlx_edge.decoding.speculation import (
    DraftedStep,
    Speculation,
    speculative_generate_step,
)
from mlx_edge.decoding.text_stream import TextEnd, TextStream
from mlx_edge.errors import InvalidRequestError
from mlx_edge.models.interface import Cache, LanguageModel, check_reads_images, find_tower
from mlx_edge.runtime import peak_memory_gb
from mlx_edge.text import Tokenizer

if TYPE_CHECKING:  # slow to import
    from mlx_edge.decoding.constraints import Constraint
    from mlx_edge.models.vision.prompt import ImagePrompt
    from mlx_edge.models.vision.reading import ImageSource

Prompt = str | Sequence[int] | mx.array


@dataclass(frozen=True)
class GenerationResponse:
    """One step of a generation; `text` is new since the last one, all counts are up to here."""

    text: str
    token: int
    logprobs: mx.array  # (V,)
    from_draft: bool  # it was proposed, and came true
    prompt_tokens: int
    prompt_tps: float  # prompt tokens per second, up to the first token
    generation_tokens: int
    generation_tps: float
    peak_memory: float  # 10^9 bytes
    finish_reason: TextEnd | None = None
    speculation: Speculation | None = None  # None where nothing drafts


def stream_generate(
    model: LanguageModel[Cache],
    tokenizer: Tokenizer,
    prompt: Prompt,
    max_tokens: int = 256,
    *,
    stop: Sequence[str] = (),
    sampler: Sampler | None = None,
    logits_processors: Sequence[LogitsProcessor] = (),
    constraint: "Constraint | None" = None,
    prompt_cache: Sequence[Cache] | None = None,
    prefill_step_size: int = PREFILL_STEP_SIZE,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
    draft_model: LanguageModel[Any] | None = None,
    num_draft_tokens: int | None = None,
    prompt_lookup: bool = False,
    proposer: Proposer | None = None,
    images: "Sequence[ImageSource]" = (),
    max_pixels: int | None = None,
) -> Generator[GenerationResponse, None, None]:
    """Yield a response per token; the last one carries the finish reason.

    Ends at an end-of-sequence token, before a `stop` string (which is not part of the text, even where it
    spans tokens), where a `constraint` (a new one for each generation) lets nothing follow, at `max_tokens`, or
    where the model's context ends. Never yields half a character, but for a text cut by `max_tokens`.
    To cancel, close the generator (leaving a `for` loop drops it, which closes it too), or raise from the callback
    while the prompt is read; `generate_step` says what is then left.

    A smaller `draft_model` with the same vocabulary, or `prompt_lookup` for text that repeats itself, proposes
    up to `num_draft_tokens` tokens that one step then verifies: the same text in fewer steps. A `proposer` of
    `make_proposer` in their place goes on with what it was told: for the turns of a conversation.

    Of the `images` (paths, bytes of files, or arrays (H, W, 3) of uint8) each has one token in the prompt, which the
    chat template writes; `max_pixels` lowers the size to which the model resizes them.

    Raises: InvalidRequestError for a prompt or an option that cannot be served.
    """
    model.check_unchanged()
    cache = model.make_cache() if prompt_cache is None else prompt_cache
    tokens = encode_prompt(tokenizer, prompt)
    tokens, seen = _place_images(tokens, images, model, cache, max_pixels)
    limit = allowed_tokens(tokens, model, cache, max_tokens)
    text, clock = TextStream(tokenizer, stop), _Clock(tokens.size)
    drafting: dict[str, Any] = {"draft_model": draft_model, "prompt_lookup": prompt_lookup}
    asked = make_proposer(model, num_draft_tokens=num_draft_tokens, **drafting)
    steps = _generate_steps(
        _only_one(asked, proposer),
        tokens,
        model,
        max_tokens=limit,
        sampler=sampler,
        logits_processors=logits_processors,
        constraint=constraint,
        prompt_cache=cache,
        prefill_step_size=prefill_step_size,
        prompt_progress_callback=prompt_progress_callback,
        images=seen,
    )
    with closing(steps):
        yield from _respond(steps, text, clock, limit, constraint)


def _place_images(
    tokens: mx.array,
    images: "Sequence[ImageSource]",
    model: LanguageModel[Any],
    cache: Sequence[Any],
    max_pixels: int | None,
) -> "tuple[mx.array, ImagePrompt | None]":
    """The prompt with a run of tokens for each image, and what stands there; None where there are no images."""
    check_reads_images(model, len(images) > 0)
    tower = find_tower(model)
    if tower is None:
        return tokens, None
    if cache[0].holds_images:
        raise InvalidRequestError(
            "the prompt cache holds images, behind which only a whole prompt can be read; begin with an empty cache"
        )
    from mlx_edge.models.vision.reading import read_images

    values: list[int] = tokens.reshape(-1).tolist()  # type: ignore[assignment]
    seen = read_images(values, images, tower, max_pixels=max_pixels, begin=cache[0].offset)
    return (tokens, None) if seen is None else (mx.array(seen.tokens, dtype=mx.int32), seen)


def _respond(
    steps: Iterable[DraftedStep],
    text: TextStream,
    clock: "_Clock",
    limit: int,
    constraint: "Constraint | None",
) -> Generator[GenerationResponse, None, None]:
    """A response per step, until the text ends."""
    for count, step in enumerate(steps, start=1):
        clock.tick()
        is_complete = constraint is not None and constraint.is_finished
        segment, finish = text.add(step.token, is_complete=is_complete, is_last=count == limit)
        yield GenerationResponse(
            text=segment,
            token=step.token,
            logprobs=step.logprobs,
            from_draft=step.from_draft,
            prompt_tokens=clock.prompt_tokens,
            prompt_tps=clock.prompt_tps,
            generation_tokens=count,
            generation_tps=clock.generation_tps,
            peak_memory=peak_memory_gb(),
            finish_reason=finish,
            speculation=step.speculation,
        )
        if finish:
            return


def _generate_steps(
    proposer: Proposer | None, prompt: mx.array, model: LanguageModel[Cache], **options: Any
) -> Generator[DraftedStep, None, None]:
    """The steps of the loop that is asked for."""
    if proposer is not None:
        yield from speculative_generate_step(prompt, model, proposer, **options)
        return
    with closing(generate_step(prompt, model, **options)) as steps:
        for token, logprobs in steps:
            yield DraftedStep(token, logprobs)


def _only_one(asked: Proposer | None, given: Proposer | None) -> Proposer | None:
    if asked is not None and given is not None:
        raise InvalidRequestError(
            "a proposer was given, and a draft model or prompt lookup beside it; choose one of them"
        )
    return asked or given


def generate(
    model: LanguageModel[Any],
    tokenizer: Tokenizer,
    prompt: Prompt,
    verbose: bool = False,
    **options: Any,
) -> str:
    """The whole text that follows the prompt; `options` are those of `stream_generate`.

    `verbose` prints the text as it comes, then tokens per second and peak memory.
    """
    parts = []
    response = None
    if verbose:
        print("=" * 10)
    for response in stream_generate(model, tokenizer, prompt, **options):
        parts.append(response.text)
        if verbose:
            print(response.text, end="", flush=True)
    if verbose and response is not None:
        print(f"\n{'=' * 10}\n{describe(response)}")
    return "".join(parts)


def describe(response: GenerationResponse) -> str:
    """The closing lines of a generation: speed of prompt and generation, what drafts brought, peak memory."""
    drafting = ""
    if (count := response.speculation) is not None:
        per_pass = response.generation_tokens / max(1, count.forward_passes)
        drafting = (
            f"Drafts: {count.accepted} of {count.drafted} accepted, "
            f"{per_pass:.2f} tokens per forward pass\n"
        )
    return (
        f"Prompt: {response.prompt_tokens} tokens, {response.prompt_tps:.3f} tokens-per-sec\n"
        f"Generation: {response.generation_tokens} tokens, {response.generation_tps:.3f} tokens-per-sec\n"
        f"{drafting}"
        f"Peak memory: {response.peak_memory:.3f} GB"
    )


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt) -> mx.array:
    """The prompt as int32 tokens (L,). A text that begins with the BOS token's own text gets no second one."""
    if isinstance(prompt, mx.array):
        return prompt
    if isinstance(prompt, str):
        prompt = encode_text(tokenizer, prompt)
    if not all(isinstance(token, int) and -(2**31) <= token < 2**31 for token in prompt):
        raise InvalidRequestError("the prompt's token ids must be 32-bit integers")
    return mx.array(list(prompt), dtype=mx.int32)


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a prompt. A text that begins with the BOS token's own text gets no second one."""
    has_bos = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token or "")
    return tokenizer.encode(text, add_special_tokens=not has_bos)


class _Clock:
    """Tokens per second; the first token's time belongs to the prompt."""

    def __init__(self, prompt_tokens: int) -> None:
        self._start = time.perf_counter()
        self.prompt_tokens = prompt_tokens
        self._count = 0
        self.prompt_tps = 0.0
        self.generation_tps = 0.0

    def tick(self) -> None:
        """A token has come."""
        now = time.perf_counter()
        if self._count == 0:
            self.prompt_tps = self.prompt_tokens / max(now - self._start, 1e-9)
            self._start = now
        else:
            self.generation_tps = self._count / max(now - self._start, 1e-9)
        self._count += 1
