"""What the ops are given: weights, rotary frequencies, the step's positions, and a handle on a KV cache.

Plain frozen records, shared by every implementation of an op. They know shapes and nothing of files, model
families or devices. Shape letters: B batch, L new positions, S stored positions, H query heads, K kv heads,
D head dim, E model dim, F feed-forward dim, V vocabulary, G group size, N rows of a weight.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from operator import add
from typing import Any, Literal, Protocol

import mlx.core as mx

Activation = Literal["silu", "gelu_tanh", "swiglu_oai"]
Precision = Literal["int8", "float"]  # of the activations that meet a quantized weight on a CPU


@dataclass(frozen=True)
class Dense:
    """A float weight: y = x @ weight.T + bias."""

    weight: mx.array  # (N, E)
    bias: mx.array | None = None  # (N,)
    input_scale: float | None = None  # x is rounded to int8 codes of this step before the product

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        rows, columns = self.weight.shape
        return rows, columns


@dataclass(frozen=True)
class Quantized:
    """A weight in MLX's packed layout: groups along E, uint32 packs, one scale (and offset) per group."""

    weight: mx.array  # (N, E * bits / 32) uint32
    scales: mx.array  # (N, E / group_size)
    offsets: (
        mx.array | None
    )  # (N, E / group_size); MLX's files call them "biases"; None unless affine
    group_size: int
    bits: int
    mode: str = "affine"
    bias: mx.array | None = None  # (N,)
    input_scale: float | None = None  # x is rounded to int8 codes of this step before the product

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix that is meant."""
        rows, packs = self.weight.shape
        return rows, packs * 32 // self.bits


@dataclass(frozen=True)
class Packed:
    """A weight in the layout of the CPU kernels; `restore` reads it again as the checkpoint has it."""

    handle: Any  # the kernels' own record
    shape: tuple[int, int]  # (N, E)
    weight_bytes: int  # that one pass reads
    is_quantized: bool
    precision: Precision  # of the activations, where the weight is quantized
    restore: Callable[[], Dense | Quantized] = field(repr=False)
    # Another weight in this layout; ValueError for one that the kernels do not serve.
    repack: "Callable[[Dense | Quantized, Precision], Packed] | None" = field(
        default=None, repr=False
    )


Linear = Dense | Quantized | Packed


@dataclass(frozen=True)
class Norm:
    """A root-mean-square norm: x / sqrt(mean(x^2) + eps) * weight."""

    weight: mx.array  # (E,) or (D,)
    eps: float


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of the first `dims` of a head: pair i turns by position / periods[i] radians."""

    periods: mx.array  # (dims / 2,) float32
    dims: int
    is_interleaved: bool = (
        False  # pairs (0, 1), (2, 3), ...; else (0, dims / 2), (1, dims / 2 + 1), ...
    )
    magnitude: float = 1.0  # both rotated queries and keys are scaled by it (yarn)
    # Pairs that turn by time, by height and by width, one run after another, where a step has such positions.
    sections: tuple[int, ...] = ()


@dataclass(frozen=True)
class AttentionWeights:
    """All that one attention layer owns, and its geometry."""

    norm: Norm | None  # of what goes into the projections; None: they take it as it is
    q: Linear  # (H * D, E)
    k: Linear  # (K * D, E)
    v: Linear  # (K * D, E)
    o: Linear  # (E, H * D)
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float  # of the scores, before the softmax
    # Before RoPE, over each head (D,), or over all heads together (H * D,) and (K * D,).
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    window: int | None = None  # a query sees itself and the window - 1 positions before it
    post_norm: Norm | None = None  # of the layer's output, before the residual is added
    residual_scale: float = 1.0  # of the layer's output, when the residual is added
    softcap: float | None = None  # scores become softcap * tanh(score / softcap)
    sinks: mx.array | None = None  # (H,): a score that every query sees, of a value of zeros


@dataclass(frozen=True)
class MLPWeights:
    """All that one gated feed-forward layer owns."""

    norm: Norm | None
    gate: Linear  # (F, E)
    up: Linear  # (F, E)
    down: Linear  # (E, F)
    activation: Activation = "silu"
    post_norm: Norm | None = None  # of the layer's output, before the residual is added
    residual_scale: float = 1.0


@dataclass(frozen=True)
class MoEWeights:
    """All that one mixture-of-experts layer owns: each row goes through `top_k` of X experts."""

    norm: Norm | None
    router: Linear  # (X, E)
    gate: Linear  # (X * F, E): expert after expert, as are the others
    up: Linear  # (X * F, E)
    down: Linear  # (X * E, F)
    num_experts: int
    top_k: int
    is_normalized: bool = True  # the weights of the chosen experts add up to 1
    activation: Activation = "silu"
    post_norm: Norm | None = None
    residual_scale: float = 1.0


@dataclass(frozen=True)
class Embedding:
    """The token table."""

    table: Linear  # (V, E), without bias
    scale: float = 1.0  # of the rows that are looked up


@dataclass(frozen=True)
class HeadWeights:
    """What turns the last hidden states into logits."""

    norm: Norm
    projection: Linear  # (V, E)
    scale: float = 1.0  # of the logits
    softcap: float | None = None  # logits become softcap * tanh(logit / softcap), after the scale


@dataclass(frozen=True)
class StepMeta:
    """Where the new tokens of one step stand: as arrays for kernels, and as host integers for grids.

    Row b brings `lengths[b]` tokens at positions `starts[b] ...`; its columns beyond are padding. In a ragged step the
    sequences stand one after another in one row, without padding, and each has a cache of its own (`RaggedKV`).
    """

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    width: int  # L; of a ragged step the sum of its lengths
    is_ragged: bool = False
    # RoPE turns sequence b to its positions + shifts[b]: behind images, which take up fewer turns than positions.
    shifts: tuple[int, ...] = ()
    # (3, B, L) int32: where RoPE turns each token in time, height and width, in a step with tokens of images; the
    # shifts are then without meaning. A Rope without sections turns to the first.
    axes: mx.array | None = None

    @staticmethod
    def uniform(start: int, *, batch_size: int, width: int) -> "StepMeta":
        """Every row brings `width` tokens from position `start`."""
        return StepMeta((start,) * batch_size, (width,) * batch_size, width)

    @staticmethod
    def ragged(starts: Sequence[int], lengths: Sequence[int]) -> "StepMeta":
        """Sequence b brings `lengths[b]` tokens from position `starts[b]`, behind those of the sequence before it."""
        return StepMeta(tuple(starts), tuple(lengths), sum(lengths), is_ragged=True)

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Where the tokens of each sequence end: the positions stored after the step."""
        return tuple(map(add, self.starts, self.lengths))

    @cached_property
    def alone(self) -> tuple["StepMeta", ...]:
        """The steps that the sequences of a ragged step would make by themselves."""
        shifts = self.shifts or (None,) * len(self.starts)
        parts = zip(self.starts, self.lengths, shifts, self.rows, strict=True)
        return tuple(
            StepMeta(
                (start,),
                (length,),
                length,
                shifts=() if shift is None else (shift,),
                axes=None if self.axes is None else self.axes[:, :, own],
            )
            for start, length, shift, own in parts
        )

    @cached_property
    def rows(self) -> tuple[slice, ...]:
        """Where the tokens of each sequence of a ragged step stand along L."""
        ends = tuple(accumulate(self.lengths))
        return tuple(slice(e - n, e) for e, n in zip(ends, self.lengths, strict=True))

    @cached_property
    def starts_array(self) -> mx.array:
        """(B,) int32."""
        return mx.array(self.starts, dtype=mx.int32)

    @cached_property
    def turns_array(self) -> mx.array:
        """(B,) int32: where RoPE turns the first token of each sequence; without meaning beside `axes`."""
        if not any(self.shifts):
            return self.starts_array
        return self.starts_array + mx.array(self.shifts, dtype=mx.int32)

    @cached_property
    def lengths_array(self) -> mx.array:
        """(B,) int32."""
        return mx.array(self.lengths, dtype=mx.int32)

    @cached_property
    def positions(self) -> mx.array:
        """(B, L) int32, -1 where a column is padding; (1, L) of a ragged step."""
        if self.is_ragged:
            return mx.concatenate([meta.positions for meta in self.alone], axis=1)
        column = mx.arange(self.width, dtype=mx.int32)[None]
        return mx.where(
            column < self.lengths_array[:, None], self.starts_array[:, None] + column, mx.array(-1)
        )


@dataclass(frozen=True)
class PackedRows:
    """Quantized keys or values (B, K, S, D): groups along D, value = scale * code + offset."""

    packs: mx.array  # (B, K, S, D * bits / 32) uint32
    scales: mx.array  # (B, K, S, D / group_size)
    offsets: mx.array  # (B, K, S, D / group_size)
    group_size: int
    bits: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, K, S, D)."""
        batch, heads, length, words = self.packs.shape
        return batch, heads, length, words * 32 // self.bits


@dataclass(frozen=True)
class Segment:
    """A run of stored keys and values; positions, not storage order, decide who sees whom."""

    keys: mx.array | PackedRows  # (B, K, S, D)
    values: mx.array | PackedRows  # (B, K, S, D)
    positions: mx.array  # (B or 1, S) int32, -1 for an empty slot
    first: int  # lowest position in any row, known on the host
    last: int  # highest position in any row
    has_gaps: bool = False  # some slot is empty
    window: int | None = None  # the cache's own limit, beside the layer's


class KVHandle(Protocol):
    """One layer's cache, as an attention block sees it."""

    def extend(self, keys: mx.array, values: mx.array, meta: StepMeta) -> Sequence[Segment]:
        """Store the step's keys and values (B, K, L, D); return all that may be attended to, as stored."""
        ...


@dataclass(frozen=True)
class RaggedKV:
    """One layer's caches in a ragged step: of each sequence its own, with one row."""

    handles: tuple[KVHandle, ...]


@dataclass(frozen=True)
class StoredPlanes:
    """Where one layer's keys and values lie: arrays (2, B, K, slots, ...), keys first; one of floats, or codes, scales
    and offsets; none where nothing is stored. Which position has which slot is in `metal_kernels/README.md`."""

    body: tuple[mx.array, ...]
    tail: tuple[mx.array, ...]
    prefix: tuple[mx.array, ...]
    tail_starts: tuple[int, ...]  # per row of the batch: position of the tail's first slot
    ring: int = 0  # slots of a body that goes round; 0 where slot i holds position i
    window: int | None = None  # the cache's own limit, beside the layer's
    keep: int = 0  # positions that lie in the prefix
    bits: int = 0  # 0 for floats
    group_size: int = 0


class TailHandle(KVHandle, Protocol):
    """A cache whose tail is a value: a kernel reads it and makes the next one; nothing is written that is read."""

    keep: int  # positions that are always seen

    @property
    def packing(self) -> tuple[int, int]:
        """Bits and group size of the rows that the next step stores; 0 and 0 for floats."""
        ...

    def open_step(self, like: mx.array, meta: StepMeta) -> StoredPlanes:
        """What is stored before the step, whose rows will have the shape and dtype of `like` (B, K, L, D)."""
        ...

    def close_step(self, tail: tuple[mx.array, ...], meta: StepMeta) -> None:
        """Take the next tail; the step's positions count as stored."""
        ...


class PagedHandle(KVHandle, Protocol):
    """A cache whose memory belongs to the CPU kernels, which append to it in place."""

    ticket: (
        mx.array | None
    )  # computed when the newest step has been stored; the next one waits for it

    def begin(self, num_heads: int, head_dim: int, meta: StepMeta) -> Any:
        """The kernels' store, once the step's positions are known to follow; they count as stored."""
        ...
