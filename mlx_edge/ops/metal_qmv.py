"""Launches of the matrix products of decoding: which kernel, and what it is passed.

`metal_kernels/qmv.metal` sums along K by lanes, for any number of rows up to 16, and a row has the bits that it has
alone; `qmm_small.metal` does it on 8x8 matrices, which is faster from 4 rows on. Both have the same three products:
`norm`, `res`, `glu`. Knows no layer and no cache, and does not choose between a kernel and the reference.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar
from weakref import finalize

import mlx.core as mx

from mlx_edge.ops.metal_launch import Kernel, Template
from mlx_edge.ops.metal_tiling import (
    FLOAT_BITS,
    LANE_RUN,
    LANES,
    MATRIX_RUN,
    Buffer,
    Product,
    ProductCase,
    WeightFormat,
    cut_lanes,
    cut_matrices,
)
from mlx_edge.ops.types import Activation, Dense, Linear, Norm, Packed, Quantized

MAX_ROWS = 16
MAX_LANE_ROWS = 3  # beyond, rows are multiplied on matrices unless their bits are promised
WARM_UP_ROWS = (1, 2, 3, 8, 16)  # launches of so many rows build every pipeline of some weights
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
METAL_TYPES = {
    mx.float32: "float",
    mx.float16: "half",
    mx.bfloat16: "bfloat",
    mx.uint32: "uint",
    mx.uint8: "uchar",
}
FLOATS = (mx.float16, mx.bfloat16, mx.float32)
R = TypeVar("R")
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu_tanh")  # by their number in epilogue.metal

# Where a launch lacks an array x stands for it: a pointer that is passed on and not read.
_BODY = """
using namespace mlx_edge;
using W = {weight};
constexpr int SLOTS = PAIR ? 2 * TILE : TILE;
threadgroup float shared[PARTS * ROWS * (SLOTS + 1)];
const uint rows = x_shape[0];
const Tile tile = find_tile<TILE, N0, N1, N2>(threadgroup_position_in_grid.x);
const W first = {first};
const W second = {second};
Product<BITS, MXFP4, RUN, GROUP, K, ROWS, SPAN, TILE, PARTS, PAIR, NORM, T, {norm_type}, W> product =
    {{x, rows, {norm}, first, second}};
product.multiply(tile, shared, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
finish<ROWS, TILE, PARTS, THREADS, K, N0 + N1 + N2, PAIR, NORM, BIAS, RESIDUAL, ACTIVATION>(
    shared, rows, tile, {params}, first, second, {residual}, y, thread_index_in_threadgroup);
"""


@dataclass(frozen=True)
class _Plan:
    kernel: Kernel
    template: Template
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    columns: int  # of y
    inputs: tuple[mx.array, ...] = ()  # between x and the residual


_known: dict[tuple[Hashable, ...], Any] = {}


def _remember(objects: Sequence[object], key: tuple[Hashable, ...], make: Callable[[], R]) -> R:
    """What `make` gives, made once for these very objects and forgotten with them: a step has a hundred launches."""
    key = (*key, *map(id, objects))
    if key not in _known:
        _known[key] = make()
        for one in objects:
            finalize(one, _known.pop, key, None).atexit = False
    found: R = _known[key]
    return found


def qmv_norm(
    x: mx.array, norm: Norm | None, linears: Sequence[Linear], *, exact: bool = False
) -> mx.array:
    """norm(x) (M, K) times the transposed weights, side by side: (M, N0 + N1 + N2) in x's dtype, M at most 16.

    One to three weights of one format. `exact` promises that a row has the bits that it has alone.
    """
    return _run("norm", x, norm, linears, exact=exact)


def qmv_res(x: mx.array, linear: Linear, residual: mx.array, *, exact: bool = False) -> mx.array:
    """residual (M, N) + x (M, K) times the transposed weight: (M, N) in x's dtype, M at most 16."""
    return _run("res", x, None, [linear], residual=residual, exact=exact)


def qmv_glu(
    x: mx.array,
    norm: Norm | None,
    gate: Linear,
    up: Linear,
    activation: Activation,
    *,
    exact: bool = False,
) -> mx.array:
    """activation(norm(x) gate^T) * (norm(x) up^T) for x (M, K): (M, N) in x's dtype, M at most 16."""
    return _run("glu", x, norm, [gate, up], activation=activation, exact=exact)


def describe(
    x: mx.array, linears: Sequence[Linear], product: Product = "norm", *, exact: bool = False
) -> str:
    """The name of the kernel that multiplies x (M, K)."""
    return f"{'qmm' if _is_on_matrices(x, linears, exact) else 'qmv'}_{product}"


def have_one_format(linears: Sequence[Linear]) -> bool:
    """Whether one launch can multiply by all of them."""
    return _remember(linears, ("have_one_format",), lambda: _have_one_format(linears))


def _have_one_format(linears: Sequence[Linear]) -> bool:
    return len({(_format(one), _bias_buffer(linears, one)) for one in linears}) == 1


def refuse(x: mx.array, linears: Sequence[Linear]) -> str | None:
    """Why no kernel multiplies x (M, K) by these weights in one launch, and what is served; None when one does."""
    return _remember(linears, ("refuse", x.dtype, x.shape), lambda: _refuse(x, linears))


def _refuse(x: mx.array, linears: Sequence[Linear]) -> str | None:
    if x.dtype not in FLOATS:
        return f"x is {_name(x.dtype)}; served are float16, bfloat16 and float32"
    if not 1 <= x.shape[0] <= MAX_ROWS:
        return f"{x.shape[0]} rows; served are 1 to {MAX_ROWS}"
    for one in linears:
        reason = refuse_residual(one)
        if reason is not None:
            return reason
        if one.shape[1] != x.shape[1]:
            return f"x has {x.shape[1]} columns and the weights {one.shape[1]}"
    if not have_one_format(linears):
        kinds = " and ".join(str(_format(one)) for one in linears)
        return f"mixed formats: {kinds}; one launch takes weights and biases of one format"
    return None


def refuse_residual(weight: Linear) -> str | None:
    """Why no kernel multiplies by this weight, whatever x is; None when one does."""
    if isinstance(weight, Packed):
        return "weights are packed for a CPU; served is MLX's layout"
    if weight.input_scale is not None:
        return "inputs are rounded in fixed steps; served are inputs as they come"
    if isinstance(weight, Dense):
        if weight.weight.dtype not in FLOATS:
            return f"weights are {_name(weight.weight.dtype)}; served are float16, bfloat16 and float32"
        if weight.shape[1] % LANE_RUN[FLOAT_BITS]:
            return f"float weights have {weight.shape[1]} columns; served are multiples of 8"
        return None
    if weight.mode not in ("affine", "mxfp4"):
        return f"weights are {weight.mode}; served are affine and mxfp4"
    if weight.bits not in BITS:
        return f"weights have {weight.bits} bits; served are 2, 3, 4, 5, 6, 8 and mxfp4"
    if weight.group_size not in GROUP_SIZES:
        return f"weights have groups of {weight.group_size}; served are 32, 64 and 128"
    return None


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def _arrays(weight: Linear) -> list[mx.array]:
    if isinstance(weight, Quantized):
        stored = (weight.weight, weight.scales, weight.offsets)
        return [array for array in stored if array is not None]
    assert isinstance(weight, Dense)
    return [weight.weight]


def _format(weight: Linear) -> WeightFormat:
    buffers = tuple(map(Buffer.of, _arrays(weight)))
    if isinstance(weight, Quantized):
        return WeightFormat(weight.bits, weight.group_size, weight.mode, buffers)
    return WeightFormat(FLOAT_BITS, 0, "floats", buffers)


def _bias(linears: Sequence[Linear], weight: Linear) -> mx.array | None:
    """The weight's bias; zeros where only another of the launch has one."""
    assert not isinstance(weight, Packed)
    if weight.bias is not None:
        return weight.bias
    biases = [one.bias for one in linears if not isinstance(one, Packed)]
    other = next((bias for bias in biases if bias is not None), None)
    return None if other is None else _zeros(weight.shape[0], other.dtype)


def _bias_buffer(linears: Sequence[Linear], weight: Linear) -> Buffer | None:
    bias = _bias(linears, weight)
    return None if bias is None else Buffer.of(bias)


@cache
def _zeros(size: int, dtype: mx.Dtype) -> mx.array:
    return mx.zeros((size,), dtype)


@cache
def _params(eps: float) -> mx.array:
    return mx.array([eps] + [0.0] * 7, dtype=mx.float32)


def _is_on_matrices(x: mx.array, linears: Sequence[Linear], exact: bool) -> bool:
    fits = isinstance(linears[0], Quantized) or x.shape[1] % MATRIX_RUN[FLOAT_BITS] == 0
    return not exact and x.shape[0] > MAX_LANE_ROWS and fits


def _run(
    product: Product,
    x: mx.array,
    norm: Norm | None,
    linears: Sequence[Linear],
    *,
    residual: mx.array | None = None,
    activation: Activation = "silu",
    exact: bool,
) -> mx.array:
    owners = linears if norm is None else [*linears, norm]
    key = (product, x.dtype, x.shape, activation, exact)
    plan = _remember(owners, key, lambda: _prepare(product, x, norm, linears, activation, exact))
    (y,) = plan.kernel(
        [x, *plan.inputs] if residual is None else [x, *plan.inputs, residual],
        template=plan.template,
        grid=plan.grid,
        threadgroup=plan.threadgroup,
        shapes=[(x.shape[0], plan.columns)],
        dtypes=[x.dtype],
    )
    return y


def _prepare(
    product: Product,
    x: mx.array,
    norm: Norm | None,
    linears: Sequence[Linear],
    activation: Activation,
    exact: bool,
) -> _Plan:
    reason = _refuse(x, linears)
    if reason is not None:
        raise ValueError(reason)
    is_on_matrices = _is_on_matrices(x, linears, exact)
    case = ProductCase(
        product,
        x.dtype,
        max(8 if is_on_matrices else 1, 1 << (x.shape[0] - 1).bit_length()),
        is_on_matrices,
        _format(linears[0]),
        x.shape[1],
        tuple(one.shape[0] for one in linears),
        None if norm is None else Buffer.of(norm.weight),
        _bias_buffer(linears, linears[0]),
        activation,
    )
    inputs = [array for one in linears for array in _arrays(one)]
    inputs += [bias for bias in (_bias(linears, one) for one in linears) if bias is not None]
    inputs += [] if norm is None else [norm.weight, _params(norm.eps)]
    return replace(_plan(case), inputs=tuple(inputs))


@cache
def _plan(case: ProductCase) -> _Plan:
    cut = cut_matrices(case) if case.is_on_matrices else cut_lanes(case)
    threads = case.pair * cut.tile // cut.span * cut.parts * LANES
    template: dict[str, int | bool | mx.Dtype] = {
        **{"T": case.dtype, "BITS": case.weight.bits, "MXFP4": case.weight.mode == "mxfp4"},
        **{"GROUP": case.weight.group_size or case.columns, "K": case.columns},
        **{f"N{i}": size for i, size in enumerate([*case.outputs, 0, 0][:3])},
        **{"ROWS": case.rows, "RUN": cut.run, "SPAN": cut.span, "TILE": cut.tile},
        **{"PARTS": cut.parts, "THREADS": threads, "PAIR": case.product == "glu"},
        **{"NORM": case.norm is not None, "BIAS": case.bias is not None},
        **{"RESIDUAL": case.product == "res", "ACTIVATION": ACTIVATIONS.index(case.activation)},
    }
    tiles = sum(-(-size // cut.tile) for size in case.outputs)
    grid, threadgroup = (tiles * threads, 1, 1), (threads, 1, 1)
    return _Plan(_kernel(case), tuple(template.items()), grid, threadgroup, sum(case.outputs))


def _kernel(case: ProductCase) -> Kernel:
    """The kernel over the buffers that the case has."""
    indices = range(len(case.sizes))
    stored = [*zip(("packs", "scales", "offsets"), case.weight.buffers, strict=False)]
    bias = [("bias", case.bias)] if case.bias is not None else []
    types = {name: _pointer(buffer) for name, buffer in (*stored, *bias)}
    inputs = ["x", *(f"{name}{i}" for i in indices for name, _ in stored)]
    inputs += [f"{name}{i}" for i in indices for name, _ in bias]
    inputs += ["norm", "params"] if case.norm is not None else []
    inputs += ["residual"] if case.product == "res" else []
    fields = ("packs", "scales", "offsets", "bias")
    weights = [
        f"W{{{', '.join(f'{name}{i}' if name in types else 'x' for name in fields)}}}"
        for i in indices
    ]
    picked = weights[-1]
    for i in reversed(indices[:-1]):
        picked = f"tile.matrix == {i} ? {weights[i]} : {picked}"
    is_glu = case.product == "glu"
    body = _BODY.format(
        weight=f"Weight<{', '.join(types.get(name, _pointer(None)) for name in fields)}>",
        first=weights[0] if is_glu else picked,
        second=weights[1] if is_glu else "first",
        norm_type=_pointer(case.norm),
        **{name: name if name in inputs else "x" for name in ("norm", "params", "residual")},
    )
    stem, file = ("qmm", "qmm_small.metal") if case.is_on_matrices else ("qmv", "qmv.metal")
    return Kernel(f"{stem}_{case.product}", file, tuple(inputs), ("y",), body)


def _pointer(buffer: Buffer | None) -> str:
    """The type that MLX's signature gives a buffer; x's for one that is not there."""
    if buffer is None:
        return "const device T*"
    return f"const {'constant' if buffer.is_small else 'device'} {METAL_TYPES[buffer.dtype]}*"
