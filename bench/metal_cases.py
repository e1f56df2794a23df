"""The launches that are counted: our kernels, MLX's own, and mlx-lm's attention over packed keys and values.

A case is a call with a shape; counting it gives its dispatches' work. Counts do not depend on values, so arrays hold
zeros. A long matrix may be counted by a share of its rows, attention by one head of keys and values: the threadgroups
of the others do the same. Arrays are of half: bfloat has as many bytes, and the emulator spells its arithmetic out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import mlx.core as mx

from bench.metal_shapes import GROUP_SIZE, Heads, Matrix
from bench.metal_work import Lines, Work, work_of
from metal_emulator import Device, compile_kernel, mlx_attention, mlx_products
from metal_emulator.arrays import Array
from metal_emulator.mlx_source import Chip as MLXChip
from metal_emulator.mlx_source import How, MLXKernel, Result, ceil_div, int32, launch
from mlx_edge.ops import (
    Norm,
    Quantized,
    Rope,
    StoredPlanes,
    metal_attention,
    metal_launch,
    metal_qmv,
)

COUNT = How("count")
DTYPE = mx.float16
CHUNK = 32  # a tail begins at a multiple of it
CAPACITY = 256  # bodies have a multiple of it
Route = Literal["qmv", "qmv_wide", "qmm"]
Product = Literal["norm", "res", "glu"]
Attention = Literal["sdpa_vector", "sdpa_vector_2pass", "steel_attention"]


class Case:
    """A call whose dispatches are counted; equal cases are counted once."""

    def count(self) -> list[Work]:
        """The work of each dispatch."""
        raise NotImplementedError


@cache
def matrix_mix() -> dict[str, float]:
    """What the emulator itself does for one matrix multiply, from a kernel that does nothing else."""
    text = """
    #include <metal_stdlib>
    using namespace metal;
    [[kernel]] void multiply(const device float* x [[buffer(0)]], device float* y [[buffer(1)]],
                             const constant int& times [[buffer(2)]]) {
      simdgroup_matrix<float, 8, 8> a, c;
      simdgroup_load(a, x, 8);
      simdgroup_load(c, x, 8);
      for (int i = 0; i < times; i++) simdgroup_multiply_accumulate(c, a, a, c);
      simdgroup_store(c, y, 8);
    }
    """
    import numpy as np

    kernel = compile_kernel(text, "multiply", mode="count")

    def mix(times: int) -> dict[str, int]:
        x, y = np.zeros(64, np.float32), np.zeros(64, np.float32)
        inputs = {"x": x, "times": np.array([times], np.int32)}
        run = kernel.run(inputs, {"y": y}, (32, 1, 1), (32, 1, 1))
        return run.counts.op_mix if run.counts else {}

    few, many = mix(1), mix(9)
    return {name: (count - few.get(name, 0)) / 8 for name, count in many.items()}


def _works(launches: Sequence[Any], *, packed_kv: bool = False) -> list[Work]:
    has_matrices = any(one.counts and one.counts.matrix_multiplies for one in launches)
    mix = matrix_mix() if has_matrices else {}
    return [work_of(o.name, o.counts, packed_kv=packed_kv, matrix_mix=mix) for o in launches]


def _zeros(matrix: Matrix, bits: int) -> tuple[mx.array, mx.array, mx.array]:
    groups = mx.zeros((matrix.rows, matrix.columns // GROUP_SIZE), DTYPE)
    packs = mx.zeros((matrix.rows, matrix.columns * bits // 32), mx.uint32)
    return packs, groups, groups + 0


@dataclass(frozen=True)
class MLXProduct(Case):
    """`mx.quantized_matmul` of M rows through one of MLX's kernels."""

    matrix: Matrix
    rows: int  # M
    route: Route
    bits: int = 4
    most_rows: int | None = None  # of the matrix, that are counted

    def count(self) -> list[Work]:
        """One dispatch; two where K is split."""
        run: dict[Route, Callable[..., Result]] = {
            "qmv": mlx_products.qmv,
            "qmv_wide": mlx_products.qmv_wide,
            "qmm": mlx_products.qmm_splitk,
        }
        counted = self.matrix
        if self.most_rows is not None and self.most_rows < counted.rows:
            counted = replace(counted, rows=self.most_rows)
            run["qmm"] = mlx_products.qmm_t  # a slice of so few tiles would be cut along K
        packs, scales, offsets = _zeros(counted, self.bits)
        weights = mlx_products.Weights(packs, scales, offsets, GROUP_SIZE, self.bits)
        x = mx.zeros((self.rows, counted.columns), DTYPE)
        result = run[self.route](COUNT, x, weights)
        times = self.matrix.rows / counted.rows
        return [work.scaled(times) for work in _works(result.launches)]


def mlx_route(matrix: Matrix, rows: int, generation: int, size: str) -> Route:
    """The kernel that MLX takes for 4 bits on a chip."""
    limit = mlx_products.vector_limit(matrix.columns, matrix.rows, MLXChip(generation, size))
    if rows >= limit:
        return "qmm"
    return "qmv_wide" if rows > 1 and generation >= 15 else "qmv"


@dataclass(frozen=True)
class MLXAttention(Case):
    """`mx.fast.scaled_dot_product_attention` of L rows over so many positions, the rows' own among them."""

    heads: Heads
    rows: int  # L
    positions: int
    kernel: Attention
    parts: int = 0  # of two passes

    def count(self) -> list[Work]:
        """Of one head of keys and values, times their number."""
        dim, group = self.heads.head_dim, self.heads.group
        q = mx.zeros((1, group, self.rows, dim), DTYPE)
        k = mx.zeros((1, 1, self.positions, dim), DTYPE)
        causal = self.rows > 1
        if self.kernel == "sdpa_vector_2pass":
            result = mlx_attention.sdpa_vector_2pass(
                COUNT, q, k, k + 0, 1.0, self.parts, causal=causal
            )
        elif self.kernel == "sdpa_vector":
            result = mlx_attention.sdpa_vector(COUNT, q, k, k + 0, 1.0, causal=causal)
        else:
            result = mlx_attention.steel_attention(COUNT, q, k, k + 0, 1.0, causal=causal)
        return [work.scaled(self.heads.num_kv_heads) for work in _works(result.launches)]


def mlx_attention_case(heads: Heads, rows: int, positions: int, size: str) -> MLXAttention | None:
    """What MLX takes on a chip of this size; None where it spells attention out (metal.cpp: use_fallback)."""
    if rows > 8:
        is_fused = heads.head_dim in {64, 80, 96, 128}
        return MLXAttention(heads, rows, positions, "steel_attention") if is_fused else None
    if rows * heads.group > 32 or heads.head_dim not in {64, 96, 128, 256}:
        return None
    is_long = positions >= 4096 and heads.group > 1
    if not (is_long or (size != "g" and positions >= 1024)):
        return MLXAttention(heads, rows, positions, "sdpa_vector")
    q = mx.zeros((1, heads.group, rows, 1))
    parts = mlx_attention.blocks(q, mx.zeros((1, 1, positions, 1)), size)
    return MLXAttention(heads, rows, positions, "sdpa_vector_2pass", parts)


@dataclass(frozen=True)
class MLXUnfusedAttention(Case):
    """mlx-lm's attention of one row over packed keys and values: two products and a softmax between them."""

    heads: Heads
    positions: int  # at least 1024: there V is summed in parts
    bits: int

    def count(self) -> list[Work]:
        """Of one query head, times their number: each reads its group's keys and values again."""
        dim = self.heads.head_dim
        keys = mlx_products.Weights(
            *_zeros(Matrix(self.positions, dim), self.bits), GROUP_SIZE, self.bits
        )
        product = mlx_products.qmv_quad if dim in {64, 128} else mlx_products.qmv
        scores = product(COUNT, mx.zeros((1, dim), DTYPE), keys)
        weights = mlx_attention.softmax(COUNT, scores.y, precise=True)
        launches = [*scores.launches, *weights.launches, *self._sum_values(weights.y)]
        return [self._times(work) for work in _works(launches, packed_kv=True)]

    def _sum_values(self, weights: mx.array) -> list[Any]:
        """`qvm_split_k` and the sum of its parts."""
        dim, positions = self.heads.head_dim, self.positions
        packs, scales, offsets = _zeros(Matrix(positions, dim), self.bits)
        parts = 32 if positions > 8192 else 8
        length = ceil_div(positions, parts)
        strides = {"w": packs.shape[1], "s": scales.shape[1], "b": scales.shape[1]}
        inputs: dict[str, mx.array | Array] = {
            **{"w": packs, "scales": scales, "biases": offsets, "x": weights},
            **{"in_vec_size": int32(length), "out_vec_size": int32(dim)},
            **{"x_batch_ndims": int32(1), "w_batch_ndims": int32(1)},
            "x_shape": mx.array([parts, 1, length], dtype=mx.int32),
            "x_strides": mx.array([length, length, 1], dtype=mx.int64),
            "w_shape": mx.array([parts, length, strides["w"]], dtype=mx.int32),
            **{
                f"{name}_strides": mx.array([length * stride, stride, 1], dtype=mx.int64)
                for name, stride in strides.items()
            },
            "final_block_size": int32(positions - (parts - 1) * length),
        }
        headers = ("utils.h", "steel/gemm/gemm.h", "quantized_utils.h", "quantized.h")
        template = f"half, {GROUP_SIZE}, {self.bits}, {parts}"
        kernel = MLXKernel(headers, "affine_qvm_split_k", template)
        grid = (1, ceil_div(dim, 64), parts)
        made, ran = launch(COUNT, kernel, inputs, {"y": ((parts, dim), DTYPE)}, grid, (32, 2, 1))
        return [ran, mlx_products.sum_launch(COUNT, made["y"], mx.zeros((dim,), DTYPE))]

    def _times(self, work: Work) -> Work:
        scaled = work.scaled(self.heads.num_heads)
        kv = scaled.lines("kv")
        reads = dict(scaled.reads)
        if kv != Lines():
            reads["kv"] = replace(kv, unique=kv.unique / self.heads.group)
        return replace(scaled, reads=reads)


@cache
def _device() -> Device:
    return Device(mode="count")


def _count_ours(call: Callable[[], object]) -> list[Work]:
    device = _device()
    device.launches.clear()
    with metal_launch.on(device):  # type: ignore[arg-type]  # its arguments have names
        call()
    return _works(device.launches)


@dataclass(frozen=True)
class OurProduct(Case):
    """`qmv_norm`, `qmv_res` or `qmv_glu` of M rows; `exact` promises a row the bits that it has alone."""

    product: Product
    sizes: tuple[int, ...]  # rows of each matrix
    columns: int
    rows: int  # M
    exact: bool = False
    most_rows: int | None = None  # of all matrices, that are counted

    @property
    def share(self) -> float:
        """Of the matrices' rows, that is counted."""
        return 1 if self.most_rows is None else min(1.0, self.most_rows / sum(self.sizes))

    def count(self) -> list[Work]:
        """One dispatch."""
        sizes = [max(32, int(size * self.share) // 32 * 32) for size in self.sizes]
        if self.share == 1:
            sizes = list(self.sizes)
        weights = [
            Quantized(*_zeros(Matrix(size, self.columns), 4), group_size=GROUP_SIZE, bits=4)
            for size in sizes
        ]
        x = mx.zeros((self.rows, self.columns), DTYPE)
        norm = Norm(mx.ones((self.columns,), DTYPE), 1e-5)

        def call() -> object:
            if self.product == "norm":
                return metal_qmv.qmv_norm(x, norm, weights, exact=self.exact)
            if self.product == "glu":
                gate, up = weights
                return metal_qmv.qmv_glu(x, norm, gate, up, "silu", exact=self.exact)
            residual = mx.zeros((self.rows, sizes[0]), DTYPE)
            return metal_qmv.qmv_res(x, weights[0], residual, exact=self.exact)

        return [work.scaled(sum(self.sizes) / sum(sizes)) for work in _count_ours(call)]


@dataclass(frozen=True)
class OurAttention(Case):
    """`attn_decode` or `attn_decode_q`, and `attn_combine`: L rows over so many positions, their own among them."""

    heads: Heads
    rows: int  # L
    positions: int
    bits: int = 0  # of keys and values; 0: floats
    window: int = 0  # 0 sees all

    def count(self) -> list[Work]:
        """Of one head of keys and values, times their number."""
        heads, start = self.heads, self.positions - self.rows
        tail_start = start // CHUNK * CHUNK
        ring = ceil_div(self.window - 1, CHUNK) * CHUNK + CHUNK if self.window else 0
        slots = ring or ceil_div(tail_start, CAPACITY) * CAPACITY
        stored = StoredPlanes(
            self._planes(slots),
            self._planes(2 * CHUNK),
            (),
            (tail_start,),
            ring=ring,
            bits=self.bits,
            group_size=GROUP_SIZE if self.bits else 0,
        )
        positions = metal_attention.place(
            (start,), (self.rows,), (tail_start,), width=self.rows, ring=ring, window=self.window
        )
        width = (heads.group + 2) * heads.head_dim
        norm = Norm(mx.ones((heads.head_dim,), DTYPE), 1e-6) if heads.has_qk_norm else None

        def call() -> object:
            return metal_attention.attend(
                mx.zeros((self.rows, width), DTYPE),
                stored,
                positions,
                num_heads=heads.group,
                num_kv_heads=1,
                head_dim=heads.head_dim,
                scale=1.0,
                rope=Rope(mx.ones((heads.head_dim // 2,)), heads.head_dim),
                q_norm=norm,
                k_norm=norm,
            )

        return [work.scaled(heads.num_kv_heads) for work in _count_ours(call)]

    def _planes(self, slots: int) -> tuple[mx.array, ...]:
        dim = self.heads.head_dim
        shape = (2, 1, 1, slots)
        if not self.bits:
            return (mx.zeros((*shape, dim), DTYPE),)
        groups = mx.zeros((*shape, dim // GROUP_SIZE), DTYPE)
        return mx.zeros((*shape, dim * self.bits // 32), mx.uint32), groups, groups + 0
