"""One step: the rows of many sequences through the model in one pass, and the tokens that are chosen after it.

Each token is chosen as `decoding/` chooses it. Greedy rows that nothing else touches share one log_softmax and one
argmax, which give each row the values that it has alone; a grammar's mask is made while the pass runs; drafts are
further rows of the same pass, of which those that came true are kept. Knows nothing of scheduling and of texts.
"""

from collections.abc import Sequence as List
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlx_edge import ops
from mlx_edge.decoding.loop import explained, value_of
from mlx_edge.engine.sequence import Sequence
from mlx_edge.models.interface import LanguageModel, run_sequences


@dataclass(eq=False)
class Turn:
    """What one sequence brings to a step, and what comes of it."""

    sequence: Sequence
    num_tokens: int
    drafts: List[int] = ()
    num_new: int = field(default=0, init=False)  # tokens chosen
    num_true: int = field(default=0, init=False)  # drafts that came true
    has_ended: bool = field(default=False, init=False)
    error: Exception | None = field(default=None, init=False)  # this sequence's own
    num_kept: int = field(init=False)  # rows with logits: none inside a prompt
    first_row: int = field(default=0, init=False)  # of its logits

    def __post_init__(self) -> None:
        is_last = self.num_tokens == self.sequence.pending
        self.num_kept = 1 + len(self.drafts) if is_last else 0


@explained()
def run_step(model: LanguageModel[Any], turns: List[Turn]) -> None:
    """Read what the turns bring, and choose the tokens that follow.

    An error in a turn is that sequence's own, and the others are sound. What is raised may be anybody's: the caches
    of all these sequences are then in an unknown state.
    """
    tokens: list[int] = []
    rows = 0
    for turn in turns:
        sequence = turn.sequence
        begin = sequence.num_stored
        tokens += sequence.context[begin : begin + turn.num_tokens]
        tokens += turn.drafts
        turn.first_row = rows
        rows += turn.num_kept
    caches = [turn.sequence.caches for turn in turns]
    lengths = [turn.num_tokens + len(turn.drafts) for turn in turns]
    kept = [turn.num_kept for turn in turns]
    choosing = [turn for turn in turns if turn.num_kept]
    images = [turn.sequence.images for turn in turns]
    logits = run_sequences(
        model,
        mx.array(tokens, dtype=mx.int32),
        caches,
        lengths,
        kept,
        images if any(own is not None for own in images) else (),
    )
    stored = [array for cache in caches for layer in cache for array in layer.arrays]
    _Chooser(logits, choosing, rows).choose(stored)
    del stored
    for turn in turns:
        _keep(turn)


class _Chooser:
    """From the logits (N, V) of a step to tokens."""

    def __init__(self, logits: mx.array, turns: List[Turn], num_rows: int) -> None:
        self._logits = logits
        self._plain = [t for t in turns if t.sequence.is_plain and t.sequence.constraint is None]
        plain = set(self._plain)
        self._others = [t for t in turns if t not in plain]
        self._num_rows = num_rows
        self._picked: dict[Turn, tuple[mx.array, mx.array]] = {}

    def choose(self, stored: list[mx.array]) -> None:
        """Compute the step; `stored` is what else it leaves to be computed."""
        shared = self._share() if self._plain else None
        free = [turn for turn in self._others if turn.sequence.constraint is None]
        self._pick(free)
        held = [turn for turn in self._others if turn.sequence.constraint is not None]
        started = [array for pair in self._picked.values() for array in pair]
        started += [] if shared is None else [shared]
        mx.async_eval(started, stored, self._logits if held else [])  # type: ignore[no-untyped-call]
        self._pick(held)  # their masks are made while the pass runs
        mx.eval(started, [array for pair in self._picked.values() for array in pair], stored)
        if shared is not None:
            values: list[int] = shared.tolist()  # type: ignore[assignment]
            self._take_shared(values)
        for turn in self._others:
            _guard(turn, self._take_one_by_one)

    def _share(self) -> mx.array:
        """The likeliest token of each row (N,) of the plain turns, in their order."""
        logits = self._logits
        rows = [t.first_row + i for t in self._plain for i in range(t.num_kept)]
        if len(rows) < self._num_rows:
            logits = logits[mx.array(rows)]
        return ops.argmax(ops.log_softmax(logits))

    def _row(self, turn: Turn, index: int) -> mx.array:
        first = turn.first_row + index
        return self._logits[first : first + 1]

    def _pick(self, turns: List[Turn]) -> None:
        """Begin to choose each one's first token."""

        def pick(turn: Turn) -> None:
            sequence = turn.sequence
            self._picked[turn] = sequence.choice.pick(self._row(turn, 0), sequence.constraint)

        for turn in turns:
            _guard(turn, pick)

    def _take_shared(self, values: list[int]) -> None:
        begin = 0
        for turn in self._plain:
            own = values[begin : begin + turn.num_kept]
            begin += turn.num_kept

            def take(turn: Turn, own: list[int] = own) -> None:
                for index, value in enumerate(own):
                    if not _take(turn, index, value, None):
                        break

            _guard(turn, take)

    def _take_one_by_one(self, turn: Turn) -> None:
        """A token that is no longer drafted ends it; each choice waits for the token before it."""
        sequence = turn.sequence
        token, row = self._picked[turn]
        index = 0
        while _take(turn, index, value_of(token), row):
            index += 1
            token, row = sequence.choice.pick(self._row(turn, index), sequence.constraint)
            mx.eval(token, row)


def _take(turn: Turn, index: int, value: int, row: mx.array | None) -> bool:
    """Give the sequence its next token; whether it was drafted, and the row after it counts."""
    turn.num_new += 1
    turn.has_ended = turn.sequence.take(value, row)
    is_true = index < len(turn.drafts) and turn.drafts[index] == value
    turn.num_true += is_true
    return is_true and not turn.has_ended


def _guard(turn: Turn, work: Any) -> None:
    """Do a turn's own work; what is raised is its own error, unless memory has run out, which may be anybody's."""
    if turn.error is not None:
        return
    try:
        work(turn)
    except MemoryError:
        raise
    except Exception as error:
        if ops.is_failure(error):  # of the step
            raise
        turn.error = error


def _keep(turn: Turn) -> None:
    """Count what the cache holds now, and take the drafts that did not come true out of it."""
    sequence = turn.sequence
    if turn.error is not None:
        return
    # Of n new tokens the last one does not count as stored; those before it were drafts.
    num_followed = max(0, turn.num_new - 1)
    surplus = len(turn.drafts) - num_followed
    sequence.drafted += len(turn.drafts)
    sequence.accepted += turn.num_true
    sequence.num_stored += turn.num_tokens + num_followed
    if surplus:
        for layer in sequence.caches:
            layer.trim(surplus)
