"""Many sequences in one pass: each gets what it gets alone, whoever stands beside it, and forks go on by themselves."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_edge import load, ops
from mlx_edge.cache import AnyKVCache, KVCache, PagedKVCache, QuantizedRows
from mlx_edge.errors import InvalidRequestError
from mlx_edge.models.decoder import Decoder
from mlx_edge.models.interface import row_is_exact, run_sequences
from mlx_edge.ops import cpu, metal

lacking = cpu.missing()
needs_kernels = pytest.mark.skipif(lacking is not None, reason=f"no CPU kernels: {lacking}")

VOCAB_SIZE = 2048
Piece = tuple[list[int], int, int]  # tokens of a step, how many have logits, how many are forgotten
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"max_kv_size": 60},
    "8 bit": {"row_format": QuantizedRows(8, 64)},
    "4 bit": {"row_format": QuantizedRows(4, 32)},
    "8 bit later": {"row_format": QuantizedRows(8, 64), "float_until": 40},
    "4 bit in a window": {"row_format": QuantizedRows(4, 64), "float_until": 30, "max_kv_size": 80},
}


@pytest.fixture(scope="module")
def model() -> Decoder:
    found, _ = load("pocket")
    assert isinstance(found, Decoder)
    return found


@dataclass
class Story:
    """One sequence: the pieces that its steps brought, and the logits of each."""

    kind: str
    cache: list[AnyKVCache]
    pieces: list[Piece] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)

    @staticmethod
    def begin(model: Decoder, kind: str) -> "Story":
        return Story(kind, model.make_cache(**KINDS[kind]))

    def replay(self, model: Decoder) -> Iterator[np.ndarray]:
        """The logits of each piece, in the same steps without company."""
        cache = model.make_cache(**KINDS[self.kind])
        for tokens, kept, forgotten in self.pieces:
            y = model(mx.array([tokens], dtype=mx.int32), cache)[0, len(tokens) - kept :]
            mx.eval(y, [kv.arrays for kv in cache])
            for kv in cache:
                kv.trim(forgotten)
            yield np.array(y)
        assert [kv.offsets for kv in cache] == [kv.offsets for kv in self.cache]

    def check(self, model: Decoder) -> None:
        for found, wanted in zip(self.logits, self.replay(model), strict=True):
            assert np.array_equal(found, wanted)


def step(model: Decoder, sequences: Sequence[Story], pieces: Sequence[Piece]) -> None:
    tokens = mx.array([token for piece, _, _ in pieces for token in piece], dtype=mx.int32)
    keeps = [kept for _, kept, _ in pieces]
    caches = [sequence.cache for sequence in sequences]
    logits = run_sequences(model, tokens, caches, [len(piece) for piece, _, _ in pieces], keeps)
    mx.eval(logits, [kv.arrays for cache in caches for kv in cache])
    assert logits.shape == (sum(keeps), VOCAB_SIZE)
    rows = np.split(np.array(logits), np.cumsum(keeps)[:-1])
    for sequence, piece, own in zip(sequences, pieces, rows, strict=True):
        sequence.pieces.append(piece)
        sequence.logits.append(own)
        for kv in sequence.cache:
            kv.trim(piece[2])


def draw_piece(random: Random, is_new: bool, count: int = 0) -> Piece:
    """A chunk of a prompt without logits or with the last, a decoded token, or drafts of which some are rejected."""
    kind = "chunk" if is_new else random.choice(["chunk", "token", "token", "token", "drafts"])
    size = {"chunk": random.randint(1, 90), "token": 1, "drafts": random.randint(2, 9)}[kind]
    count = count or size
    kept = {"chunk": random.randint(0, 1), "token": 1, "drafts": count}[kind]
    forgotten = random.randint(0, count - 1) if kind == "drafts" else 0
    return [random.randrange(VOCAB_SIZE) for _ in range(count)], kept, forgotten


def play(model: Decoder, seed: int, num_steps: int, kinds: Sequence[str]) -> list[Story]:
    """Sequences that come and go, in a changing order; caches of all kinds in one step."""
    random = Random(seed)
    running: list[Story] = []
    over: list[Story] = []
    for _ in range(num_steps):
        while len(running) < 2 or (len(running) < 6 and random.random() < 0.4):
            kind = kinds[(len(running) + len(over)) % len(kinds)]
            running.append(Story.begin(model, kind))
        if len(running) > 2 and random.random() < 0.3:
            over.append(running.pop(random.randrange(len(running))))
        random.shuffle(running)
        present = running[: random.randint(1, len(running))]
        step(model, present, [draw_piece(random, not s.pieces) for s in present])
    return [sequence for sequence in over + running if sequence.pieces]


@needs_kernels
@pytest.mark.parametrize("kind", [*KINDS, "all"])
def test_a_sequence_gets_the_bits_that_it_gets_alone(model: Decoder, kind: str) -> None:
    kinds = list(KINDS) if kind == "all" else [kind]
    assert row_is_exact(model) is None
    for sequence in play(model, seed=len(kind), num_steps=12, kinds=kinds):
        assert isinstance(sequence.cache[0], PagedKVCache)
        sequence.check(model)


@needs_kernels
def test_a_sequence_may_straddle_slices(model: Decoder) -> None:
    """The kernels take 256 rows at a time: chunks lie across that line, and behind it."""
    random = Random(1)
    sequences = [Story.begin(model, "plain") for _ in range(5)]
    for lengths in [(200, 130, 1, 255, 3), (1, 1, 300, 1, 1)]:
        pieces = [([random.randrange(VOCAB_SIZE) for _ in range(n)], min(n, 5), 0) for n in lengths]
        step(model, sequences, pieces)
    for sequence in sequences:
        sequence.check(model)


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_forks_meet_in_one_step(model: Decoder, kind: str) -> None:
    """A common beginning, from which two sequences go on beside the one that made it."""
    random = Random(3)
    source = Story.begin(model, kind)
    piece = draw_piece(random, is_new=True, count=70)
    step(model, [source], [piece])
    forks = [Story(kind, [kv.fork(length) for kv in source.cache]) for length in (70, 66)]
    for story, length in zip(forks, (70, 66), strict=True):
        story.pieces.append((piece[0], 0, 70 - length))
        story.logits.append(np.zeros((0, VOCAB_SIZE), np.float32))
    for _ in range(3):
        stories = [source, *forks]
        random.shuffle(stories)
        step(model, stories, [draw_piece(random, is_new=False) for _ in stories])
    for story in (source, *forks):
        story.check(model)


@needs_kernels
def test_steps_need_not_be_evaluated_one_by_one(model: Decoder) -> None:
    """Sequences with tickets of their own meet, part and meet again; only the last logits are asked for."""
    random = Random(2)
    tokens = [[random.randrange(VOCAB_SIZE) for _ in range(6)] for _ in range(3)]
    caches = [model.make_cache() for _ in range(3)]
    for at, present in enumerate([(0, 1), (2,), (1, 2), (2, 1, 0), (0,), (0, 1, 2)]):
        ids = mx.array([tokens[i][at] for i in present], dtype=mx.int32)
        logits = model.run_sequences(
            ids, [caches[i] for i in present], [1] * len(present), [1] * len(present)
        )
    mx.eval(logits)
    seen = [[0, 3, 4, 5], [0, 2, 3, 5], [1, 2, 3, 5]]
    for i, steps in enumerate(seen):
        own = mx.array([[tokens[i][at] for at in steps]], dtype=mx.int32)
        assert np.array_equal(np.array(logits[i]), np.array(model(own, model.make_cache())[0, -1]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_close_to_each_alone(model: Decoder, kind: str) -> None:
    with ops.reference():
        for sequence in play(model, seed=5, num_steps=4, kinds=[kind]):
            assert isinstance(sequence.cache[0], KVCache)
            for found, wanted in zip(sequence.logits, sequence.replay(model), strict=True):
                # A key whose last bit differs may be rounded to the neighbouring code.
                tolerance = 0.1 if "bit" in kind else 1e-4
                assert np.allclose(
                    found, wanted, rtol=0, atol=tolerance * np.abs(wanted).max(initial=1)
                )
        assert "depend" in (row_is_exact(model) or "")


def test_the_metal_kernels_give_a_short_step_the_bits_of_each_alone() -> None:
    lacking = metal.missing_for_emulator()
    if lacking is not None:
        pytest.skip(f"no emulated GPU: {lacking}")
    launched: list[str] = []

    def note(op: str, backend: str, compute: Any, args: Any, kwargs: Any) -> Any:
        launched.append(f"{op} on {backend}")
        return compute()

    with ops.use("emulated"), ops.observe(note):
        model, _ = load("pocket")
        assert isinstance(model, Decoder)
        sequences = [Story.begin(model, kind) for kind in ("plain", "8 bit", "plain")]
        step(model, sequences, [([5, 6, 7], 1, 0), ([8], 1, 0), ([9, 10], 2, 1)])
        step(model, sequences[::-1], [([11], 1, 0), ([12], 1, 0), ([13], 1, 0)])
        assert launched.count("attention_block on emulated") == 2 * len(model.layers)
        for sequence in sequences:
            sequence.check(model)


def test_a_model_that_takes_one_sequence_runs_them_one_by_one() -> None:
    pytest.importorskip(
        "mlx_lm", reason="mlx-lm is not installed, whose definitions the bridge runs"
    )
    bridged, _ = load("pocket", bridge="mlx-lm")
    caches = [bridged.make_cache() for _ in range(3)]
    alone = [bridged.make_cache() for _ in range(3)]
    for pieces, kept in [([[5, 6, 7], [8], [9, 10]], [1, 0, 2]), ([[1], [2, 3], [4]], [1, 1, 1])]:
        tokens = mx.array([token for piece in pieces for token in piece])
        found = run_sequences(bridged, tokens, caches, [len(piece) for piece in pieces], kept)
        parts = [bridged(mx.array([p]), c)[0] for p, c in zip(pieces, alone, strict=True)]
        wanted = mx.concatenate(
            [part[len(part) - n :] for part, n in zip(parts, kept, strict=True)]
        )
        assert mx.allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert [cache[0].offset for cache in caches] == [4, 3, 3]
    assert "by itself" in (row_is_exact(bridged) or "")


@pytest.mark.parametrize(
    ("lengths", "kept", "message"),
    [
        ([2, 2], [1, 1], "5 tokens for sequences of 4 together"),
        ([2, 3], [3, 1], "logits of 3"),
        ([0, 5], [0, 1], "at least one token"),
        ([5], [1], "2 caches, 1 lengths"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(
    model: Decoder, lengths: list[int], kept: list[int], message: str
) -> None:
    caches = [model.make_cache(), model.make_cache()]
    with pytest.raises(InvalidRequestError, match=message):
        model.run_sequences(mx.arange(5), caches, lengths, kept)
    assert [kv.offset for cache in caches for kv in cache] == [0] * 8


def test_one_cache_serves_one_sequence(model: Decoder) -> None:
    cache = model.make_cache()
    with pytest.raises(InvalidRequestError, match="fork it first"):
        model.run_sequences(mx.arange(2), [cache, cache], [1, 1], [1, 1])
