"""Proposers: cheap guesses of the tokens to come, which the model then verifies several at a time.

`PromptLookup` reads them off the text itself, where its newest tokens have stood before (prompt lookup decoding,
Saxena 2023); `DraftModel` asks a smaller model with the same vocabulary. A proposer may be wrong in any way: it
decides how fast a text comes, never which. Knows nothing of sampling and of how drafts are verified.
"""

from collections.abc import Sequence
from typing import Any, Generic, Protocol

import mlx.core as mx

from mlx_edge import ops
from mlx_edge.decoding.loop import PREFILL_STEP_SIZE
from mlx_edge.errors import InvalidRequestError
from mlx_edge.models.interface import Cache, LanguageModel
from mlx_edge.ops.cpu import pass_cost
from mlx_edge.text import Tokenizer

MAX_DRAFT_TOKENS = 15  # with the token before them 16 rows, which small-batch kernels still serve
NUM_DRAFT_TOKENS = 3  # of a draft model, as in mlx-lm
MAX_PADDING = 128  # rows by which the vocabularies of one tokenizer's models may differ

WAITING_COST = 0.03  # of a pass: a step with drafts cannot begin before its tokens are known
# Where the CPU kernels have not measured what n rows cost: an estimate for a GPU, in passes of one row.
PASS_COST, ROW_COST = 1.2, 0.095

MIN_KEY, MAX_KEY = 2, 4  # tokens that a place is found by
MAX_MATCH = 16  # beyond it, longer matches are no better
RATE_MEMORY = 1 / 24  # weight of the newest observation in a hit rate


class Proposer(Protocol):
    """Guesses what follows a sequence. Serves one sequence at a time; may go on with it in a later generation."""

    @property
    def is_waiting(self) -> bool:
        """Whether it has nothing to propose: a step may as well begin before its token is known."""
        ...

    def start(self, prompt: Sequence[int], offset: int) -> None:
        """A prompt follows the first `offset` of the tokens told so far; those beyond are void.

        A proposer that was told fewer begins anew with the prompt.
        """
        ...

    def take(self, token: int) -> None:
        """The next token is chosen."""
        ...

    def propose(self, limit: int) -> list[int]:
        """At most `limit` tokens that may follow."""
        ...

    def finish(self) -> None:
        """The generation is over; leave nothing running."""
        ...


class PromptLookup:
    """Proposes what followed the newest tokens when they stood in the text before.

    It follows one earlier place as long as that is right, and then looks for the longest match anew: the newest
    place of the last MAX_KEY to MIN_KEY tokens. For each length of match it keeps the rate at which the next token
    was right, whether or not it was proposed; so many tokens are proposed as make the most tokens per cost. Text
    that does not repeat gets no proposals. All is O(1) per token.
    """

    def __init__(self, max_draft_tokens: int = MAX_DRAFT_TOKENS) -> None:
        self._max_draft_tokens = max_draft_tokens
        self._costs = [_draft_cost(length) for length in range(MAX_DRAFT_TOKENS + 1)]
        self._tokens: list[int] = []
        self._places: dict[tuple[int, ...], int] = {}  # where the newest such tokens end
        self._place: int | None = None  # the token that followed then, and may follow now
        self._match = 0  # tokens before it that are alike
        self._hit_rates = [min(0.1 * n, 0.9) for n in range(MAX_MATCH + 1)]  # by length of match

    @property
    def is_waiting(self) -> bool:
        """Whether nothing is worth proposing."""
        return self._choose_length(self._max_draft_tokens) == 0

    def start(self, prompt: Sequence[int], offset: int) -> None:
        """A prompt follows the first `offset` tokens."""
        del self._tokens[offset if offset <= len(self._tokens) else 0 :]
        self._place = None
        for token in prompt:
            self.take(token)

    def take(self, token: int) -> None:
        """The next token is chosen; learn from it."""
        is_hit = False
        if self._place is not None:
            is_hit = self._tokens[self._place] == token
            self._hit_rates[self._match] += RATE_MEMORY * (is_hit - self._hit_rates[self._match])
        self._tokens.append(token)
        if is_hit:
            assert self._place is not None
            self._place += 1
            self._match = min(self._match + 1, MAX_MATCH)
        else:
            self._find_place()
        end = len(self._tokens)
        for size in range(MIN_KEY, min(MAX_KEY, end) + 1):
            self._places[tuple(self._tokens[-size:])] = end

    def propose(self, limit: int) -> list[int]:
        """The tokens that followed then; a match that reaches the end of the text is repeated."""
        length = self._choose_length(min(limit, self._max_draft_tokens))
        if not length:
            return []
        assert self._place is not None
        drafts = self._tokens[self._place : self._place + length]
        period = len(self._tokens) - self._place
        return [drafts[i % period] for i in range(length)]

    def finish(self) -> None:
        """Nothing runs."""

    def _find_place(self) -> None:
        self._place = None
        tokens = self._tokens
        for size in range(min(MAX_KEY, len(tokens)), MIN_KEY - 1, -1):
            place = self._places.get(tuple(tokens[-size:]))
            if place is None or place >= len(tokens):
                continue
            match = 0
            while match < min(MAX_MATCH, place) and tokens[place - 1 - match] == tokens[-1 - match]:
                match += 1
            if match >= MIN_KEY:  # else the key is of a text that was given up
                self._place, self._match = place, match
                return

    def _choose_length(self, limit: int) -> int:
        """How many drafts make the most tokens per cost; 0 where a plain step makes as many."""
        if self._place is None:
            return 0
        best_length, best_gain = 0, 1.0
        chance = num_tokens = 1.0
        for length in range(1, limit + 1):
            chance *= self._hit_rates[min(self._match + length - 1, MAX_MATCH)]
            num_tokens += chance
            gain = num_tokens / self._costs[length]
            if gain > best_gain:
                best_length, best_gain = length, gain
        return best_length


def _draft_cost(length: int) -> float:
    """What a pass costs that verifies so many drafts, in passes of one row."""
    if ops.uses_cpu_kernels():
        return pass_cost(1 + length) + WAITING_COST
    return PASS_COST + ROW_COST * length


class DraftModel(Generic[Cache]):
    """Proposes the likeliest tokens of a smaller model, which reads along with a cache of its own.

    A draft is a single token, not a distribution: it is accepted when the large model's own choice, greedy or drawn,
    is that token. That keeps the distribution, and for a seed the very tokens. It stops where its context ends.
    """

    def __init__(
        self,
        model: LanguageModel[Cache],
        vocab_size: int,
        num_draft_tokens: int = NUM_DRAFT_TOKENS,
    ) -> None:
        """`vocab_size` is that of the model which verifies."""
        self._model = model
        self._vocab_size = min(vocab_size, model.config.vocab_size)
        self._num_draft_tokens = num_draft_tokens
        self._context: list[int] = []
        self._cache = model.make_cache()
        self._num_stored = 0  # tokens of the context in the cache
        self._drafted: list[int] = []  # tokens that follow them there
        check_trimmable(model, self._cache, "the draft model")

    @property
    def is_waiting(self) -> bool:
        """False: it always has something to propose."""
        return False

    def start(self, prompt: Sequence[int], offset: int) -> None:
        """A prompt follows the first `offset` tokens; all of it but the last token is processed.

        Raises: InvalidRequestError where it does not fit into the draft model's context.
        """
        known = self._context[:offset] if offset <= len(self._context) else []
        context = [*known, *prompt]
        limit = self._model.config.context_size
        if len(context) > limit:
            raise InvalidRequestError(
                f"the prompt has {len(context)} tokens, the draft model's context {limit}; "
                "shorten the prompt, or leave out the draft model"
            )
        self._keep_stored(known)
        self._context = context
        last = len(context) - 1
        while self._num_stored < last and self._can_read():
            self._read(min(self._num_stored + PREFILL_STEP_SIZE, last))
            mx.eval([array for layer in self._cache for array in layer.arrays])

    def take(self, token: int) -> None:
        """The next token is chosen."""
        self._context.append(token)

    def propose(self, limit: int) -> list[int]:
        """The likeliest tokens, one after another."""
        self._keep_stored(self._context[:-1])
        room = self._model.config.context_size - len(self._context) + 1  # the last is not stored
        trimmable = min(layer.num_trimmable for layer in self._cache)
        length = min(limit, self._num_draft_tokens, room, trimmable)
        if length < 1 or not self._can_read():
            return []
        token = self._choose(self._read(len(self._context)))
        tokens = [token]
        for _ in range(length - 1):
            token = self._choose(self._model(token[None], self._cache))
            tokens.append(token)
        drafts: list[int] = mx.concatenate(tokens).tolist()  # type: ignore[assignment]
        self._drafted = drafts[:-1]
        return drafts

    def finish(self) -> None:
        """Forget drafts that did not come true, and wait: another thread may go on."""
        self._keep_stored(self._context[: self._num_stored + len(self._drafted)])
        mx.eval([array for layer in self._cache for array in layer.arrays])

    def _keep_stored(self, tokens: Sequence[int]) -> None:
        """Take back what is stored and is not the beginning of `tokens`, themselves one of the context."""
        drafted, follow = self._drafted, tokens[self._num_stored :]
        num_true = next(
            (i for i, (a, b) in enumerate(zip(drafted, follow, strict=False)) if a != b),
            min(len(drafted), len(follow)),
        )
        wanted = min(self._num_stored + num_true, len(tokens))
        surplus = self._num_stored + len(drafted) - wanted
        try:
            for layer in self._cache:
                layer.trim(surplus)
        except InvalidRequestError:  # too far back: read the text anew
            self._cache, wanted = self._model.make_cache(), 0
        self._num_stored, self._drafted = wanted, []

    def _can_read(self) -> bool:
        """Whether all tokens to come are in its vocabulary, which may lack padding of the other's."""
        return max(self._context[self._num_stored :]) < self._model.config.vocab_size

    def _read(self, end: int) -> mx.array:
        """Store the context up to `end`; the logits."""
        tokens = mx.array(self._context[self._num_stored : end], dtype=mx.int32)
        self._num_stored = end
        return self._model(tokens[None], self._cache)

    def _choose(self, logits: mx.array) -> mx.array:
        token = ops.argmax(logits[:, -1, : self._vocab_size])
        mx.async_eval(token)  # type: ignore[no-untyped-call]
        return token


def make_proposer(
    model: LanguageModel[Any],
    *,
    draft_model: LanguageModel[Any] | None = None,
    num_draft_tokens: int | None = None,
    prompt_lookup: bool = False,
) -> Proposer | None:
    """The proposer that was asked for, None for none; it serves one sequence.

    `num_draft_tokens` is how many a draft model proposes (3 unless told), or the most that a lookup may (15).

    Raises: InvalidRequestError for a draft model with another vocabulary or one that cannot take tokens back, for
    both kinds at once, and for a number outside its range or of nothing.
    """
    if draft_model is not None and prompt_lookup:
        raise InvalidRequestError(
            "a draft model and prompt lookup were both asked for; choose one of them"
        )
    if num_draft_tokens is not None:
        if draft_model is None and not prompt_lookup:
            raise InvalidRequestError(
                "num_draft_tokens says how many tokens to draft, but nothing drafts; "
                "add a draft model or prompt lookup"
            )
        if not 1 <= num_draft_tokens <= MAX_DRAFT_TOKENS:
            raise InvalidRequestError(
                f"num_draft_tokens is {num_draft_tokens}, expected 1 to {MAX_DRAFT_TOKENS}"
            )
    if prompt_lookup:
        return PromptLookup(num_draft_tokens or MAX_DRAFT_TOKENS)
    if draft_model is None:
        return None
    own, other = model.config, draft_model.config
    if abs(own.vocab_size - other.vocab_size) > MAX_PADDING:
        raise InvalidRequestError(
            f"the draft model ({other.model_type}) has a vocabulary of {other.vocab_size} tokens, the model "
            f"({own.model_type}) one of {own.vocab_size}; a draft model must have the same vocabulary"
        )
    return DraftModel(draft_model, own.vocab_size, num_draft_tokens or NUM_DRAFT_TOKENS)


def check_same_vocabulary(tokenizer: Tokenizer, other: Tokenizer, name: str) -> None:
    """Raise InvalidRequestError where a token says something else to `other`, that of the draft model `name`."""
    special = tokenizer.special_ids | other.special_ids
    for index in range(min(tokenizer.vocab_size, other.vocab_size)):
        theirs, ours = other.id_to_token(index), tokenizer.id_to_token(index)
        if theirs != ours and index not in special:
            raise InvalidRequestError(
                f"token {index} is {theirs!r} to the draft model {name}, and {ours!r} to the model; "
                "a draft model must have the same vocabulary: choose one of the same family"
            )


def check_trimmable(
    model: LanguageModel[Cache], cache: Sequence[Cache], name: str = "the model"
) -> None:
    """Raise InvalidRequestError where rejected drafts could not be taken back from the cache."""
    if not all(layer.num_trimmable for layer in cache):
        raise InvalidRequestError(
            f"{name} ({model.config.model_type}) has a cache that cannot take back rejected drafts; "
            "generate without a draft model and prompt lookup"
        )
