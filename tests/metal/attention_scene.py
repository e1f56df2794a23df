"""A step of attention over a cache, laid out by hand from positions, and what it should give in float64.

Every slot that holds no position is poisoned (all bits set: a NaN), and so are the heads of padding rows.
"""

from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from metal_emulator import Device
from mlx_edge.cache.quantized import dequantize_float64
from mlx_edge.ops import Norm, PackedRows, Rope, StoredPlanes
from mlx_edge.ops import metal_attention as kernels
from tests.metal.devices import bits, run_checked
from tests.ops import oracle
from tests.ops.oracle import f64

Planes = tuple[mx.array, ...]

NEXT = ("next_rows", "next_codes", "next_scales", "next_offsets")
CHECKED = tuple(Device(mode="check", order=order, unwritten_ok=NEXT) for order in (0, 1))
MAX_NEW = 16
RELATIVE = {mx.float32: 2.0**-18, mx.float16: 2.0**-8, mx.bfloat16: 2.0**-8}  # README, Contracts
HALF_ULP = {mx.float32: 2.0**-24, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}


@dataclass(frozen=True)
class Scene:
    """Where a batch of sequences stands, and the geometry of a layer."""

    starts: tuple[int, ...]
    lengths: tuple[int, ...] = (1,)
    width: int = 1
    tail_starts: tuple[int, ...] = ()  # where a cache would have them, if not given
    ring: int = 0
    window: int = 0
    keep: int = 0
    keep_window: int = 0
    heads: int = 2
    kv_heads: int = 1
    dim: int = 64
    dtype: mx.Dtype = mx.float32
    bits: int = 0
    group_size: int = 32
    rope_dims: int = 0
    is_interleaved: bool = False
    magnitude: float = 1.0
    norms: tuple[bool, bool] = (False, False)  # of queries, of keys
    has_sinks: bool = False
    shifts: tuple[int, ...] = ()  # of where rope turns each sequence, from its positions
    has_still_pair: bool = False  # the last pair of a head has an infinite period
    has_odd_values: bool = False  # new values with groups of zeros, of one number, of one sign
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.tail_starts:
            tails = tuple(max(0, start - 1) // 32 * 32 for start in self.starts)
            object.__setattr__(self, "tail_starts", tails)

    @property
    def batch(self) -> int:
        return len(self.starts)

    @property
    def ends(self) -> tuple[int, ...]:
        return tuple(s + n for s, n in zip(self.starts, self.lengths, strict=True))

    @property
    def positions(self) -> kernels.Positions:
        return kernels.place(
            self.starts,
            self.lengths,
            self.tail_starts,
            width=self.width,
            ring=self.ring,
            window=self.window,
            keep=self.keep,
            keep_window=self.keep_window,
            shifts=self.shifts,
        )

    @property
    def layer(self) -> dict[str, Any]:
        """The layer's arguments of `attend`."""
        random = np.random.default_rng(self.seed + 1)
        rope = None
        if self.rope_dims:
            periods = 10000.0 ** (np.arange(0, self.rope_dims, 2) / self.rope_dims)
            if self.has_still_pair:
                periods[-1] = np.inf
            rope = Rope(
                mx.array(periods.astype(np.float32)),
                self.rope_dims,
                self.is_interleaved,
                self.magnitude,
            )
        # Weights and eps of the two norms differ, so that a swap shows.
        norms = [
            Norm(mx.array(1 + random.standard_normal(self.dim) / 4).astype(self.dtype), eps)
            for eps in (1e-5, 0.5)
        ]
        q_norm, k_norm = (
            n if is_given else None for n, is_given in zip(norms, self.norms, strict=True)
        )
        sinks = mx.array(random.standard_normal(self.heads).astype(np.float32) + 1)
        return {
            "num_heads": self.heads,
            "num_kv_heads": self.kv_heads,
            "head_dim": self.dim,
            "scale": 0.9 * self.dim**-0.5,
            "rope": rope,
            "q_norm": q_norm,
            "k_norm": k_norm,
            "sinks": sinks if self.has_sinks else None,
        }

    def encode(self, rows: mx.array) -> Planes:
        """Rows (..., D) as they are stored."""
        if self.bits == 0:
            return (rows,)
        return tuple(mx.quantize(rows, group_size=self.group_size, bits=self.bits))

    def decode(self, planes: Planes) -> np.ndarray:
        """What planes (2, B, K, S, ...) mean, in float64."""
        if self.bits == 0:
            return f64(planes[0])
        shape = planes[0].shape
        flat = (p.reshape(-1, *p.shape[2:]) for p in planes)
        rows = dequantize_float64(PackedRows(*flat, self.group_size, self.bits))
        return rows.reshape(*shape[:4], self.dim)

    def history(self) -> Planes:
        """Planes of all positions before the longest start; a shorter scene has the same first ones."""
        random = np.random.default_rng(self.seed + 2)
        shape = (max(self.starts) + 1, 2, self.batch, self.kv_heads, self.dim)
        rows = random.standard_normal(shape).astype(np.float32)
        return self.encode(mx.array(rows.transpose(1, 2, 3, 0, 4)).astype(self.dtype))

    def new_rows(self) -> mx.array:
        """Raw heads (B, MAX_NEW, (H + 2K) * D); the first `width` of each sequence are the step's."""
        random = np.random.default_rng(self.seed + 3)
        columns = (self.heads + 2 * self.kv_heads) * self.dim
        rows = random.standard_normal((self.batch, MAX_NEW, columns)).astype(np.float32)
        if self.has_odd_values:
            size = self.group_size
            values = rows[..., -self.kv_heads * self.dim :]
            values[:, 0, :size] = 0
            values[:, 0, size:] = np.abs(values[:, 0, size:]) + 1
            values[:, 1, :size] = -np.abs(values[:, 1, :size]) - 1
            values[:, 1, size:] = -0.375
            values[:, 2, :size] = 1e-8  # less than half of the smallest step
        return mx.array(rows).astype(self.dtype)

    def qkv(self) -> mx.array:
        """The step's raw heads (M, (H + 2K) * D), those of padding poisoned."""
        rows = bits(self.new_rows()[:, : self.width]).copy()
        for b, length in enumerate(self.lengths):
            rows[b, length:] = _poison(rows.dtype)
        return _restore(rows.reshape(-1, rows.shape[-1]), self.dtype)

    def lay_out(self, history: Planes | None = None) -> StoredPlanes:
        """Body, tail and prefix holding the history."""
        parts: dict[str, list[mx.array]] = {"body": [], "tail": [], "prefix": []}
        for plane in self.history() if history is None else history:
            for part, array in self._lay_out_plane(bits(plane)).items():
                if array.size:
                    parts[part].append(_restore(array, plane.dtype))
        arrays = {part: tuple(planes) for part, planes in parts.items()}
        return StoredPlanes(
            **arrays,
            tail_starts=self.tail_starts,
            bits=self.bits,
            group_size=self.group_size if self.bits else 0,
        )

    def _lay_out_plane(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        # Sizes that nothing else has, so that one plane's stride does not serve another.
        most = max(self.tail_starts)
        slots = {"body": self.ring or (most + 5 if most else 0), "tail": 56, "prefix": self.keep}
        planes = {
            part: np.full((*rows.shape[:3], n, rows.shape[4]), _poison(rows.dtype), rows.dtype)
            for part, n in slots.items()
        }
        for b, (start, tail) in enumerate(zip(self.starts, self.tail_starts, strict=True)):
            oldest = start - self.window + 1 if self.window else 0
            for p in range(start):
                if p >= tail:
                    part, slot = "tail", p - tail
                elif p < self.keep:
                    part, slot = "prefix", p
                else:
                    part, slot = "body", p % self.ring if self.ring else p
                # What no query sees is not read, but for a chunk that has kept positions too.
                is_read = part != "body" or (p >= oldest or p < -(-self.keep // 32) * 32)
                planes[part][:, b, :, slot] = rows[:, b, :, p] if is_read else _poison(rows.dtype)
        return planes


def _poison(dtype: Any) -> Any:
    return np.iinfo(dtype).max


def _restore(unsigned: np.ndarray, dtype: mx.Dtype) -> mx.array:
    return mx.array(unsigned).view(dtype)


@dataclass(frozen=True)
class Outcome:
    """What a launch gave."""

    heads: mx.array  # (M, H * D)
    tail: Planes


def attend(
    scene: Scene, stored: StoredPlanes | None = None, qkv: mx.array | None = None
) -> Outcome:
    """The scene's step, in check mode under both schedules."""
    given = scene.lay_out() if stored is None else stored
    rows = scene.qkv() if qkv is None else qkv
    positions, layer = scene.positions, scene.layer

    def call() -> list[mx.array]:
        heads, tail = kernels.attend(rows, given, positions, **layer)
        return [heads, *tail]

    heads, *tail = run_checked(call, CHECKED)
    return Outcome(heads, tuple(tail))


def prepared_keys(scene: Scene) -> np.ndarray:
    """The new keys (B, K, MAX_NEW, D) in float64, normed and rotated, before they are stored."""
    return _prepare(scene, scene.heads, scene.kv_heads, "k_norm")


def _prepare(scene: Scene, first: int, count: int, norm: str) -> np.ndarray:
    layer = scene.layer
    rows = f64(scene.new_rows()).reshape(scene.batch, MAX_NEW, -1, scene.dim)
    x = rows[:, :, first : first + count].transpose(0, 2, 1, 3)
    if layer[norm] is not None:
        x = oracle.rms_norm(x, layer[norm])
    if layer["rope"] is not None:
        firsts = np.array(scene.starts) + np.array(scene.shifts or 0)
        positions = firsts[:, None] + np.arange(MAX_NEW)
        x = oracle.rotate(x, layer["rope"], positions)
    return x


def expected_heads(scene: Scene, tail: Planes, history: Planes | None = None) -> np.ndarray:
    """Heads (B, L, H * D) in float64, the new rows taken as `tail` has them."""
    old = scene.decode(scene.history() if history is None else history)
    new = scene.decode(tail)
    queries = _prepare(scene, 0, scene.heads, "q_norm")
    heads = np.zeros((scene.batch, scene.width, scene.heads, scene.dim))
    for b, (start, first) in enumerate(zip(scene.starts, scene.tail_starts, strict=True)):
        slots = slice(start - first, scene.ends[b] - first)
        rows = np.concatenate([old[:, b, :, :start], new[:, b, :, slots]], axis=2)
        for step in range(scene.lengths[b]):
            for head in range(scene.heads):
                keys, values = rows[:, head * scene.kv_heads // scene.heads]
                heads[b, step, head] = _attend_one(
                    scene, queries[b, head, step], keys, values, start + step, head
                )
    return heads.reshape(scene.batch, scene.width, -1)


def _attend_one(
    scene: Scene, query: np.ndarray, keys: np.ndarray, values: np.ndarray, at: int, head: int
) -> np.ndarray:
    positions = np.arange(len(keys))
    windows = np.where(positions < scene.keep, scene.keep_window, scene.window)
    is_seen = (positions <= at) & ((windows == 0) | (positions > at - windows))
    scores = (keys @ query * scene.layer["scale"])[is_seen]
    sinks = f64(scene.layer["sinks"])[[head]] if scene.has_sinks else np.zeros(0)
    top = np.concatenate([scores, sinks]).max()
    weights = np.exp(scores - top)
    mixed: np.ndarray = weights @ values[is_seen] / (weights.sum() + np.exp(sinks - top).sum())
    return mixed


def check_heads(scene: Scene, outcome: Outcome) -> None:
    """Heads are within the contract; those of padding are zeros."""
    expected = expected_heads(scene, outcome.tail)
    found = f64(outcome.heads).reshape(expected.shape)
    values = (
        scene.decode(scene.history())[1],
        f64(_new_heads(scene, scene.heads + scene.kv_heads)),
    )
    largest = max(np.abs(v).max() for v in values)
    allowed = RELATIVE[scene.dtype] * np.abs(expected) + 2.0**-18 * largest
    for b, length in enumerate(scene.lengths):
        assert not found[b, length:].any(), "a padding row is not zero"
        excess = np.abs(found - expected)[b, :length] - allowed[b, :length]
        assert (excess <= 0).all(), f"sequence {b} is off by {excess.max():.3g} too much"
        assert not np.isnan(found).any()


def check_tail(scene: Scene, outcome: Outcome) -> None:
    """The next tail has the old rows, the new values and keys as they are stored, and nothing else."""
    history = scene.history()
    new_values = scene.encode(_new_heads(scene, scene.heads + scene.kv_heads))
    for plane, old, value in zip(outcome.tail, history, new_values, strict=True):
        stored, old_bits, value_bits = bits(plane), bits(old), bits(value)
        for b, (start, first) in enumerate(zip(scene.starts, scene.tail_starts, strict=True)):
            count, length = start - first, scene.lengths[b]
            np.testing.assert_array_equal(
                stored[:, b, :, :count], old_bits[:, b, :, first:start], "an old row"
            )
            np.testing.assert_array_equal(
                stored[1, b, :, count : count + length], value_bits[b, :, :length], "a new value"
            )
            beyond = np.ascontiguousarray(stored[:, b, :, count + length :]).view(np.uint8)
            assert np.unique(beyond).size <= 1, "a slot beyond the end was written"
    check_keys(scene, outcome)


def _new_heads(scene: Scene, first: int) -> mx.array:
    rows = scene.new_rows().reshape(scene.batch, MAX_NEW, -1, scene.dim)
    return rows[:, :, first : first + scene.kv_heads].transpose(0, 2, 1, 3)


def check_keys(scene: Scene, outcome: Outcome) -> None:
    """New keys are the float64 ones, rounded to T; packed, they are those of a plain cache as MLX packs them."""
    plain = outcome if scene.bits == 0 else attend(replace(scene, bits=0))
    exact = prepared_keys(scene)
    for b, (start, first) in enumerate(zip(scene.starts, scene.tail_starts, strict=True)):
        slots = slice(start - first, scene.ends[b] - first)
        keys = plain.tail[0][0, b, :, slots]
        wanted = exact[b, :, : scene.lengths[b]]
        allowed = HALF_ULP[scene.dtype] * np.abs(wanted) + 2.0**-21 * np.abs(exact).max()
        assert (np.abs(f64(keys) - wanted) <= allowed).all(), f"new keys of sequence {b}"
        if scene.bits and scene.lengths[b]:
            for plane, packed in zip(outcome.tail, scene.encode(keys), strict=True):
                np.testing.assert_array_equal(
                    bits(plane[0, b, :, slots]), bits(packed), "packed keys"
                )
