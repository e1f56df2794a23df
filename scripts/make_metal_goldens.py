"""Stores what a GPU must give for each item of `metal_items.py`: tests/goldens/metal_cases.npz.

    PYTHONPATH=. python scripts/make_metal_goldens.py      # after a change of a kernel or a case; minutes

Needs `metal_emulator`, for its bits. The numbers are those of the float64 oracle of `tests/ops`. How far off a result
may be is the contract of `metal_kernels/README.md`: it speaks of one kernel, and a block is several, each of which
rounds. What the inner ones add is measured: five standard deviations of float64 runs whose inner results are moved at
random inside their kernel's contract.
"""

import sys

import mlx.core as mx
import numpy as np
from metal_items import (
    FILE,
    KV_GROUP,
    Array,
    Golden,
    Inputs,
    Item,
    list_items,
    read_bits,
    run_on,
    save_goldens,
)
from tqdm import tqdm

from mlx_edge import ops
from mlx_edge.cache import QuantizedRows
from mlx_edge.cache.quantized import dequantize_float64
from mlx_edge.ops.cases import BlockCase
from tests.ops import oracle

DIGITS = {mx.float32: 24, mx.float16: 11, mx.bfloat16: 8}  # of a significand
SMALLEST = {mx.float32: -126, mx.float16: -14, mx.bfloat16: -126}  # exponent of a normal number
ROUNDING = 0.51  # units of T's last place, of every result
ATTENTION = {mx.float32: 2.0**-18, mx.float16: 2.0**-8, mx.bfloat16: 2.0**-8}  # relative
NUM_RUNS, NUM_DEVIATIONS = 32, 5


def unit_of(y: Array, dtype: mx.Dtype) -> Array:
    """The last place of each number in T."""
    exponents = np.where(y == 0, SMALLEST[dtype], np.frexp(y)[1] - 1)
    units: Array = np.ldexp(1.0, np.maximum(exponents, SMALLEST[dtype]) - DIGITS[dtype] + 1)
    return units


def sum_error(x: Array, weights: ops.Linear) -> Array:
    """What summing in float32 may do to a product of x (..., K): (..., N)."""
    lengths = np.linalg.norm(oracle.matrix(weights), axis=1)
    sizes = np.linalg.norm(x, axis=-1, keepdims=True)
    errors: Array = 2.0**-22 * x.shape[-1] ** 0.5 * sizes * lengths
    return errors


class Kernels:
    """The blocks in float64, kernel by kernel; `random` moves every inner result inside its contract."""

    def __init__(self, dtype: mx.Dtype, random: np.random.RandomState | None = None) -> None:
        self.dtype = dtype
        self._random = random

    def _store(self, y: Array, error: Array | float) -> Array:
        """A result as the next kernel may find it."""
        if self._random is None:
            return y
        error = ROUNDING * unit_of(y, self.dtype) + error
        moved: Array = y + error * (2 * self._random.random_sample(y.shape) - 1)
        return moved

    def mlp_block(self, inputs: Inputs) -> tuple[Array, Array]:
        """The result, and the error that the last kernel's sums may have."""
        x, weights = oracle.f64(inputs.x), inputs.weights
        h = oracle.rms_norm(x, weights.norm)
        gate, up = oracle.linear(h, weights.gate), oracle.linear(h, weights.up)
        inner = oracle.glu(gate, up, weights.activation)
        slope = 1.1 * np.abs(up)  # at most, of the activation
        error = slope * sum_error(h, weights.gate) + np.abs(gate) * sum_error(h, weights.up)
        inner = self._store(inner, error + 2.0**-20 * np.abs(inner))
        return x + oracle.linear(inner, weights.down), sum_error(inner, weights.down)

    def attention_block(self, inputs: Inputs) -> tuple[Array, Array]:
        """The result, and the error that the last kernel's sums may have."""
        x, weights = oracle.f64(inputs.x), inputs.weights
        h = oracle.rms_norm(x, weights.norm)
        q, k, v = (
            oracle.heads(self._store(oracle.linear(h, w), sum_error(h, w)), weights.head_dim)
            for w in (weights.q, weights.k, weights.v)
        )
        past = oracle.f64(inputs.past)
        start, width = past.shape[3], x.shape[1]
        positions = np.broadcast_to(np.arange(start, start + width), x.shape[:2])
        q, k = (
            self._turn(q, weights.q_norm, inputs, positions),
            self._turn(k, weights.k_norm, inputs, positions),
        )
        keys, values = np.concatenate([past, self._keep(k, v, inputs.item)], axis=3)
        stored = np.broadcast_to(np.arange(start + width), (x.shape[0], start + width))
        heads = oracle.attention(q, keys, values, positions, stored, weights.scale, weights.window)
        error = ATTENTION[self.dtype] * np.abs(heads) + 2.0**-18 * np.abs(values).max()
        heads = self._store(heads, error).transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1)
        return x + oracle.linear(heads, weights.o), sum_error(heads, weights.o)

    def _turn(self, x: Array, norm: ops.Norm | None, inputs: Inputs, positions: Array) -> Array:
        """Norm and rotation inside the kernel, in float32: an angle is off by a part of itself."""
        if norm is not None:
            x = oracle.rms_norm(x, norm)
        x = oracle.rotate(x, inputs.rope, positions)
        if self._random is None:
            return x
        error = 2.0**-23 * (1 + positions[:, None, :, None]) * np.abs(x).max()
        moved: Array = x + error * (2 * self._random.random_sample(x.shape) - 1)
        return moved

    def _keep(self, k: Array, v: Array, item: Item) -> Array:
        """New keys and values (2, B, K, L, D) as they are stored."""
        rows = np.stack([self._store(k, 0), v])
        if not item.kv_bits:
            return rows
        kind = QuantizedRows(item.kv_bits, KV_GROUP)
        planes = kind.encode(mx.array(rows.astype(np.float32)).astype(self.dtype))
        return np.stack([dequantize_float64(half) for half in kind.split(planes)])


def judge(item: Item) -> tuple[Array, Array]:
    """What the oracle gives and how far off the contract allows a result to be."""
    inputs, dtype = item.inputs, item.inputs.dtype
    inherited: Array | float = 0.0
    if isinstance(item.case, BlockCase):
        wanted, error = getattr(Kernels(dtype), item.op)(inputs)
        runs = (
            getattr(Kernels(dtype, np.random.RandomState(run)), item.op)(inputs)[0] - wanted
            for run in range(NUM_RUNS)
        )
        inherited = NUM_DEVIATIONS * np.sqrt(sum(run**2 for run in runs) / NUM_RUNS)
    else:
        x, weights = oracle.f64(inputs.x), inputs.weights
        if isinstance(weights, ops.HeadWeights):
            x, weights = oracle.rms_norm(x, weights.norm), weights.projection
        wanted, error = oracle.linear(x, weights), sum_error(x, weights)
    kept = 0.5 * unit_of(wanted, mx.float32)  # a golden is rounded too
    return wanted, ROUNDING * unit_of(wanted, dtype) + error + inherited + kept


def run_emulated(item: Item) -> Array:
    """The emulator's bits; none where no kernel serves the item."""
    found = run_on(item, "emulated")
    return np.array([], np.uint32) if isinstance(found, str) else read_bits(found)


def make_golden(item: Item) -> Golden:
    bits = run_emulated(item)
    pair = judge(item) if bits.size else (bits, bits)
    wanted, bound = (a.astype(np.float32).ravel() for a in pair)
    return Golden(wanted, bound, bits, item.inputs.checksum)


def main() -> int:
    """Make and store them all."""
    goldens = {str(item): make_golden(item) for item in tqdm(list(list_items()))}
    save_goldens(goldens)
    served = sum(golden.bits.size > 0 for golden in goldens.values())
    print(f"{FILE}: {len(goldens)} items, {served} on kernels, {FILE.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
