"""The state of a layer's cache: a cache that was taken apart and put together goes on bit for bit."""

import json
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_edge import ops
from mlx_edge.cache import CacheFacts, CacheState, KVCache, QuantizedRows, prepare_step
from mlx_edge.cache.layer import TAIL
from mlx_edge.errors import ModelFormatError

HEADS, KV_HEADS, DIM = 4, 2, 32
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "window": {"window": 50},
    "narrow": {"window": 1},
    "kept prefix": {"window": 40, "keep": 4},
    "wide prefix": {"window": 33, "keep": 37},
    "8 bit": {"row_format": QuantizedRows(8, 32)},
    "4 bit window": {"row_format": QuantizedRows(4, 32), "window": 40, "keep": 3},
    "float until later": {"row_format": QuantizedRows(8, 32), "float_until": 75},
    "float window until later": {
        "row_format": QuantizedRows(4, 32),
        "float_until": 75,
        "window": 33,
        "keep": 5,
    },
}
STEPS: dict[str, list[tuple[int, ...]]] = {
    "alike": [(5, 5), (60, 60), (1, 1), (31, 31), (33, 33), (1, 1), (1, 1)],
    "whole tails": [(32, 32), (32, 32), (1, 1), (63, 63), (1, 1)],
    "one row": [(70,), (1,), (100,), (1,), (2,)],
    "ragged": [(3, 40), (1, 1), (30, 2), (1, 1), (33, 33), (1, 1)],
    "very ragged": [(130, 1), (1, 1), (1, 40), (2, 0), (1, 1)],
}


def step(caches: list[KVCache], lengths: tuple[int, ...]) -> list[np.ndarray]:
    """The same step on every cache; what the real queries get."""
    batch, width = len(lengths), max(lengths)
    keys, values = (mx.random.normal((batch, KV_HEADS, width, DIM)) for _ in range(2))
    q = mx.random.normal((batch, HEADS, width, DIM))
    results = []
    for cache in caches:
        meta = ops.StepMeta(cache.offsets or (0,) * batch, lengths, width)
        prepare_step([cache])
        found = ops.attention(q, cache.extend(keys, values, meta), meta, scale=0.2)
        mx.eval(found, cache.arrays)
        results.append([np.array(found)[row, :, :n] for row, n in enumerate(lengths)])
    return [np.concatenate([r.reshape(-1) for r in rows]) for rows in results]


def restored(state: CacheState) -> KVCache:
    """The cache of a state whose facts went through JSON."""
    facts = CacheFacts.from_json(json.loads(json.dumps(state.facts.to_json())))
    assert facts == state.facts
    return KVCache.from_state(CacheState(facts, state.rows))


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("kind", KINDS)
def test_restored_cache_goes_on_bit_for_bit(kind: str, steps: list[tuple[int, ...]]) -> None:
    never_saved = KVCache(**KINDS[kind])
    asked = KVCache(**KINDS[kind])  # a cache whose state was taken goes on, too
    caches = [never_saved, asked]
    for lengths in steps:
        found = step(caches, lengths)
        assert all(np.array_equal(found[0], other) for other in found[1:])
        caches.append(restored(asked.state()))


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_held_is_in_a_state(kind: str) -> None:
    cache = KVCache(capacity=5000, **KINDS[kind])
    step([cache], (70, 3))
    held = {
        (row, part): planes[0].shape[1:4:2]
        for row, part, planes in cache.state().planes()
        if part != "prefix"
    }
    limit = 64 if cache.window is None else (-(-(cache.window - 1) // TAIL) + 1) * TAIL
    assert held == {
        (0, "body"): (1, min(64, limit)),
        (0, "tail"): (1, 6),
        (1, "tail"): (1, 3),
    }


GOOD = KVCache(row_format=QuantizedRows(8, 32), window=40, keep=4)


@pytest.mark.parametrize(
    "change",
    [
        {"window": 0},
        {"window": "40"},
        {"window": 1 << 40},
        {"keep": -1},
        {"keep": True},
        {"packed": [3, 32]},
        {"packed": [8]},
        {"packed": "8"},
        {"packed": [8, None]},
        {"packed": None},
        {"float_until": 1.5},
        {"is_float": 0},
        {"offsets": []},
        {"offsets": [-1]},
        {"offsets": [5] * 2000},
        {"offsets": {"0": 5}},
        {"more": 1},
    ],
    ids=str,
)
def test_facts_that_nobody_wrote_are_refused(change: dict[str, Any]) -> None:
    step([GOOD], (1,))
    facts = GOOD.state().facts.to_json()
    assert CacheFacts.from_json(facts)
    with pytest.raises(ModelFormatError):
        CacheFacts.from_json(facts | change)
    for key in facts:
        with pytest.raises(ModelFormatError):
            CacheFacts.from_json({k: v for k, v in facts.items() if k != key})
