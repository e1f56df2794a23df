"""Every case of every op, on every backend that this machine has, against float64.

The bound for float32 is a few units in the last place of the largest value. Half and bfloat are held to the
rounding of their type where a backend accumulates in float32; MLX's own CPU backend sums in the storage type,
which is why the reference is measured in float32 here and why models are held in float32 on a CPU.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_edge import ops
from mlx_edge.cache import KVCache, PagedKVCache, prepare_step
from mlx_edge.errors import HardwareNotSupportedError
from mlx_edge.models.packing import pack_weight
from mlx_edge.ops.cases import (
    TEST,
    AttentionCase,
    ExpertsCase,
    HeadCase,
    LayerCase,
    LinearCase,
    RaggedCase,
    RotateCase,
    RowCase,
    WithinCase,
)
from mlx_edge.ops.reference import IMPLEMENTATIONS
from mlx_edge.ops.select import BACKENDS
from tests.ops import oracle

TOLERANCE = 3e-6  # of the largest value of the result, float32
INT8_TOLERANCE = (
    5e-2  # where activations are int8 codes: steps of 1 / 127, and results as small as one number
)


@dataclass(frozen=True)
class Served:
    """A backend, and the precision of the activations that meet its quantized weights."""

    backend: str
    precision: ops.Precision = "float"

    def __str__(self) -> str:
        return f"{self.backend}-int8" if self.precision == "int8" else self.backend


LAYERS = [*map(LayerCase, TEST.block), *TEST.layers]
SERVED = [*(Served(backend.name) for backend in BACKENDS), Served("cpu", "int8")]


@pytest.fixture(params=SERVED, ids=str, autouse=True)
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    lacking = next(b for b in BACKENDS if b.name == request.param.backend).missing()
    if lacking is not None:
        pytest.skip(f"{request.param}: {lacking}")
    with ops.use(request.param.backend):
        mx.random.seed(7)
        yield request.param


def make_ready(weights: ops.Linear, served: Served) -> ops.Linear:
    """The weights as the backend takes them; skips what it says it does not serve."""
    if served.backend != "cpu":
        return weights
    assert not isinstance(weights, ops.Packed)
    try:
        return pack_weight(weights, served.precision)
    except ValueError as error:
        pytest.skip(f"left to the reference: {error}")


def skip_missing_op(op: str, served: Served) -> None:
    backend = next(b for b in BACKENDS if b.name == served.backend)
    if op not in backend.ops:
        pytest.skip(f"{backend.name} has no {op} apart from its blocks")


def skip_refused(op: str, served: Served, *args: object, **kwargs: object) -> None:
    """A call that the Metal kernels refuse in words is one that the reference serves on a Mac."""
    if served.backend not in {"metal", "emulated"}:
        return
    try:
        ops.choose(op, *args, **kwargs)
    except HardwareNotSupportedError as error:
        pytest.skip(f"left to the reference: {error}")


def tolerance_of(served: Served, bits: int) -> float:
    return INT8_TOLERANCE if served.precision == "int8" and bits else TOLERANCE


def normal(*shape: int) -> mx.array:
    return mx.random.normal(shape)


def make_linear(
    n: int,
    k: int,
    bits: int = 0,
    group_size: int = 64,
    has_bias: bool = False,
    mode: str = "affine",
):
    weight = normal(n, k) / k**0.5
    bias = normal(n) if has_bias else None
    if not bits:
        return ops.Dense(weight, bias)
    packs, scales, *offsets = mx.quantize(weight, group_size=group_size, bits=bits, mode=mode)
    offset = offsets[0] if offsets else None
    return ops.Quantized(packs, scales, offset, group_size, bits, mode, bias=bias)


def make_norm(size: int) -> ops.Norm:
    return ops.Norm(1 + 0.1 * normal(size), 1e-5)


def assert_close(found: mx.array, wanted: np.ndarray, tolerance: float = TOLERANCE) -> None:
    assert found.shape == wanted.shape
    error = np.abs(oracle.f64(found) - wanted).max()
    assert error <= tolerance * np.abs(wanted).max()


@pytest.mark.parametrize("case", TEST.linear, ids=str)
def test_linear(case: LinearCase, served: Served) -> None:
    weights = make_ready(
        make_linear(case.n, case.k, case.bits, case.group_size, case.has_bias, case.mode), served
    )
    x = normal(1, case.m, case.k)
    skip_refused("linear", served, x, weights)
    wanted = oracle.linear(oracle.f64(x), weights)
    assert_close(ops.linear(x, weights), wanted, tolerance_of(served, case.bits))


@pytest.mark.parametrize("case", TEST.rows, ids=str)
def test_rms_norm(case: RowCase) -> None:
    x, norm = normal(1, case.rows, case.width), make_norm(case.width)
    assert_close(ops.rms_norm(x, norm), oracle.rms_norm(oracle.f64(x), norm))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "swiglu_oai"])
@pytest.mark.parametrize("case", TEST.rows, ids=str)
def test_glu(case: RowCase, activation: ops.Activation) -> None:
    gate, up = 4 * normal(1, case.rows, case.width), normal(1, case.rows, case.width)
    wanted = oracle.glu(oracle.f64(gate), oracle.f64(up), activation)
    assert_close(ops.glu(gate, up, activation), wanted)


@pytest.mark.parametrize("case", TEST.heads, ids=str)
def test_embed_and_head(case: HeadCase, served: Served) -> None:
    table = make_ready(make_linear(53, 128, case.bits), served)
    tokens = mx.array([[0, 52, 7], [7, 1, 0]])
    embedding = ops.Embedding(table, case.embed_scale)
    x = ops.embed(tokens, embedding)
    assert_close(x, oracle.embed(np.array(tokens), embedding))
    weights = ops.HeadWeights(make_norm(128), table, case.scale, case.softcap)
    wanted = oracle.head(oracle.f64(x), weights)
    assert_close(ops.head(x, weights), wanted, tolerance_of(served, case.bits))


def test_embed_scales_a_half_by_a_half() -> None:
    """In training the factor had the table's own dtype: 55.43 was 55.5."""
    if not ops.uses_cpu_kernels():
        pytest.skip("rows of halves become floats in the CPU kernels alone")
    table = ops.Dense(make_linear(7, 64).weight.astype(mx.bfloat16))
    wanted = table.weight.astype(mx.float32) * 55.5
    assert mx.array_equal(ops.embed(mx.arange(7), ops.Embedding(pack_weight(table), 55.43)), wanted)


def make_rope(dims: int, is_interleaved: bool, **options: Any) -> ops.Rope:
    return ops.Rope(10000.0 ** (mx.arange(0, dims, 2) / dims), dims, is_interleaved, **options)


def make_axes(batch: int, width: int) -> mx.array:
    """Positions in time, height and width, of which none is the index."""
    return mx.random.randint(0, 90, (3, batch, width)).astype(mx.int32)


@pytest.mark.parametrize("case", TEST.rotate, ids=str)
def test_rotate(case: RotateCase, served: Served) -> None:
    skip_missing_op("rotate", served)
    rope = make_rope(
        case.dims, case.is_interleaved, magnitude=case.magnitude, sections=case.sections or ()
    )
    x = normal(2, 3, 5, 16)
    axes = None if case.sections is None else make_axes(2, 5)
    meta = ops.StepMeta((0, 117), (5, 5), 5, shifts=case.shifts, axes=axes)
    turns = np.array(meta.positions) + np.array(case.shifts or (0, 0))[:, None]
    turns = turns if axes is None else np.array(axes)
    wanted = oracle.rotate(oracle.f64(x), rope, turns)
    assert_close(ops.rotate(x, rope, meta), wanted, 1e-5)  # angles are float32


@pytest.mark.parametrize("case", TEST.attention, ids=str)
def test_attention(case: AttentionCase, served: Served) -> None:
    skip_missing_op("attention", served)
    total = case.stored + case.width
    keys, values = (normal(case.batch, case.kv_heads, total, case.head_dim) for _ in range(2))
    q = normal(case.batch, case.heads, case.width, case.head_dim)
    meta = ops.StepMeta.uniform(case.stored, batch_size=case.batch, width=case.width)
    cuts = [total * i // case.segments for i in range(case.segments + 1)]
    segments = [
        ops.Segment(keys[:, :, a:b], values[:, :, a:b], mx.arange(a, b)[None], a, b - 1)
        for a, b in pairwise(cuts)
    ]
    scale = case.head_dim**-0.5
    wanted = oracle.attention(
        *(oracle.f64(a) for a in (q, keys, values)),
        np.array(meta.positions),
        np.arange(total)[None],
        scale,
        case.window,
    )
    assert_close(ops.attention(q, segments, meta, scale=scale, window=case.window), wanted)


def test_attention_skips_empty_slots_and_padding(served: Served) -> None:
    skip_missing_op("attention", served)
    keys, values, q = normal(2, 2, 9, 16), normal(2, 2, 9, 16), normal(2, 4, 3, 16)
    # Row 0 holds 5 positions in ring order, row 1 all nine; row 0 brings 2 new tokens, row 1 three.
    positions = mx.array([[4, 0, -1, 1, 2, -1, 3, -1, -1], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
    meta = ops.StepMeta((3, 6), (2, 3), 3)
    segment = ops.Segment(keys, values, positions, 0, 8, has_gaps=True)
    found = ops.attention(q, [segment], meta, scale=0.25)
    wanted = oracle.attention(
        *(oracle.f64(a) for a in (q, keys, values)),
        np.array(meta.positions),
        np.array(positions),
        0.25,
        None,
    )
    assert_close(found, wanted)
    assert np.all(np.array(found[0, :, 2]) == 0)


@pytest.mark.parametrize("case", TEST.within, ids=str)
def test_attention_within(case: WithinCase, served: Served) -> None:
    skip_missing_op("attention_within", served)
    q, k, v = (normal(case.heads, sum(case.lengths), case.head_dim) for _ in range(3))
    scale = case.head_dim**-0.5
    wanted = oracle.attention_within(*map(oracle.f64, (q, k, v)), case.lengths, scale)
    assert_close(ops.attention_within(q, k, v, case.lengths, scale=scale), wanted)


def make_layer(layer: LayerCase, served: Served) -> ops.AttentionWeights:
    case = layer.block
    query, key = case.heads * case.head_dim, case.kv_heads * case.head_dim

    def project(n: int, k: int) -> ops.Linear:
        return make_ready(make_linear(n, k, case.bits, has_bias=case.has_bias), served)

    has_norms = case.has_qk_norm or layer.has_wide_norms
    return ops.AttentionWeights(
        norm=make_norm(case.hidden) if layer.has_pre_norm else None,
        q=project(query, case.hidden),
        k=project(key, case.hidden),
        v=project(key, case.hidden),
        o=project(case.hidden, query),
        num_heads=case.heads,
        num_kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        scale=case.head_dim**-0.5,
        q_norm=make_norm(query if layer.has_wide_norms else case.head_dim) if has_norms else None,
        k_norm=make_norm(key if layer.has_wide_norms else case.head_dim) if has_norms else None,
        window=case.window,
        post_norm=make_norm(case.hidden) if layer.has_post_norm else None,
        residual_scale=layer.residual_scale,
        softcap=layer.softcap or None,
        sinks=2 * normal(case.heads) if layer.has_sinks else None,
    )


def make_layer_rope(layer: LayerCase) -> ops.Rope:
    dims = layer.block.rope_dims or layer.block.head_dim
    return make_rope(dims, layer.block.is_interleaved, sections=layer.sections)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_attention_block(layer: LayerCase, served: Served) -> None:
    case, weights, rope = layer.block, make_layer(layer, served), make_layer_rope(layer)
    kv = PagedKVCache(dtype=mx.float32) if served.backend == "cpu" else KVCache()
    past = None
    for width in case.steps:
        x = normal(case.batch, width, case.hidden)
        prepare_step([kv])
        meta = ops.StepMeta.uniform(kv.offset, batch_size=case.batch, width=width)
        # The first step has an image, where the case has sections; those behind it are shifted.
        shifts = tuple(layer.shift * (row + 1) for row in range(case.batch)) if kv.offset else ()
        axes = make_axes(case.batch, width) if layer.sections and not kv.offset else None
        meta = replace(meta, shifts=shifts, axes=axes)
        turns = np.array(meta.positions) + np.array(shifts or 0).reshape(-1, 1)
        turns = turns if axes is None else np.array(axes)
        skip_refused("attention_block", served, x, weights, kv, rope, meta)
        found = ops.attention_block(x, weights, kv, rope, meta)
        wanted, past = oracle.attention_block(oracle.f64(x), weights, rope, past, turns)
        assert_close(found, wanted, max(1e-5, tolerance_of(served, case.bits)))


@pytest.mark.parametrize("case", TEST.ragged, ids=str)
def test_ragged_attention_block(case: RaggedCase, served: Served) -> None:
    layer = case.layer.block
    weights, rope = make_layer(case.layer, served), make_layer_rope(case.layer)
    kvs = [
        PagedKVCache(dtype=mx.float32) if served.backend == "cpu" else KVCache()
        for _ in case.steps[0]
    ]
    pasts = [None] * len(kvs)
    for lengths in case.steps:
        x = normal(1, sum(lengths), layer.hidden)
        prepare_step(kvs)
        meta = ops.StepMeta.ragged([kv.offset for kv in kvs], lengths)
        shifts = tuple(case.layer.shift * index for index in range(len(kvs)))
        axes = make_axes(1, meta.width) if case.layer.sections else None
        meta = replace(meta, shifts=shifts, axes=axes)
        skip_refused("attention_block", served, x, weights, ops.RaggedKV(tuple(kvs)), rope, meta)
        found = ops.attention_block(x, weights, ops.RaggedKV(tuple(kvs)), rope, meta)
        for index, rows in enumerate(meta.rows):
            alone = oracle.f64(x[:, rows])
            turns = np.array(meta.positions)[:, rows] + shifts[index]
            turns = turns if axes is None else np.array(axes)[:, :, rows]
            wanted, pasts[index] = oracle.attention_block(alone, weights, rope, pasts[index], turns)
            assert_close(found[:, rows], wanted, max(1e-5, tolerance_of(served, layer.bits)))


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_mlp_block(layer: LayerCase, served: Served) -> None:
    case = layer.block

    def project(n: int, k: int) -> ops.Linear:
        return make_ready(make_linear(n, k, case.bits, has_bias=case.has_bias), served)

    weights = ops.MLPWeights(
        norm=make_norm(case.hidden) if layer.has_pre_norm else None,
        gate=project(case.inner, case.hidden),
        up=project(case.inner, case.hidden),
        down=project(case.hidden, case.inner),
        activation=layer.activation,  # type: ignore[arg-type]
        post_norm=make_norm(case.hidden) if layer.has_post_norm else None,
        residual_scale=layer.residual_scale,
    )
    x = normal(case.batch, case.steps[-1], case.hidden)
    skip_refused("mlp_block", served, x, weights)
    wanted = oracle.mlp_block(oracle.f64(x), weights)
    assert_close(ops.mlp_block(x, weights), wanted, tolerance_of(served, case.bits))


@pytest.mark.parametrize("case", TEST.experts, ids=str)
def test_moe_block(case: ExpertsCase, served: Served) -> None:
    skip_missing_op("moe_block", served)

    def project(n: int, k: int, bits: int = case.bits) -> ops.Linear:
        mode = case.mode if bits else "affine"
        return make_ready(make_linear(n, k, bits, 32, case.has_bias, mode), served)

    weights = ops.MoEWeights(
        norm=make_norm(case.hidden) if case.has_pre_norm else None,
        router=project(case.experts, case.hidden, 0),
        gate=project(case.experts * case.inner, case.hidden),
        up=project(case.experts * case.inner, case.hidden),
        down=project(case.experts * case.hidden, case.inner),
        num_experts=case.experts,
        top_k=case.top_k,
        is_normalized=case.is_normalized,
        activation=case.activation,  # type: ignore[arg-type]
        post_norm=make_norm(case.hidden) if case.has_post_norm else None,
        residual_scale=0.5 if case.has_bias else 1.0,
    )
    x = normal(1, case.rows, case.hidden)
    y = ops.moe_block(x, weights)
    assert_close(y, oracle.moe_block(oracle.f64(x), weights), tolerance_of(served, case.bits))
    if served.backend == "cpu":  # a row among others has the bits that it has alone
        assert mx.array_equal(ops.moe_block(x[:, -1:], weights), y[:, -1:])


@pytest.mark.parametrize("case", [*TEST.rows, RowCase(2, 20000)], ids=str)
def test_log_softmax(case: RowCase) -> None:
    x = 5 * normal(1, case.rows, case.width)
    shifted = oracle.f64(x) - oracle.f64(x).max(-1, keepdims=True)
    wanted = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    assert_close(ops.log_softmax(x), wanted)


@pytest.mark.parametrize("case", TEST.rows, ids=str)
def test_argmax(case: RowCase) -> None:
    x = mx.round(normal(1, case.rows, case.width))  # of equal numbers the first
    assert ops.argmax(x).tolist() == np.argmax(np.array(x), -1).tolist()


def test_every_op_is_tested_here() -> None:
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    tested |= {"embed", "head"}  # in one test
    assert set(IMPLEMENTATIONS) <= tested
