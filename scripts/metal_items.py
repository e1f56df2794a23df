"""What a Mac is asked, to check the Metal kernels: items, their inputs, and what tests/goldens/metal_cases.npz holds.

An item is one op on one TEST case of `mlx_edge/ops/cases.py` in one dtype, or on one of a few longer cases. Inputs are
drawn from the item's name with arithmetic that is exact on every machine; nothing is quantized on the way. A golden
holds the oracle's numbers, how far off the contract of `metal_kernels/README.md` allows a result to be, and the
emulator's bits. Knows no oracle and no device: `make_metal_goldens.py` makes the goldens, `mac_cases.py` compares.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_edge import ops
from mlx_edge.cache import KVCache, QuantizedRows, prepare_step
from mlx_edge.cache.rows import FloatRows
from mlx_edge.errors import HardwareNotSupportedError
from mlx_edge.ops.cases import TEST, BlockCase, LinearCase

Array = np.ndarray[Any, Any]
FILE = Path(__file__).parents[1] / "tests" / "goldens" / "metal_cases.npz"
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
KV_GROUP = 32


@dataclass(frozen=True)
class Item:
    """One op on one case in one dtype."""

    op: str
    case: LinearCase | BlockCase
    dtype: str
    kv_bits: int = 0  # of the cache's rows; 0 for floats
    is_ring: bool = False  # the cache holds the layer's window and no more

    @property
    def drawn_by(self) -> str:
        """What the inputs are drawn from."""
        extras = [f"kv{self.kv_bits}"] * (self.kv_bits > 0) + ["ring"] * self.is_ring
        return "-".join([f"{self.op}/{self.case}", *extras])

    def __str__(self) -> str:
        return f"{self.drawn_by}/{self.dtype}"

    @cached_property
    def inputs(self) -> "Inputs":
        """Drawn at first use."""
        return Inputs(self)


@dataclass(frozen=True)
class Beyond:
    """What decoding has and the TEST cases have not: parts of a long context, wide heads, packed rows, a ring."""

    case: BlockCase
    kv_bits: int = 0
    is_ring: bool = False


_LONG = BlockCase(1, 128, 192, 4, 2, 64, (600, 1), bits=4)
_DRAFTS = BlockCase(1, 128, 192, 4, 1, 128, (70, 5), bits=4, has_qk_norm=True)
_RING = BlockCase(1, 64, 96, 4, 2, 64, (100, 1), window=40)
BEYOND_TEST = (
    Beyond(_LONG),
    *(Beyond(_LONG, kv_bits) for kv_bits in (8, 4)),
    Beyond(_DRAFTS),
    *(Beyond(_DRAFTS, kv_bits) for kv_bits in (8, 4)),
    Beyond(_RING, is_ring=True),
    Beyond(
        BlockCase(2, 64, 96, 2, 1, 80, (45, 2), has_bias=True, is_interleaved=True, rope_dims=32)
    ),
    Beyond(BlockCase(2, 64, 96, 2, 2, 96, (45, 2), window=20)),
    Beyond(BlockCase(1, 64, 96, 2, 1, 192, (45, 3), has_qk_norm=True)),
    Beyond(BlockCase(1, 64, 96, 8, 1, 256, (300, 1))),
)


def list_items() -> Iterator[Item]:
    """All items; those that no kernel serves too."""
    for dtype in DTYPES:
        for case in TEST.linear:
            yield Item("linear", case, dtype)
            yield Item("head", case, dtype)
        for block in TEST.block:
            yield Item("mlp_block", block, dtype)
            yield Item("attention_block", block, dtype)
        for beyond in BEYOND_TEST:
            yield Item("attention_block", beyond.case, dtype, beyond.kv_bits, beyond.is_ring)


class Draw:
    """Arrays drawn from a name, the same on every machine; `checksum` (CRC-32) is of all that was drawn."""

    def __init__(self, name: str, dtype: mx.Dtype) -> None:
        self.checksum = 0
        # The old generator: numpy has promised not to change its stream.
        self._random = np.random.RandomState(zlib.crc32(name.encode()))
        self._dtype = dtype

    def floats(self, *shape: int, scale: float = 1.0) -> mx.array:
        """Uniform, of variance scale^2."""
        return self._take((2 * self._random.random_sample(shape) - 1) * (scale * 3**0.5))

    def _take(self, values: Array) -> mx.array:
        array = mx.array(values.astype(np.float32)).astype(self._dtype, stream=mx.cpu)
        self.checksum = zlib.crc32(read_bits(array).tobytes(), self.checksum)
        return array

    def norm(self, size: int) -> ops.Norm:
        """Weights around one."""
        return ops.Norm(self._take(0.8 + 0.4 * self._random.random_sample(size)), 1e-5)

    def linear(self, n: int, k: int, case: LinearCase) -> ops.Linear:
        """A weight (n, k) in the case's format: rows of length about one."""
        bias = self.floats(n) if case.has_bias else None
        if not case.bits:
            return ops.Dense(self.floats(n, k, scale=k**-0.5), bias)
        words = self._random.randint(0, 1 << 16, (2, n, k * case.bits // 32)).astype(np.uint32)
        packs = mx.array(words[0] << 16 | words[1])
        groups = (n, k // case.group_size)
        offsets = None
        if case.mode == "affine":
            scales = self.floats(*groups, scale=2 ** (1 - case.bits) * k**-0.5)
            offsets = self.floats(*groups, scale=k**-0.5)
        else:  # a byte that is an exponent, or a small float of 4 and 3 bits
            low = 40 if case.mode == "nvfp4" else (116 if case.bits == 8 else 121)
            scales = mx.array(self._random.randint(low, low + 4, groups).astype(np.uint8))
        return ops.Quantized(
            packs, scales, offsets, case.group_size, case.bits, case.mode, bias=bias
        )

    def rows(self, *shape: int, bits: int) -> mx.array:
        """Keys and values; if they will be packed, numbers that packing does not change on any device."""
        if not bits:
            return self.floats(*shape)
        top = (1 << bits) - 1
        codes = self._random.randint(0, top + 1, (*shape[:-1], shape[-1] // KV_GROUP, KV_GROUP))
        codes[..., 0], codes[..., 1] = 0, top
        return self._take((codes.reshape(shape) - (top + 1) // 2) * (4 / (top + 1)))


class Inputs:
    """The arguments of an item's op."""

    def __init__(self, item: Item) -> None:
        self.item = item
        self.dtype = DTYPES[item.dtype]
        draw, case = Draw(item.drawn_by, self.dtype), item.case
        if isinstance(case, LinearCase):
            self.x = draw.floats(1, case.m, case.k)
            weight = draw.linear(case.n, case.k, case)
            is_head = item.op == "head"
            self.weights: Any = ops.HeadWeights(draw.norm(case.k), weight) if is_head else weight
            self.checksum = draw.checksum
            return
        self.x = draw.floats(case.batch, case.steps[-1], case.hidden)
        make = _draw_mlp if item.op == "mlp_block" else _draw_attention
        self.weights = make(draw, case)
        dims = case.rope_dims or case.head_dim
        periods = (10000.0 ** (np.arange(0, dims, 2) / dims)).astype(np.float32)
        self.rope = ops.Rope(mx.array(periods), dims, case.is_interleaved)
        shape = (2, case.batch, case.kv_heads, sum(case.steps[:-1]), case.head_dim)
        self.past = draw.rows(*shape, bits=item.kv_bits)
        self.checksum = draw.checksum

    def arguments(self) -> tuple[Any, ...]:
        """As `ops` takes them; an attention block gets a new cache that holds the past."""
        if self.item.op != "attention_block":
            return self.x, self.weights
        case = self.item.case
        assert isinstance(case, BlockCase)
        bits = self.item.kv_bits
        row_format = QuantizedRows(bits, KV_GROUP) if bits else FloatRows()
        window = case.window if self.item.is_ring else None
        cache = KVCache(window=window, row_format=row_format)
        for width in case.steps[:-1]:
            first, last = cache.offset, cache.offset + width
            prepare_step([cache])
            meta = ops.StepMeta.uniform(first, batch_size=case.batch, width=width)
            cache.extend(self.past[0, :, :, first:last], self.past[1, :, :, first:last], meta)
            mx.eval(cache.arrays)
        prepare_step([cache])
        meta = ops.StepMeta.uniform(cache.offset, batch_size=case.batch, width=case.steps[-1])
        return self.x, self.weights, cache, self.rope, meta


def _format_of(case: BlockCase) -> LinearCase:
    return LinearCase(0, 0, 0, case.bits, has_bias=case.has_bias)


def _draw_mlp(draw: Draw, case: BlockCase) -> ops.MLPWeights:
    like = _format_of(case)
    gate, up = (draw.linear(case.inner, case.hidden, like) for _ in range(2))
    return ops.MLPWeights(
        draw.norm(case.hidden), gate, up, draw.linear(case.hidden, case.inner, like)
    )


def _draw_attention(draw: Draw, case: BlockCase) -> ops.AttentionWeights:
    like = _format_of(case)
    query, key = case.heads * case.head_dim, case.kv_heads * case.head_dim
    q, k, v = (draw.linear(n, case.hidden, like) for n in (query, key, key))
    return ops.AttentionWeights(
        norm=draw.norm(case.hidden),
        q=q,
        k=k,
        v=v,
        o=draw.linear(case.hidden, query, like),
        num_heads=case.heads,
        num_kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        scale=case.head_dim**-0.5,
        q_norm=draw.norm(case.head_dim) if case.has_qk_norm else None,
        k_norm=draw.norm(case.head_dim) if case.has_qk_norm else None,
        window=case.window,
    )


def run_on(item: Item, backend: str) -> mx.array | str:
    """The item's result on a backend's kernels, or in words why none serves it."""
    arguments = item.inputs.arguments()
    with ops.use(backend):
        try:
            choice = ops.choose(item.op, *arguments)
        except HardwareNotSupportedError as error:
            return str(error)
        if choice.backend.name != backend:
            return "; ".join(choice.refusals)
        found: mx.array = getattr(ops, item.op)(*arguments)
        mx.eval(found)
    return found


def read_bits(array: mx.array) -> Array:
    """The numbers' bits as uint32, in order."""
    unsigned = mx.uint32 if array.dtype.size == 4 else mx.uint16
    return np.array(array.view(unsigned)).astype(np.uint32).ravel()


@dataclass(frozen=True)
class Golden:
    """What one item must give; arrays (numbers,), empty where no kernel serves the item."""

    wanted: Array  # float32: the oracle's
    bound: Array  # float32: how far off the contract allows it to be
    bits: Array  # uint32: the emulator's
    checksum: int  # of the inputs


def load_goldens(file: Path = FILE) -> dict[str, Golden]:
    """By the item's name."""
    with np.load(file) as stored:
        ends = stored["sizes"].cumsum()[:-1]
        wanted, bound, bits = (np.split(stored[name], ends) for name in ("wanted", "bound", "bits"))
        goldens = map(Golden, wanted, bound, bits, map(int, stored["checksums"]))
        return dict(zip(map(str, stored["names"]), goldens, strict=True))


def save_goldens(goldens: dict[str, Golden], file: Path = FILE) -> None:
    """One compressed file: the arrays of all items one after the other."""
    all_of = goldens.values()
    np.savez_compressed(
        file,
        names=np.array(list(goldens)),
        sizes=np.array([g.bits.size for g in all_of]),
        wanted=np.concatenate([g.wanted for g in all_of]),
        bound=np.concatenate([g.bound for g in all_of]),
        bits=np.concatenate([g.bits for g in all_of]),
        checksums=np.array([g.checksum for g in all_of], np.uint32),
    )
