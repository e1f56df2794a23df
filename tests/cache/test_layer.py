"""The cache of one layer, of every kind: attention over its segments is attention over what was stored."""

import ctypes
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_edge import ops
from mlx_edge.cache import KVCache, QuantizedRows, prepare_step
from mlx_edge.cache.layer import TAIL
from mlx_edge.cache.quantized import dequantize_float64
from mlx_edge.errors import InvalidRequestError
from tests.ops import oracle

HEADS, KV_HEADS, DIM = 4, 2, 32
SCALE = DIM**-0.5


@dataclass
class Checked:
    """A cache beside a plain record of all that went in; every step's attention is compared in float64."""

    cache: KVCache
    keys: list[np.ndarray] = field(default_factory=list)  # per row of the batch: (K, S, D)
    values: list[np.ndarray] = field(default_factory=list)

    def step(self, lengths: tuple[int, ...]) -> None:
        batch, width = len(lengths), max(lengths)
        keys, values = (mx.random.normal((batch, KV_HEADS, width, DIM)) for _ in range(2))
        q = mx.random.normal((batch, HEADS, width, DIM))
        meta = ops.StepMeta(self.cache.offsets or (0,) * batch, lengths, width)
        prepare_step([self.cache])
        segments = self.cache.extend(keys, values, meta)
        found = ops.attention(q, segments, meta, scale=SCALE)
        mx.eval(found, self.cache.arrays)
        self._record(self.keys, self._as_stored(keys), lengths)
        self._record(self.values, self._as_stored(values), lengths)
        for row, length in enumerate(lengths):
            wanted = self._attend(oracle.f64(q)[row, :, :length], row, meta.starts[row])
            assert np.abs(oracle.f64(found)[row, :, :length] - wanted).max(initial=0) < 1e-5

    def _as_stored(self, rows: mx.array) -> np.ndarray:
        if not isinstance(self.cache.row_format, QuantizedRows):
            return oracle.f64(rows)
        planes = self.cache.row_format.encode(mx.stack([rows, rows]))
        return dequantize_float64(self.cache.row_format.split(planes)[0])

    @staticmethod
    def _record(store: list[np.ndarray], rows: np.ndarray, lengths: tuple[int, ...]) -> None:
        for row, length in enumerate(lengths):
            new = rows[row, :, :length]
            if len(store) <= row:
                store.append(new)
            else:
                store[row] = np.concatenate([store[row], new], axis=1)

    def _attend(self, q: np.ndarray, row: int, start: int) -> np.ndarray:
        queries = np.arange(start, start + q.shape[1])[:, None]
        stored = np.arange(self.keys[row].shape[1])[None]
        seen = stored <= queries
        if self.cache.window is not None:
            seen &= (stored > queries - self.cache.window) | (stored < self.cache.keep)
        keys, values = (
            np.repeat(a, HEADS // KV_HEADS, axis=0) for a in (self.keys[row], self.values[row])
        )
        scores = np.where(seen, np.einsum("hld,hsd->hls", q, keys) * SCALE, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True, initial=-1e30))
        return np.einsum("hls,hsd->hld", weights / weights.sum(-1, keepdims=True), values)


KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "window": {"window": 50},
    "narrow": {"window": 1},
    "kept prefix": {"window": 40, "keep": 4},
    "wide prefix": {"window": 33, "keep": 37},
    "8 bit": {"row_format": QuantizedRows(8, 32)},
    "4 bit window": {"row_format": QuantizedRows(4, 32), "window": 40, "keep": 3},
}
CUTS = [
    [100],
    [1] * 70,
    [31, 1, 1, 33, 1, 200, 1, 1],
    [32, 1, 31, 2, 32, 32, 5],
    [5, 60, 1, 40, 40, 1],
    [64, 1, 31, 1, 20, 20, 20, 20],
]


@pytest.mark.parametrize("cuts", CUTS, ids=lambda cuts: "+".join(map(str, cuts[:5])))
@pytest.mark.parametrize("kind", KINDS)
def test_attention_over_the_segments(kind: str, cuts: list[int]) -> None:
    checked = Checked(KVCache(**KINDS[kind]))
    for width in cuts:
        checked.step((width, width))


RAGGED = [
    [(3, 40), (1, 1), (30, 2), (1, 1), (33, 33), (1, 1)],
    [(70, 1), (1, 1), (1, 40), (2, 0), (1, 1)],
    [(0, 5), (31, 31), (1, 1), (1, 1)],
]


@pytest.mark.parametrize("steps", RAGGED, ids=["longer second", "longer first", "empty row"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_different_lengths(kind: str, steps: list[tuple[int, ...]]) -> None:
    checked = Checked(KVCache(**KINDS[kind]))
    for lengths in steps:
        checked.step(lengths)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 80), st.integers(1, 80)), min_size=1, max_size=6),
    st.sampled_from(sorted(KINDS)),
)
def test_any_steps(steps: list[tuple[int, int]], kind: str) -> None:
    checked = Checked(KVCache(**KINDS[kind]))
    for lengths in steps:
        checked.step(lengths)


def test_reserved_body_never_grows() -> None:
    reserved, growing = Checked(KVCache(capacity=700)), Checked(KVCache())
    for _ in range(10):
        reserved.step((65,))
        growing.step((65,))
    assert reserved.cache.num_growths == 0
    assert growing.cache.num_growths == 2  # 256, 512, 768 positions


def test_memory_of_a_window_is_flat() -> None:
    checked = Checked(KVCache(window=64, keep=4))
    sizes = []
    for _ in range(70):
        checked.step((10,))
        sizes.append(checked.cache.nbytes)
    assert checked.cache.offset > 10 * 64
    assert max(sizes) == sizes[20] == sizes[-1]


def test_packed_rows_take_their_share_of_memory() -> None:
    sizes = {}
    for bits in (4, 8, 16):
        cache = KVCache(row_format=QuantizedRows(bits, 64)) if bits < 16 else KVCache()
        for start in range(0, 512, 32):
            rows = mx.zeros((1, 2, 32, 64), mx.float16)
            cache.extend(rows, rows, ops.StepMeta.uniform(start, batch_size=1, width=32))
        sizes[bits] = cache.nbytes
    assert sizes[4] <= 0.35 * sizes[16]
    assert sizes[8] <= 0.6 * sizes[16]


def test_positions_that_do_not_follow_are_refused() -> None:
    keys = mx.zeros((1, 1, 3, 4))
    with pytest.raises(InvalidRequestError, match="does not follow"):
        KVCache().extend(keys, keys, ops.StepMeta((7,), (3,), 3))


@pytest.mark.parametrize(("bits", "group_size"), [(3, 64), (4, 16)])
def test_formats_that_do_not_exist_are_refused(bits: int, group_size: int) -> None:
    with pytest.raises(InvalidRequestError, match="expected bits of 4 or 8"):
        QuantizedRows(bits, group_size)


def test_heads_that_do_not_divide_into_groups_are_refused() -> None:
    keys = mx.zeros((1, 1, 3, 48))
    cache = KVCache(row_format=QuantizedRows(4, 32))
    with pytest.raises(InvalidRequestError, match="heads of 48 do not divide"):
        cache.extend(keys, keys, ops.StepMeta.uniform(0, batch_size=1, width=3))


class Attending:
    """Layers that only append and attend, with caches whose bodies are large beside everything else."""

    def __init__(self, num_layers: int, length: int, **kind: Any) -> None:
        self.caches = [KVCache(capacity=length + 200, **kind) for _ in range(num_layers)]
        self.row = mx.random.normal((1, 8, 1, 64))
        self.step(mx.random.normal((1, 8, length, 64)))
        mx.eval([a for cache in self.caches for a in cache.arrays])
        self.decode(1)  # merges the long chunk

    def body_bytes(self) -> int:
        # Only the size: a reference to a body would itself force a copy.
        return max(a.nbytes for a in self.caches[0].arrays)

    def bodies(self) -> list[mx.array]:
        size = self.body_bytes()
        return [a for cache in self.caches for a in cache.arrays if a.nbytes == size]

    def step(self, rows: mx.array) -> mx.array:
        width, start = rows.shape[2], self.caches[0].offset
        prepare_step(self.caches)
        meta = ops.StepMeta.uniform(start, batch_size=1, width=width)
        last = ops.StepMeta.uniform(start + width - 1, batch_size=1, width=1)
        x = rows
        for cache in self.caches:
            segments = cache.extend(x, x, meta)
            x = rows + ops.attention(x[:, :, -1:], segments, last, scale=0.1)
        return x

    def decode(self, count: int) -> None:
        """`count` steps, always two in flight."""
        before = self.step(self.row)
        mx.async_eval(before)
        for _ in range(count - 1):
            after = self.step(self.row + 0 * before)
            mx.async_eval(after)
            mx.eval(before)
            before = after
        mx.eval(before)


LARGE: dict[str, dict[str, Any]] = {
    "full": {},
    "window": {"window": 3000, "keep": 4},
    "8 bit": {"row_format": QuantizedRows(8, 64)},
    "4 bit window": {"row_format": QuantizedRows(4, 64), "window": 3000},
}


def address(array: mx.array) -> int:
    """Where an array's data lies."""
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    capsule = array.__dlpack__()
    found = ctypes.c_void_p.from_address(get(capsule, b"dltensor")).value
    assert found is not None
    return found


@pytest.mark.parametrize("num_layers", [1, 4])
@pytest.mark.parametrize("kind", LARGE.values(), ids=LARGE)
def test_no_step_reallocates_a_body_with_two_steps_in_flight(
    kind: dict[str, Any], num_layers: int
) -> None:
    model = Attending(num_layers, 4096, **kind)
    mx.synchronize()
    before = [address(a) for a in model.bodies()]
    for count in (1, 7, TAIL + 1, 2, 2 * TAIL):  # several looks, so that no copy comes back unseen
        model.decode(count)
        mx.synchronize()
        assert [address(a) for a in model.bodies()] == before
    assert all(cache.num_growths == 0 for cache in model.caches)


@pytest.mark.parametrize("num_layers", [1, 4])
@pytest.mark.parametrize("kind", ["full", "window"])  # MLX's packed product copies slices on a CPU
def test_no_step_copies_a_body_with_two_steps_in_flight(kind: str, num_layers: int) -> None:
    model = Attending(num_layers, 4096, **LARGE[kind])
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    model.decode(3 * TAIL + 5)
    mx.synchronize()
    taken = mx.get_peak_memory() - before
    assert taken < model.body_bytes() / 4


@pytest.mark.parametrize("kind", [{}, {"window": 50, "keep": 4}], ids=["full", "window"])
def test_rows_become_packed_where_asked(kind: dict[str, Any]) -> None:
    packed = QuantizedRows(8, 32)
    cache = KVCache(row_format=packed, float_until=70, **kind)
    always = KVCache(row_format=packed, **kind)
    for width in (33, 32, 1, 3, 1, 1, 40, 1):
        was_float = cache.offset < 70
        rows = [mx.random.normal((1, KV_HEADS, width, DIM)) for _ in range(2)]
        q = mx.random.normal((1, HEADS, width, DIM))
        meta = ops.StepMeta.uniform(cache.offset, batch_size=1, width=width)
        found, wanted = (
            ops.attention(q, c.extend(*rows, meta), meta, scale=SCALE) for c in (cache, always)
        )
        assert (cache.row_format != packed) == was_float
        # Floats until then, the same packs from then on.
        assert np.allclose(oracle.f64(found), oracle.f64(wanted), atol=0.05 if was_float else 1e-6)


def run_alike(
    caches: list[KVCache], lengths: tuple[int, ...], width: int | None = None
) -> list[np.ndarray]:
    """The same random step on each; what attention gives."""
    batch, width = len(lengths), width or max(lengths)
    keys, values = (mx.random.normal((batch, KV_HEADS, width, DIM)) for _ in range(2))
    q = mx.random.normal((batch, HEADS, width, DIM))
    found = []
    for cache in caches:
        meta = ops.StepMeta(cache.offsets or (0,) * batch, lengths, width)
        prepare_step([cache])
        y = ops.attention(q, cache.extend(keys, values, meta), meta, scale=SCALE)
        mx.async_eval(y, cache.arrays)
        found.append(np.concatenate([np.array(y)[b, :, :n].ravel() for b, n in enumerate(lengths)]))
    return found


TRIMMED: dict[str, dict[str, Any]] = {
    **KINDS,
    "packed later": {"row_format": QuantizedRows(8, 32), "float_until": 60},
    "packed later window": {
        "row_format": QuantizedRows(4, 32),
        "float_until": 60,
        "window": 33,
        "keep": 5,
    },
}


@pytest.mark.parametrize("kind", TRIMMED)
@pytest.mark.parametrize("start", [27, 70])
def test_a_trimmed_cache_never_saw_the_rejected_rows(kind: str, start: int) -> None:
    drafting, plain = KVCache(**TRIMMED[kind]), KVCache(**TRIMMED[kind])
    run_alike([drafting, plain], (start,))
    for step in range(12):
        num_drafts = min((3 * step) % 16, drafting.num_trimmable - 1)
        kept = min((5 * step) % 4, num_drafts) + 1
        run_alike([drafting], (num_drafts + 1,))
        drafting.trim(num_drafts + 1)
        assert drafting.offset == plain.offset
        run_alike([drafting, plain], (kept,))
        found, wanted = run_alike([drafting, plain], (1,))
        assert np.array_equal(found, wanted)
        if step % 8 == 0:
            states = [cache.state() for cache in (drafting, plain)]
            assert states[0].facts == states[1].facts


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(sorted(TRIMMED)), st.data())
def test_single_steps_and_chunks_are_taken_back(kind: str, data: st.DataObject) -> None:
    drafting, plain = KVCache(**TRIMMED[kind]), KVCache(**TRIMMED[kind])
    for lengths in data.draw(st.lists(st.tuples(*[st.integers(1, 70)] * 2), max_size=3)):
        run_alike([drafting, plain], lengths)
    for _ in range(4):
        cuts = data.draw(st.lists(st.integers(1, 45), min_size=1, max_size=5))
        kept = drafting.offset
        for width in cuts:
            run_alike([drafting], (width, width))
        try:
            drafting.trim(sum(cuts))
        except InvalidRequestError as error:
            is_packed = kept < drafting._float_until <= drafting.offset
            assert is_packed or (drafting.window and sum(cuts) > TAIL), error
            return
        found, wanted = run_alike([drafting, plain], (1, 1))
        assert np.array_equal(found, wanted)


def test_rows_are_trimmed_each_by_its_own_count() -> None:
    drafting, plain = KVCache(), KVCache()
    run_alike([drafting, plain], (30, 70))
    for _ in range(12):
        mx.random.seed(drafting.offset)
        run_alike([drafting], (4, 4))
        drafting.trim((3, 1))
        mx.random.seed(plain.offset)
        run_alike([plain], (1, 3), width=4)
        found, wanted = run_alike([drafting, plain], (1, 1))
        assert np.array_equal(found, wanted)
    assert drafting.offsets == (54, 118)


def test_what_was_overwritten_cannot_be_brought_back() -> None:
    cache = KVCache(window=33)
    for _ in range(200):
        run_alike([cache], (1,))
    with pytest.raises(InvalidRequestError, match="window of 33 cannot go back to position 100"):
        cache.trim(100)
    with pytest.raises(InvalidRequestError, match=r"\(200,\) are stored"):
        cache.trim(201)
    with pytest.raises(InvalidRequestError, match="-1 positions"):
        cache.trim(-1)
    cache.trim(TAIL)
    with pytest.raises(InvalidRequestError, match="cannot go back"):
        cache.trim(TAIL)
    assert cache.offset == 200 - TAIL
