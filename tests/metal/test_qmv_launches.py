"""How the products of decoding are launched: what is read, what fits a threadgroup, what is refused."""

from dataclasses import replace
from itertools import product
from typing import Any

import mlx.core as mx
import pytest

from mlx_edge.ops import metal_launch as launch
from mlx_edge.ops import metal_qmv
from mlx_edge.ops.types import Dense, Linear, Norm, Packed, Quantized
from tests.metal.devices import count_reads
from tests.metal.product_cases import EPS, FORMATS, Case, Inputs, make_inputs

# The sizes of Llama-3.2-1B, Qwen3-0.6B, Gemma-3-1B and Qwen2.5-0.5B; few rows of each matrix.
READ = (
    Case("norm", 4, mx.float16, 1, (96, 32, 32), 2048),
    Case("glu", 4, mx.bfloat16, 1, (64, 64), 1024),
    Case("glu", 4, mx.bfloat16, 1, (96, 96), 1152),
    Case("res", 4, mx.float16, 1, (64,), 8192),
    Case("norm", 4, mx.float16, 1, (128, 64, 64), 896),
    Case("norm", 8, mx.float16, 1, (64,), 1024),
    Case("res", 0, mx.bfloat16, 1, (64,), 576),
)


@pytest.mark.parametrize("case", READ, ids=str)
@pytest.mark.parametrize("m", [1, 8, 16])
def test_weights_are_read_once(case: Case, m: int):
    case = replace(case, m=m, exact=False)
    inputs = make_inputs(case)
    reads = count_reads(lambda: inputs.run(case), ("packs", "scales", "offsets"))
    assert reads <= (1.02 if m == 1 else 1.05)


class Recorder:
    """A device that runs nothing and notes what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def metal_kernel(self, **_made: Any) -> Any:
        def call(**arguments: Any) -> list[mx.array]:
            arguments |= dict(arguments["template"])
            self.calls.append(arguments)
            shapes = zip(arguments["output_shapes"], arguments["output_dtypes"], strict=True)
            return [mx.zeros(shape, dtype) for shape, dtype in shapes]

        return call


REAL = (
    *(
        Case("norm", 4, mx.float16, 1, sizes, k)
        for k, sizes in (
            (576, (576, 192, 192)),
            (896, (896, 128, 128)),
            (1024, (2048, 1024, 1024)),
            (1152, (1024, 256, 256)),
            (2048, (2048, 512, 512)),
            (2560, (4096, 1024, 1024)),
            (2048, (128256,)),
            (2560, (151936,)),
        )
    ),
    *(
        Case("res", 4, mx.float16, 1, (n,), k)
        for k, n in (
            (2048, 2048),
            (8192, 2048),
            (3072, 1024),
            (9728, 2560),
            (6912, 1152),
            (4864, 896),
        )
    ),
    *(
        Case("glu", 4, mx.float16, 1, (n, n), k)
        for k, n in (
            (2048, 8192),
            (1024, 3072),
            (2560, 9728),
            (1152, 6912),
            (896, 4864),
        )
    ),
)


@pytest.mark.parametrize("case", REAL, ids=str)
@pytest.mark.parametrize("form", FORMATS)
def test_real_sizes_make_launches_that_fit(case: Case, form: int | str):
    case = replace(case, form=form, group_size=32 if form == "mxfp4" else 64)
    recorder = Recorder()
    with launch.on(recorder):
        for m, exact in product(range(1, 17), (True, False)):
            lazy_inputs(case, m).run(replace(case, exact=exact))
    parts = set()
    for call in recorder.calls:
        slots = call["TILE"] * (2 if call["PAIR"] else 1)
        shared = 4 * call["PARTS"] * call["ROWS"] * (slots + 1)
        assert call["threadgroup"][0] == 32 * slots // call["SPAN"] * call["PARTS"] <= 256
        assert call["grid"][0] % call["threadgroup"][0] == 0
        assert shared <= (256 if call["ROWS"] == 1 else 8448)
        assert live_floats(call) <= 96
        if call["SPAN"] != 16:
            parts.add(call["PARTS"])
    assert len(parts) == 1, "the split of K may not depend on the rows"


def lazy_inputs(case: Case, m: int) -> Inputs:
    """Inputs of the case's shapes that are never computed."""
    rows = case.sizes[0]
    x, residual = mx.zeros((m, case.k), case.dtype), mx.zeros((m, rows), case.dtype)
    linears = [lazy_weight(case, n) for n in case.sizes]
    return Inputs(x, linears, Norm(mx.zeros((case.k,), case.dtype), EPS), residual)


def lazy_weight(case: Case, n: int) -> Linear:
    if case.form == 0:
        return Dense(mx.zeros((n, case.k), case.dtype))
    number = 4 if case.form == "mxfp4" else int(case.form)
    packs = mx.zeros((n, case.k * number // 32), mx.uint32)
    groups = (n, case.k // case.group_size)
    if case.form == "mxfp4":
        return Quantized(packs, mx.zeros(groups, mx.uint8), None, 32, 4, "mxfp4")
    scales = mx.zeros(groups, case.dtype)
    return Quantized(packs, scales, scales, case.group_size, number)


def live_floats(call: dict[str, Any]) -> int:
    """What a lane must hold at once in the inner loop; floats need no unpacking."""
    stored = call["RUN"] * call["BITS"] // 32
    if call["SPAN"] == 16:
        bands = call["ROWS"] // 8
        return 2 * stored + 2 * bands * 8 + 16 + 4 * bands + 4 * bands
    unpacked = 8 if call["BITS"] < 32 else 0
    return call["SPAN"] * (stored + 2 + unpacked) + 16 + call["ROWS"] * (call["SPAN"] + 1)


X = mx.zeros((1, 64))
AFFINE = Quantized(
    mx.zeros((8, 8), mx.uint32), mx.zeros((8, 1)), mx.zeros((8, 1)), group_size=64, bits=4
)
REFUSED = {
    "x is int8; served are float16, bfloat16 and float32": (X.astype(mx.int8), [AFFINE]),
    "33 rows; served are 1 to 16": (mx.zeros((33, 64)), [AFFINE]),
    "0 rows; served are 1 to 16": (mx.zeros((0, 64)), [AFFINE]),
    "weights have 7 bits; served are 2, 3, 4, 5, 6, 8 and mxfp4": (X, [replace(AFFINE, bits=7)]),
    "weights have groups of 16; served are 32, 64 and 128": (X, [replace(AFFINE, group_size=16)]),
    "weights are nvfp4; served are affine and mxfp4": (X, [replace(AFFINE, mode="nvfp4")]),
    "weights are int8; served are float16, bfloat16 and float32": (
        X,
        [Dense(mx.zeros((8, 64), mx.int8))],
    ),
    "float weights have 63 columns; served are multiples of 8": (
        X,
        [Dense(mx.zeros((8, 63)))],
    ),
    "x has 32 columns and the weights 64": (mx.zeros((1, 32)), [AFFINE]),
    "mixed formats: 4 bits group 64 float32 and float32; one launch takes weights and biases of one format": (
        X,
        [AFFINE, Dense(mx.zeros((8, 64)))],
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_says_what_it_does_not_serve(reason: str):
    x, linears = REFUSED[reason]
    assert metal_qmv.refuse(x, linears) == reason
    with pytest.raises(ValueError, match=reason.split(";", maxsplit=1)[0]):
        metal_qmv.qmv_norm(x, None, linears)


def test_refuses_weights_packed_for_a_cpu():
    packed = Packed(None, (8, 64), 0, False, "float", lambda: Dense(mx.zeros((8, 64))))
    assert (
        metal_qmv.refuse_residual(packed) == "weights are packed for a CPU; served is MLX's layout"
    )


def test_one_launch_takes_one_format():
    small = Quantized(mx.zeros((1, 8), mx.uint32), mx.zeros((1, 1)), mx.zeros((1, 1)), 64, 4)
    assert metal_qmv.have_one_format([AFFINE, AFFINE])
    assert metal_qmv.have_one_format([AFFINE, replace(AFFINE, bias=mx.zeros(8))])
    assert not metal_qmv.have_one_format([AFFINE, small])  # MLX passes few scales as `constant`
    assert not metal_qmv.have_one_format([AFFINE, replace(AFFINE, bits=2)])
    biased = [replace(AFFINE, bias=mx.zeros(8, dtype)) for dtype in (mx.float16, mx.float32)]
    assert not metal_qmv.have_one_format(biased)


@pytest.mark.parametrize(
    ("rows", "exact", "kernel"),
    [
        (1, False, "qmv_norm"),
        (3, False, "qmv_norm"),
        (4, False, "qmm_norm"),
        (16, True, "qmv_norm"),
    ],
)
def test_names_the_kernel(rows: int, exact: bool, kernel: str):
    assert metal_qmv.describe(mx.zeros((rows, 64)), [AFFINE], exact=exact) == kernel
