"""Products of decoding as test cases: random inputs, the result in float64, and how far off one may be."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import mlx.core as mx
import numpy as np

from mlx_edge.ops import metal_qmv
from mlx_edge.ops.types import Dense, Linear, Norm, Quantized
from tests.metal.devices import run_checked
from tests.ops import oracle

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
FORMATS = (0, 2, 3, 4, 5, 6, 8, "mxfp4")  # 0: floats
MANTISSA = {mx.float32: 23, mx.float16: 10, mx.bfloat16: 7}
MIN_EXPONENT = {mx.float32: -126, mx.float16: -14, mx.bfloat16: -126}
EPS = 0.25  # large enough to show in every dtype


@dataclass(frozen=True)
class Case:
    product: str
    form: int | str
    dtype: mx.Dtype
    m: int
    sizes: tuple[int, ...]
    k: int
    group_size: int = 64
    biases: tuple[bool, ...] = (False, False, False)
    has_norm: bool = True
    scales: mx.Dtype | None = None
    activation: str = "silu"
    exact: bool = True

    def __str__(self) -> str:
        sizes = "+".join(map(str, self.sizes))
        dtype = str(self.dtype).removeprefix("mlx.core.")
        kernel = f"{'qmv' if self.exact else 'qmm'}_{self.product}"
        return f"{kernel}-{dtype}-{self.form}g{self.group_size}-{self.m}x{sizes}x{self.k}"


def sweep(*, exact: bool) -> Iterator[Case]:
    """Every product, dtype and format; groups, rows, sizes and the rest in turn, by cycles of coprime lengths."""
    all_rows = (13, 1, 2, 3, 16, 6, 8) if exact else (5, 16, 4, 8, 11)
    all_sizes = ((24, 9, 11), (33,), (32, 9), (7,), (4,), (16, 16, 40), (1,), (70,), (40, 8))
    columns = {32: (160, 416), 64: (320, 832), 128: (384, 1152)}
    for i, (name, form, dtype) in enumerate(
        product(("norm", "res", "glu"), FORMATS, range(len(DTYPES)))
    ):
        group = (32, 64, 128)[(i + i // 3) % 3] if form != "mxfp4" else 32
        sizes = all_sizes[i % len(all_sizes)]
        yield Case(
            name,
            form,
            DTYPES[dtype],
            all_rows[i % len(all_rows)],
            {"norm": sizes, "res": sizes[:1], "glu": sizes[:1] * 2}[name],
            columns[group][i % 2],
            group,
            ((False,) * 3, (True,) * 3, (False, True, False))[i // 2 % 3],
            has_norm=i % 4 != 3,
            scales=DTYPES[i // 3 % 3],
            activation=("gelu_tanh", "silu")[i // 2 % 2],
            exact=exact,
        )


def make_weight(case: Case, n: int, rng: np.random.Generator, *, has_bias: bool) -> Linear:
    bias = mx.array(rng.normal(size=n)).astype(case.dtype) if has_bias else None
    unit = 3.0 / np.sqrt(case.k)
    if case.form == 0:
        dense = mx.array(rng.normal(size=(n, case.k)) * unit)
        return Dense(dense.astype(case.scales or case.dtype), bias)
    number = 4 if case.form == "mxfp4" else int(case.form)
    words = rng.integers(0, 1 << 32, size=(n, case.k * number // 32), dtype=np.uint32)
    packs, groups = mx.array(words), (n, case.k // case.group_size)
    if case.form == "mxfp4":
        scales = mx.array(rng.integers(118, 126, size=groups).astype(np.uint8))
        return Quantized(packs, scales, None, 32, 4, "mxfp4", bias)
    scales = rng.uniform(0.5, 1.5, size=groups) * unit * 4 / 2**number
    offsets = -scales * 2 ** (number - 1) * rng.uniform(0.5, 1.5, size=groups)
    dtype = case.scales or case.dtype
    arrays = (mx.array(a).astype(dtype) for a in (scales, offsets))
    return Quantized(packs, *arrays, case.group_size, number, bias=bias)


@dataclass(frozen=True)
class Inputs:
    x: mx.array
    linears: list[Linear]
    norm: Norm | None
    residual: mx.array

    def run(self, case: Case, rows: slice = slice(None)) -> mx.array:
        x, residual = mx.contiguous(self.x[rows]), mx.contiguous(self.residual[rows])
        if case.product == "norm":
            return metal_qmv.qmv_norm(x, self.norm, self.linears, exact=case.exact)
        if case.product == "res":
            return metal_qmv.qmv_res(x, self.linears[0], residual, exact=case.exact)
        return metal_qmv.qmv_glu(x, self.norm, *self.linears, case.activation, exact=case.exact)


def make_inputs(case: Case) -> Inputs:
    rng = np.random.default_rng(zlib.crc32(str(case).encode()))
    flags = zip(case.sizes, case.biases, strict=False)
    linears = [make_weight(case, n, rng, has_bias=flag) for n, flag in flags]
    x = mx.array(rng.normal(size=(case.m, case.k))).astype(case.dtype)
    gain = mx.array(rng.uniform(0.5, 1.5, size=case.k)).astype(case.scales or case.dtype)
    residual = mx.array(rng.normal(size=(case.m, case.sizes[0]))).astype(case.dtype)
    has_norm = case.has_norm and case.product != "res"
    return Inputs(x, linears, Norm(gain, EPS) if has_norm else None, residual)


def products(case: Case, inputs: Inputs) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """In float64: x W^T + bias of each matrix, and how far off its float32 sum may be."""
    x = oracle.f64(inputs.x)
    x = x if inputs.norm is None else oracle.rms_norm(x, inputs.norm)
    values, errors = [], []
    for one in inputs.linears:
        lengths = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(oracle.matrix(one), axis=1)
        bias = 0.0 if one.bias is None else np.abs(oracle.f64(one.bias))
        values.append(oracle.linear(x, one))
        errors.append(2.0**-22 * np.sqrt(case.k) * lengths + 2.0**-23 * bias)
    return values, errors


def expected(case: Case, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """The result in float64, and how far off it may be before it is rounded to its dtype."""
    values, errors = products(case, inputs)
    if case.product == "norm":
        return np.concatenate(values, axis=1), np.concatenate(errors, axis=1)
    if case.product == "res":
        return values[0] + oracle.f64(inputs.residual), errors[0]
    (gate, up), (gate_error, up_error) = values, errors
    y = oracle.glu(gate, up, case.activation)
    # Both activations are at most |gate| and their slope at most 1.13; beyond, exp and its argument are rounded.
    error = 1.13 * gate_error * (np.abs(up) + up_error) + np.abs(gate) * up_error
    return y, error + np.abs(y) * 2.0**-22 * (4 + np.abs(gate) ** 3)


def ulp(y: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    exponent = np.floor(np.log2(np.maximum(np.abs(y), 2.0 ** MIN_EXPONENT[dtype])))
    return 2.0 ** (exponent - MANTISSA[dtype])


def check_against_float64(case: Case) -> None:
    """In check mode, under both schedules: within 0.51 ulp and the error of float32 sums."""
    inputs = make_inputs(case)
    y = oracle.f64(run_checked(lambda: inputs.run(case)))
    want, error = expected(case, inputs)
    allowed = 0.51 * ulp(want, case.dtype) + error
    assert (np.abs(y - want) <= allowed).all(), np.max(np.abs(y - want) / allowed)
