"""The kernels' cache beside the other one: the same attention, whatever the window, the format, the rows, the trims."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_edge import ops
from mlx_edge.cache import AnyKVCache, KVCache, PagedKVCache, QuantizedRows
from mlx_edge.errors import InvalidRequestError
from mlx_edge.models.packing import pack_weight
from mlx_edge.ops import cpu

lacking = cpu.missing()
pytestmark = pytest.mark.skipif(lacking is not None, reason=f"no CPU kernels: {lacking}")

HEADS, KV_HEADS, DIM, HIDDEN = 4, 2, 32, 48
ROPE = ops.Rope(10000.0 ** (mx.arange(0, DIM, 2) / DIM), DIM)

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 40},
    "kept": {"window": 40, "keep": 4},
    "8 bit": {"row_format": QuantizedRows(8, 32)},
    "4 bit later": {"row_format": QuantizedRows(4, 32), "float_until": 50},
    "8 bit kept": {"row_format": QuantizedRows(8, 32), "window": 70, "keep": 4},
}


def make_layer(window: int | None = None) -> tuple[ops.AttentionWeights, ops.AttentionWeights]:
    """One layer, as plain arrays and packed."""
    mx.random.seed(3)

    def project(rows: int, columns: int) -> ops.Dense:
        return ops.Dense(mx.random.normal((rows, columns)) / columns**0.5)

    plain = ops.AttentionWeights(
        norm=ops.Norm(mx.ones(HIDDEN), 1e-5),
        q=project(HEADS * DIM, HIDDEN),
        k=project(KV_HEADS * DIM, HIDDEN),
        v=project(KV_HEADS * DIM, HIDDEN),
        o=project(HIDDEN, HEADS * DIM),
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        scale=DIM**-0.5,
        window=window,
    )
    packed = {name: pack_weight(getattr(plain, name)) for name in ("q", "k", "v", "o")}
    return plain, replace(plain, **packed)


def step(
    weights: ops.AttentionWeights, kv: AnyKVCache, x: mx.array, lengths: Sequence[int] | None = None
) -> np.ndarray:
    """One step of the layer; padding rows are zero."""
    starts = kv.offsets or (0,) * x.shape[0]
    counts = tuple(lengths or (x.shape[1],) * x.shape[0])
    if isinstance(kv, KVCache) and kv.writes_body:
        mx.synchronize()
    y = ops.attention_block(x, weights, kv, ROPE, ops.StepMeta(starts, counts, x.shape[1]))
    mx.eval(y, kv.arrays)
    found = np.array(y)
    for row, count in enumerate(counts):
        found[row, count:] = 0
    return found


def make_inputs(widths: Sequence[int], batch: int = 1) -> list[mx.array]:
    mx.random.seed(5)
    return [mx.random.normal((batch, width, HIDDEN)) for width in widths]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("widths", [(1,) * 5, (70, 1, 1), (33, 64, 3, 1), (200, 1)], ids=str)
def test_attends_as_the_other_cache_does(kind: str, widths: tuple[int, ...]) -> None:
    plain, packed = make_layer()
    ours, theirs = PagedKVCache(dtype=mx.float32, **KINDS[kind]), KVCache(**KINDS[kind])
    # A key whose last bit differs may be rounded to the neighbouring code.
    tolerance = 1e-5 if "bit" not in kind else 3e-2
    for x in make_inputs(widths):
        found = step(packed, ours, x)
        with ops.reference():
            wanted = step(plain, theirs, x)
        assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()
    assert ours.offsets == theirs.offsets
    assert ours.stored_bytes > 0


@pytest.mark.parametrize("limit", [10, 40, 100])
def test_a_layers_window_and_the_caches_limit_hold_together(limit: int) -> None:
    plain, packed = make_layer(window=50)
    options: dict[str, Any] = {"window": limit, "keep": 4} if limit < 50 else {"window": 50}
    ours, theirs = PagedKVCache(dtype=mx.float32, **options), KVCache(**options)
    for x in make_inputs((30, 45, 1, 1, 60, 1)):
        found = step(packed, ours, x)
        with ops.reference():
            wanted = step(plain, theirs, x)
        assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_batch_have_lengths_of_their_own(kind: str) -> None:
    _, packed = make_layer()
    lengths = [(70, 33, 1), (1, 1, 1), (5, 0, 3)]
    inputs = make_inputs((70, 1, 5), batch=3)
    together = PagedKVCache(dtype=mx.float32, **KINDS[kind])
    found = [step(packed, together, x, n) for x, n in zip(inputs, lengths, strict=True)]
    for row in range(3):
        if "later" in kind and row:
            continue  # rows of a batch are packed together, when the longest has enough positions
        alone = PagedKVCache(dtype=mx.float32, **KINDS[kind])
        for x, n, y in zip(inputs, lengths, found, strict=True):
            if n[row]:
                single = step(packed, alone, x[row : row + 1, : n[row]])
                assert np.array_equal(single[0], y[row, : n[row]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stored", [3, 45, 90, 200])
def test_a_state_goes_on_where_it_was_taken(kind: str, stored: int) -> None:
    _, packed = make_layer()
    first, second = make_inputs((stored, 1))
    cache = PagedKVCache(dtype=mx.float32, **KINDS[kind])
    step(packed, cache, first)
    again = PagedKVCache.from_state(cache.state())
    assert again.offsets == cache.offsets
    assert np.array_equal(step(packed, cache, second), step(packed, again, second))


@pytest.mark.parametrize("kind", ["plain", "window", "kept", "8 bit"])
@pytest.mark.parametrize("stored", [20, 63, 130, 300])
def test_trimmed_positions_never_were(kind: str, stored: int) -> None:
    _, packed = make_layer()
    first, drafts, second = make_inputs((stored, 9, 2))
    trimmed, straight = (PagedKVCache(dtype=mx.float32, **KINDS[kind]) for _ in range(2))
    for cache in (trimmed, straight):
        step(packed, cache, first)
    step(packed, trimmed, drafts)
    trimmed.trim(9)
    assert trimmed.offsets == straight.offsets
    assert np.array_equal(step(packed, trimmed, second), step(packed, straight, second))


def test_what_cannot_be_forgotten_is_refused() -> None:
    _, packed = make_layer()
    cache = PagedKVCache(window=40)
    for x in make_inputs((200, 100)):
        step(packed, cache, x)
    with pytest.raises(InvalidRequestError, match="cannot go back to position 50"):
        cache.trim(250)
    with pytest.raises(InvalidRequestError, match="301 positions cannot be forgotten"):
        cache.trim(301)
    assert cache.offset == 300
    with pytest.raises(InvalidRequestError, match="does not follow"):
        cache.begin(KV_HEADS, DIM, ops.StepMeta.uniform(7, batch_size=1, width=1))


def test_memory_stays_flat_over_ten_windows() -> None:
    _, packed = make_layer()
    cache = PagedKVCache(window=64, keep=4)
    sizes = []
    for x in make_inputs((64,) * 12):
        step(packed, cache, x)
        sizes.append(cache.nbytes)
    assert max(sizes[4:]) == sizes[4]


@pytest.mark.parametrize("kind", KINDS)
def test_reference_ops_read_it_too(kind: str) -> None:
    plain, packed = make_layer()
    mixed, native = (PagedKVCache(dtype=mx.float32, **KINDS[kind]) for _ in range(2))
    for index, x in enumerate(make_inputs((60, 1, 7, 30, 1))):
        wanted = step(packed, native, x)
        if index % 2:
            found = step(packed, mixed, x)
        else:
            with ops.reference():
                found = step(plain, mixed, x)
        assert np.abs(found - wanted).max() <= 3e-2 * np.abs(wanted).max()
        if "bit" not in kind:
            assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_halves_are_stored_for_halves() -> None:
    plain, packed = make_layer()
    cache, exact = PagedKVCache(), KVCache()
    for x in make_inputs((80, 1)):
        found = step(packed, cache, x)
        with ops.reference():
            wanted = step(plain, exact, x)
        assert 0 < np.abs(found - wanted).max() <= 2e-3 * np.abs(wanted).max()
    assert cache.state().rows[0]["body"][0].dtype == mx.float16


def test_no_step_waits_and_none_copies() -> None:
    _, packed = make_layer()
    cache = PagedKVCache()
    outputs = []
    for x in make_inputs((20, 1, 1, 40, 1)):  # none is evaluated before the last is asked for
        starts = cache.offsets or (0,)
        meta = ops.StepMeta(starts, (x.shape[1],), x.shape[1])
        outputs.append(ops.attention_block(x, packed, cache, ROPE, meta))
    again = PagedKVCache()
    wanted = [step(packed, again, x) for x in make_inputs((20, 1, 1, 40, 1))]
    mx.eval(outputs[-1], cache.arrays)  # the newest alone: those before it must run first
    assert np.array_equal(np.array(outputs[-1]), wanted[-1])


@pytest.mark.parametrize("shorter", [0, 7, 36], ids=lambda n: f"{n} fewer")
@pytest.mark.parametrize("kind", KINDS)
def test_a_fork_and_its_source_go_on_by_themselves(kind: str, shorter: int) -> None:
    _, packed = make_layer()
    first, drafts, one, other = make_inputs((100, 40, 70, 3))
    source = PagedKVCache(dtype=mx.float32, **KINDS[kind])
    for x in (first, drafts):
        step(packed, source, x)
    fork = source.fork(140 - shorter)
    assert fork.offsets == (140 - shorter,)
    straight = [PagedKVCache(dtype=mx.float32, **KINDS[kind]) for _ in range(2)]
    for cache, kept in zip(straight, (40, 40 - shorter), strict=True):
        step(packed, cache, first)
        step(packed, cache, drafts[:, :kept])
    caches = [source, fork]
    for x, y in ((one, other), (other, one), (one, one)):
        for cache, alone, rows in zip(caches, straight, (x, y), strict=True):
            assert np.array_equal(step(packed, cache, rows), step(packed, alone, rows))


def test_forks_share_pages_until_they_write_them() -> None:
    _, packed = make_layer()
    first, token = make_inputs((200, 1))
    source = PagedKVCache()
    step(packed, source, first)
    fork, short = source.fork(), source.fork(64)
    page = source.nbytes // 4
    assert (fork.nbytes, short.nbytes) == (4 * page, page)
    assert fork._store.shared_bytes == 4 * page
    step(packed, fork, token)  # into the last page, which the source has too
    assert (fork.nbytes, fork._store.shared_bytes) == (4 * page, 3 * page)
    step(packed, short, token)  # into a page of its own
    assert (short.nbytes, short._store.shared_bytes) == (2 * page, page)
    del fork, short
    assert source._store.shared_bytes == 0


def test_a_fork_of_what_is_gone_is_refused() -> None:
    _, packed = make_layer()
    first, second = make_inputs((200, 100))
    limited = PagedKVCache(window=40)
    later = PagedKVCache(**KINDS["4 bit later"])
    for cache in (limited, later):
        step(packed, cache, first)
        step(packed, cache, second)
    with pytest.raises(InvalidRequestError, match="cannot go back to position 50"):
        limited.fork(50)
    with pytest.raises(InvalidRequestError, match="packed from position 50 on"):
        later.fork(30)
    with pytest.raises(InvalidRequestError, match="first 301 positions; 300 are stored"):
        later.fork(301)
    assert later.fork(50).offset == 50
    assert PagedKVCache().fork().offset == PagedKVCache().fork(0).offset == 0


def test_rows_of_a_batch_are_forked_together() -> None:
    _, packed = make_layer()
    first, second = make_inputs((70, 2), batch=2)
    source = PagedKVCache(dtype=mx.float32)
    step(packed, source, first, (70, 33))
    fork = source.fork()
    assert fork.offsets == (70, 33)
    assert np.array_equal(step(packed, source, second), step(packed, fork, second))
    assert source.fork(20).offsets == (20, 20)
