"""One request while it runs: its tokens and cache, how its next token is chosen, the text that has come of it.

All state that decides its tokens is its own: sampler, random numbers, processors, grammar, proposer. Used in the
engine's thread alone. Knows nothing of the other sequences, of steps and of scheduling.
"""

import logging
import random
from collections.abc import Sequence as Tokens
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_edge.decoding.loop import Choice
from mlx_edge.decoding.processors import make_logits_processors
from mlx_edge.decoding.proposers import Proposer
from mlx_edge.decoding.sampling import make_sampler
from mlx_edge.decoding.text_stream import TextStream
from mlx_edge.engine.logprobs import TokenTexts
from mlx_edge.engine.request import FinishReason, Piece, Request, Sampling, TokenLogprob, Usage
from mlx_edge.errors import MLXEdgeError
from mlx_edge.models.interface import LayerCache
from mlx_edge.text import Tokenizer

if TYPE_CHECKING:  # slow to import
    from mlx_edge.decoding.constraints import Constraint
    from mlx_edge.models.vision.prompt import ImagePrompt

logger = logging.getLogger(__name__)


class Sequence:
    """The state of one request that was admitted."""

    def __init__(
        self,
        request: Request,
        prompt: Tokens[int],
        limit: int,
        tokenizer: Tokenizer,
        token_texts: TokenTexts,
        constraint: "Constraint | None",
        images: "ImagePrompt | None" = None,
    ) -> None:
        """`limit` is how many tokens may follow the prompt, `images` what stands in it."""
        self.request = request
        self.context = list(prompt)  # prompt and generated tokens
        self.num_prompt = len(prompt)
        self.images = images
        self._num_image_tokens = sum(map(len, self.image_places))
        self._prompt_keys = prompt if images is None else _narrow(images.keys(prompt))
        self.limit = limit
        self.caches: Any = None  # a cache per layer
        self.num_stored = 0  # tokens of the context in them
        self.cached_tokens = 0  # of the prompt
        self.cache_miss: str | None = "the prefix cache is off"
        self.drafted = self.accepted = 0
        self.queued_s = self.first_token_s = 0.0
        self.finish_reason: FinishReason | None = None
        self._token_texts = token_texts
        self._text = TextStream(
            tokenizer,
            request.stop,
            stop_tokens=request.stop_tokens,
            ignore_eos=request.ignore_eos,
        )
        self._grammar = constraint
        self._tail = ""  # of the text, while what the grammar waits for may begin in it
        self._is_held = constraint is not None and request.grammar_after is None
        self._make_choice(tokenizer)
        self.proposer: Proposer | None = None
        self._num_told = 0  # tokens of the context that the proposer knows
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._given = 0, self.num_prompt, 0  # texts, tokens and log-probabilities that pieces had

    def _make_choice(self, tokenizer: Tokenizer) -> None:
        sampling = self.request.sampling
        if sampling.seed is None:
            sampling = replace(sampling, seed=random.getrandbits(64))
        self._sampling = sampling
        self._spared = sorted(
            {*tokenizer.eos_token_ids, *tokenizer.encode("\n", add_special_tokens=False)}
            if sampling.xtc_probability
            else ()
        )
        self._processors = _make_processors(sampling) if sampling.has_processors else []
        self._start_choice()
        self.is_plain = sampling.temp == 0 and not self._processors
        self.is_plain &= self.request.logprobs is None

    def _start_choice(self) -> None:
        sampling = self._sampling
        sampler = make_sampler(
            sampling.temp,
            sampling.top_p,
            sampling.min_p,
            sampling.min_tokens_to_keep,
            sampling.top_k,
            sampling.xtc_probability,
            sampling.xtc_threshold,
            self._spared,
            seed=sampling.seed,
        )
        seen = self.context if self._processors else []
        self.choice = Choice(sampler, self._processors, mx.array(seen, dtype=mx.int32), ())

    @property
    def pending(self) -> int:
        """Tokens to be read before the next one is chosen."""
        return len(self.context) - self.num_stored

    @property
    def num_generated(self) -> int:
        """Tokens chosen so far."""
        return len(self.context) - self.num_prompt

    def keys(self, begin: int, end: int) -> list[int]:
        """These tokens of the context as prefix cache and proposer know them.

        Those of an image are negative numbers that tell what it shows, of 31 bits each.
        """
        generated = self.context[max(begin, self.num_prompt) : end]
        return [*self._prompt_keys[begin:end], *generated]

    @property
    def image_places(self) -> list[range]:
        """Where in the prompt images stand."""
        spans = () if self.images is None else self.images.spans
        return [range(span.start, span.end) for span in spans]

    @property
    def constraint(self) -> "Constraint | None":
        """The grammar, once it holds."""
        return self._grammar if self._is_held else None

    def forget(self, vocab_size: int) -> None:
        """Be as before the step that failed, without a cache: all tokens are to be read anew.

        The random numbers stand where they stood when the newest token had been chosen.
        """
        self.caches, self.num_stored = None, 0
        self._start_choice()
        if self._sampling.temp:
            blank = mx.zeros((1, vocab_size))
            for _ in range(self.num_generated):
                self.choice.sampler(blank)  # draws its keys; the token is never computed

    def take(self, token: int, row: mx.array | None) -> bool:
        """The next token is chosen; whether the text ends with it. `row` are its log-probabilities (V,)."""
        self.context.append(token)
        is_complete = False
        if self._is_held:
            assert self._grammar is not None
            self._grammar.advance(token)
            is_complete = self._grammar.is_finished
        is_last = self.num_generated == self.limit
        text, finish = self._text.add(token, is_complete=is_complete, is_last=is_last)
        if self._grammar is not None and not self._is_held:
            self._look_for_beginning()
        if self.proposer is not None and self._num_told == len(self.context) - 1:
            self.proposer.take(token)
            self._num_told += 1
        if text:
            self._texts.append(text)
        if self.request.logprobs is not None and row is not None:
            self._logprobs.append(self._token_texts.read(token, row, self.request.logprobs))
        self.finish_reason = finish
        return finish is not None

    def _look_for_beginning(self) -> None:
        """Whether the grammar holds from here on."""
        begin = self.request.grammar_after
        assert begin is not None
        text = self._tail + self._text.segment
        self._is_held = begin in text
        self._tail = text[-(len(begin) - 1) :] if len(begin) > 1 else ""

    def cut(self, reason: FinishReason) -> None:
        """The text ends here, whatever may still be held back."""
        self._texts.append(self._text.finish())
        self.finish_reason = reason

    def take_piece(self, total_s: float) -> Piece:
        """What has come since the last piece; the last one tells what the request took."""
        texts, tokens, logprobs = self._given
        self._given = len(self._texts), len(self.context), len(self._logprobs)
        return Piece(
            "".join(self._texts[texts:]),
            tuple(self.context[tokens:]),
            tuple(self._logprobs[logprobs:]),
            self.finish_reason,
            None if self.finish_reason is None else self._usage(total_s),
            self._text.stop_text,
        )

    def whole_piece(self, last: Piece) -> Piece:
        """All pieces in one, with the end of the last one."""
        text, tokens = "".join(self._texts), tuple(self.context[self.num_prompt :])
        return replace(last, text=text, tokens=tokens, logprobs=tuple(self._logprobs))

    def _usage(self, total_s: float) -> Usage:
        return Usage(
            self.num_prompt,
            self.num_generated,
            self.cached_tokens,
            self.cache_miss,
            self.queued_s,
            self.first_token_s,
            total_s,
            self.drafted,
            self.accepted,
            self._num_image_tokens,
        )

    def tell_proposer(self, limit: int) -> None:
        """Let the proposer read on, at most `limit` tokens of what it does not know yet."""
        if self.proposer is None or self._num_told == len(self.context):
            return
        try:
            end = min(len(self.context), self._num_told + limit)
            self.proposer.start(self.keys(self._num_told, end), self._num_told)
            self._num_told = end
        except MLXEdgeError as error:
            self._drop_proposer(error)

    def propose(self, limit: int, caches: Tokens[LayerCache]) -> list[int]:
        """Drafts of what follows, at most `limit` and as many as the cache could take back."""
        if self.proposer is None or self._num_told < len(self.context):
            return []
        trimmable = min(layer.num_trimmable for layer in caches) - 1
        most = min(limit, self.limit - self.num_generated - 1, trimmable)
        if most < 1:
            return []
        try:
            drafts = self.proposer.propose(most)
        except MLXEdgeError as error:
            self._drop_proposer(error)
            return []
        return list(takewhile(lambda token: token >= 0, drafts))  # none of an image

    def _drop_proposer(self, error: Exception) -> None:
        """Go on without drafts: the text is the same."""
        logger.warning("a request goes on without drafts: %s", error)
        self.proposer = None

    def finish(self) -> None:
        """Let go of all that is large."""
        if self.proposer is not None:
            self.proposer.finish()
        self.proposer = None
        self.caches = self.images = None


def _narrow(keys: Tokens[int]) -> list[int]:
    """Negative numbers cut to the 31 bits that a prefix cache has for them."""
    return [key if key >= 0 else -1 - (-1 - key) % (1 << 31) for key in keys]


def _make_processors(sampling: Sampling) -> Any:
    return make_logits_processors(
        dict(sampling.logit_bias),
        sampling.repetition_penalty,
        sampling.repetition_context_size,
        sampling.presence_penalty,
        sampling.presence_context_size,
        sampling.frequency_penalty,
        sampling.frequency_context_size,
    )
