"""MLX's own kernels, as the installed package has them, against float64: what they use compiles on Metal by definition.

In check mode and under two schedules, all findings on. The tolerance is that of the storage type: sums are float32.
"""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from metal_emulator import MetalError
from metal_emulator.mlx_attention import (
    sdpa_vector,
    sdpa_vector_2pass,
    softmax,
    steel_attention,
)
from metal_emulator.mlx_products import (
    Weights,
    qmm_splitk,
    qmm_t,
    qmv,
    qmv_quad,
    qmv_wide,
)
from metal_emulator.mlx_source import How, Result

Doubles = npt.NDArray[np.float64]
TOLERANCE = {mx.float32: 2e-6, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}
DTYPES = [mx.float32, mx.float16, mx.bfloat16]
CHECKS = [How("check", 0), How("check", 1)]
pytestmark = pytest.mark.parametrize("how", CHECKS, ids=["forward", "reverse"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float", "half", "bfloat"])
Product = Callable[[How, mx.array, Weights], Result]


def doubles(x: mx.array) -> Doubles:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def normal(seed: int, *shape: int, dtype: mx.Dtype) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def agree(got: mx.array, expected: Doubles, dtype: mx.Dtype) -> None:
    assert got.dtype == dtype
    assert got.shape == expected.shape
    error = np.abs(doubles(got) - expected).max() / np.abs(expected).max()
    assert error < TOLERANCE[dtype]


def packed(rows: int, columns: int, dtype: mx.Dtype, bits: int = 4, group: int = 64) -> Weights:
    w = normal(1, rows, columns, dtype=dtype) * columns**-0.5
    return Weights(*mx.quantize(w, group_size=group, bits=bits), group, bits)


def product_in_double(x: mx.array, weights: Weights) -> Doubles:
    if weights.biases is None:
        w = mx.dequantize(weights.w, weights.scales, mode="mxfp4", group_size=32, bits=4)
    else:
        parts = (weights.w, weights.scales.astype(mx.float32), weights.biases.astype(mx.float32))
        w = mx.dequantize(*parts, group_size=weights.group_size, bits=weights.bits)
    return doubles(x) @ doubles(w).T


@every_dtype
@pytest.mark.parametrize(
    ("product", "rows", "n", "k", "bits", "group"),
    [
        (qmv, 1, 64, 512, 4, 64),
        (qmv, 3, 13, 192, 4, 32),
        (qmv_quad, 2, 64, 64, 4, 64),
        (qmv_wide, 4, 24, 512, 4, 64),
        (qmm_t, 32, 64, 128, 4, 64),
        (qmm_splitk, 5, 64, 256, 4, 64),
    ],
)
def test_products(
    how: How, dtype: mx.Dtype, product: Product, rows: int, n: int, k: int, bits: int, group: int
) -> None:
    weights, x = packed(n, k, dtype, bits, group), normal(2, rows, k, dtype=dtype)
    agree(product(how, x, weights).y, product_in_double(x, weights), dtype)


@pytest.mark.parametrize(
    ("product", "rows", "n", "k", "bits", "group"),
    [
        (qmv, 2, 8, 1024, 8, 32),
        (qmv, 1, 16, 512, 2, 128),
        (qmv, 1, 16, 512, 3, 64),
        (qmv, 3, 3, 160, 6, 32),
        (qmv, 1, 9, 320, 5, 64),
        (qmv_quad, 1, 64, 128, 8, 32),
        (qmv_wide, 7, 11, 192, 8, 64),
        (qmm_t, 17, 40, 96, 8, 32),
        (qmm_splitk, 16, 40, 192, 6, 32),
    ],
)
def test_products_of_other_widths(
    how: How, product: Product, rows: int, n: int, k: int, bits: int, group: int
) -> None:
    weights, x = packed(n, k, mx.float16, bits, group), normal(2, rows, k, dtype=mx.float16)
    agree(product(how, x, weights).y, product_in_double(x, weights), mx.float16)


def test_a_read_beyond_the_scales_in_mlx_is_found(how: How) -> None:
    """`qmv_quad` loads scale and bias of all 64 rows of its last group, also of those beyond N. They are not used."""
    with pytest.raises(MetalError) as caught:
        qmv_quad(how, normal(2, 1, 64, dtype=mx.float16), packed(70, 64, mx.float16))
    assert caught.value.kind == "out_of_bounds"
    assert caught.value.file.endswith("quantized.h")
    assert "scales" in caught.value.message or "biases" in caught.value.message


@every_dtype
@pytest.mark.parametrize(
    ("product", "rows", "n", "k"),
    [(qmv, 1, 16, 512), (qmv, 2, 13, 96), (qmv_wide, 4, 16, 512), (qmm_t, 9, 32, 64)],
)
def test_mxfp4(how: How, dtype: mx.Dtype, product: Product, rows: int, n: int, k: int) -> None:
    w, scales, *_ = mx.quantize(
        normal(1, n, k, dtype=mx.float32), mode="mxfp4", group_size=32, bits=4
    )
    weights, x = Weights(w, scales, None, 32, 4), normal(2, rows, k, dtype=dtype)
    agree(product(how, x, weights).y, product_in_double(x, weights), dtype)


def attention_in_double(
    q: mx.array, k: mx.array, v: mx.array, scale: float, causal: bool = False
) -> Doubles:
    factor = q.shape[1] // k.shape[1]
    keys, values = (np.repeat(doubles(a), factor, axis=1) for a in (k, v))
    scores = doubles(q) * scale @ keys.transpose(0, 1, 3, 2)
    if causal:
        rows, stored = scores.shape[-2:]
        scores = np.where(
            np.arange(stored) <= np.arange(rows)[:, None] + stored - rows, scores, -np.inf
        )
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    result: Doubles = weights / weights.sum(-1, keepdims=True) @ values
    return result


def heads(
    dtype: mx.Dtype, batch: int, h: int, kv: int, rows: int, stored: int, dim: int
) -> tuple[mx.array, ...]:
    return (
        normal(3, batch, h, rows, dim, dtype=dtype),
        normal(4, batch, kv, stored, dim, dtype=dtype),
        normal(5, batch, kv, stored, dim, dtype=dtype),
    )


@every_dtype
@pytest.mark.parametrize(
    ("batch", "h", "kv", "rows", "stored", "dim", "causal"),
    [
        (1, 4, 1, 1, 70, 64, False),
        (2, 2, 2, 1, 33, 128, False),
        (1, 2, 1, 3, 40, 96, True),
        (1, 1, 1, 1, 5, 256, False),
    ],
)
def test_sdpa_vector(
    how: How,
    dtype: mx.Dtype,
    batch: int,
    h: int,
    kv: int,
    rows: int,
    stored: int,
    dim: int,
    causal: bool,
) -> None:
    q, k, v = heads(dtype, batch, h, kv, rows, stored, dim)
    result = sdpa_vector(how, q, k, v, dim**-0.5, causal=causal)
    agree(result.y, attention_in_double(q, k, v, dim**-0.5, causal), dtype)


@every_dtype
@pytest.mark.parametrize(
    ("batch", "h", "kv", "rows", "stored", "dim", "causal"),
    [(1, 4, 2, 1, 300, 64, False), (2, 2, 1, 1, 170, 128, False), (1, 2, 1, 2, 140, 64, True)],
)
def test_sdpa_vector_in_two_passes(
    how: How,
    dtype: mx.Dtype,
    batch: int,
    h: int,
    kv: int,
    rows: int,
    stored: int,
    dim: int,
    causal: bool,
) -> None:
    q, k, v = heads(dtype, batch, h, kv, rows, stored, dim)
    result = sdpa_vector_2pass(how, q, k, v, dim**-0.5, 32, causal=causal)
    assert len(result.launches) == 2
    agree(result.y, attention_in_double(q, k, v, dim**-0.5, causal), dtype)


@every_dtype
@pytest.mark.parametrize(
    ("h", "kv", "rows", "stored", "dim", "causal"),
    [(2, 1, 64, 64, 64, True), (1, 1, 35, 50, 128, True), (1, 1, 40, 33, 64, False)],
)
def test_steel_attention(
    how: How, dtype: mx.Dtype, h: int, kv: int, rows: int, stored: int, dim: int, causal: bool
) -> None:
    q, k, v = heads(dtype, 1, h, kv, rows, stored, dim)
    result = steel_attention(how, q, k, v, dim**-0.5, causal=causal)
    agree(result.y, attention_in_double(q, k, v, dim**-0.5, causal), dtype)


@every_dtype
@pytest.mark.parametrize(
    ("rows", "columns", "precise"),
    [(3, 128, False), (2, 77, False), (1, 1, False), (3, 130, True), (1, 4200, True)],
)
def test_softmax(how: How, dtype: mx.Dtype, rows: int, columns: int, precise: bool) -> None:
    x = normal(6, rows, columns, dtype=dtype)
    expected = np.exp(doubles(x))
    agree(softmax(how, x, precise=precise).y, expected / expected.sum(-1, keepdims=True), dtype)
