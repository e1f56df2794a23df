"""The full cache: what it returns, where it merges, and that no step copies a body."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_edge import ops
from mlx_edge.cache import KVCache, prepare_step
from mlx_edge.cache.full import TAIL
from mlx_edge.errors import InvalidRequestError

SHAPE = (1, 2, 16)  # B, K, D


def store(cache: KVCache, keys: mx.array, values: mx.array) -> list[ops.Segment]:
    prepare_step([cache], keys.shape[2])
    meta = ops.StepMeta.uniform(cache.offset, batch_size=keys.shape[0], width=keys.shape[2])
    segments = list(cache.extend(keys, values, meta))
    mx.eval(cache.arrays)
    return segments


def random_rows(count: int) -> tuple[mx.array, mx.array]:
    batch, heads, dim = SHAPE
    return mx.random.normal((batch, heads, count, dim)), mx.random.normal(
        (batch, heads, count, dim)
    )


@pytest.mark.parametrize(
    "cuts",
    [[100], [1] * 70, [31, 1, 1], [32, 1], [33], [32, 32, 32], [5, 60, 1, 40], [64, 1, 31, 1]],
    ids=lambda cuts: "+".join(map(str, cuts[:4])),
)
def test_segments_hold_what_was_stored(cuts: list[int]) -> None:
    cache, stored = KVCache(), []
    for width in cuts:
        stored.append(random_rows(width))
        segments = store(cache, *stored[-1])
        for which, field in enumerate(("keys", "values")):
            found = mx.concatenate([getattr(s, field) for s in segments], axis=2)
            wanted = mx.concatenate([rows[which] for rows in stored], axis=2)
            assert np.array_equal(np.array(found), np.array(wanted))
        positions = mx.concatenate([s.positions for s in segments], axis=1)
        assert positions.tolist() == [list(range(cache.offset))]
        assert [(s.first, s.last) for s in segments][-1][1] == cache.offset - 1


def test_merging_depends_on_position_alone() -> None:
    for cuts in ([70], [1] * 70, [40, 30]):
        cache = KVCache()
        for width in cuts:
            store(cache, *random_rows(width))
        assert cache.merged == 64
        assert cache.offset - cache.merged <= TAIL


def test_reserved_body_never_grows() -> None:
    reserved, growing = KVCache(capacity=700), KVCache()
    for _ in range(700):
        rows = random_rows(1)
        store(reserved, *rows)
        store(growing, *rows)
    assert reserved.num_growths == 0
    assert growing.num_growths == 2  # 256, 512, 768 positions


def test_rows_of_different_lengths_are_refused() -> None:
    cache = KVCache()
    keys = mx.zeros((2, 1, 3, 4))
    with pytest.raises(InvalidRequestError, match="same length"):
        cache.extend(keys, keys, ops.StepMeta((0, 0), (3, 2), 3))


class Attending:
    """Layers that only append and attend, with a cache whose body is large beside everything else."""

    def __init__(self, num_layers: int, length: int) -> None:
        self.caches = [KVCache(capacity=length + 200) for _ in range(num_layers)]
        self.rows = mx.random.normal((1, 8, 1, 64))
        long = mx.random.normal((1, 8, length, 64))
        self.step(long)
        mx.eval([a for cache in self.caches for a in cache.arrays])

    def step(self, rows: mx.array) -> mx.array:
        prepare_step(self.caches, rows.shape[2])
        meta = ops.StepMeta.uniform(self.caches[0].offset, batch_size=1, width=rows.shape[2])
        x = rows
        last = ops.StepMeta.uniform(self.caches[0].offset + meta.width - 1, batch_size=1, width=1)
        for cache in self.caches:
            x = rows + ops.attention(x[:, :, -1:], cache.extend(x, x, meta), last, scale=0.1)
        return x

    def body_bytes(self) -> int:
        body = self.caches[0].body
        assert body is not None
        return body.nbytes

    def decode(self, count: int) -> None:
        """`count` steps, always two in flight."""
        before = self.step(self.rows)
        mx.async_eval(before)
        for _ in range(count - 1):
            after = self.step(self.rows + 0 * before)
            mx.async_eval(after)
            mx.eval(before)
            before = after
        mx.eval(before)


@pytest.mark.parametrize("num_layers", [1, 4])
def test_no_step_copies_a_body_with_two_steps_in_flight(num_layers: int) -> None:
    model = Attending(num_layers, 4096)
    # Only the size: a reference to the body would itself force a copy.
    body_bytes = model.body_bytes()
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    model.decode(3 * TAIL + 5)
    mx.synchronize()
    taken = mx.get_peak_memory() - before
    assert all(cache.num_growths == 0 for cache in model.caches)
    assert taken < body_bytes / 4
