"""The products of decoding by lanes: against float64, and row by row against one row."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_edge.ops import metal_launch as launch
from mlx_edge.ops import metal_qmv
from mlx_edge.ops.types import Dense, Quantized
from tests.metal.devices import CHECKED, bits, run_checked
from tests.metal.product_cases import Case, check_against_float64, make_inputs, sweep
from tests.ops import oracle

# Where K is split over simdgroups, and tiles of every size.
SPLIT = (
    Case("norm", 8, mx.float16, 1, (9, 8, 24), 1024, 32),
    Case("norm", 8, mx.bfloat16, 3, (33,), 1056, 32),
    Case("norm", 8, mx.float32, 11, (20,), 1024, 32),
    Case("res", 4, mx.float16, 2, (12,), 1024, 32, (True,)),
    Case("res", 4, mx.bfloat16, 5, (17,), 1152, 128, (True,), scales=mx.float32),
    Case("res", 0, mx.float16, 1, (19,), 520),
    Case("glu", 8, mx.float16, 2, (21, 21), 1024, 32, (True, True, True)),
    Case("glu", 0, mx.float32, 7, (9, 9), 1032, activation="gelu_tanh"),
)
SWEEP = tuple(sweep(exact=True))


@pytest.mark.parametrize("case", (*SPLIT, *SWEEP), ids=str)
def test_matches_float64(case: Case):
    check_against_float64(case)


MANY_ROWS = [case for case in (*SPLIT, *SWEEP) if case.m > 1 and case.product == "norm"]


@pytest.mark.parametrize("case", MANY_ROWS, ids=str)
def test_a_row_has_the_bits_that_it_has_alone(case: Case):
    inputs = make_inputs(case)
    with launch.on(CHECKED[0]):
        together = bits(inputs.run(case))
        for m in (0, case.m - 1):
            np.testing.assert_array_equal(bits(inputs.run(case, slice(m, m + 1)))[0], together[m])


def test_mxfp4_reads_every_exponent():
    """The scale of code 0 is 2^-127, no zero."""
    scales = mx.array(np.array([[0], [1], [254]], np.uint8))
    packs = mx.array(np.full((3, 4), 0x22222222, np.uint32))  # ones
    weight = Quantized(packs, scales, None, 32, 4, "mxfp4")
    x = mx.zeros((1, 32)).at[0, 0].add(1.0)
    y = run_checked(lambda: metal_qmv.qmv_norm(x, None, [weight]))
    np.testing.assert_array_equal(np.array(y)[0], np.float32(2.0) ** np.array([-127, -126, 127]))


def test_infinity_times_a_weight_is_infinite():
    """What has no offset has no zero times infinity."""
    x = mx.array([[mx.inf] * 32])
    packs, scales = mx.full((8, 4), 0x22222222, mx.uint32), mx.full((8, 1), 127, mx.uint8)
    for weight in (Quantized(packs, scales, None, 32, 4, "mxfp4"), Dense(mx.ones((8, 32)))):
        y = run_checked(lambda weight=weight: metal_qmv.qmv_norm(x, None, [weight]))
        assert np.isposinf(np.array(y)).all()


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_activations(activation: str):
    """Gate and up are x itself, so that no sum hides the activation's own error."""
    x = mx.linspace(-100, 100, 201)[:200].reshape(1, 200) / 10
    identity = Dense(mx.eye(200))
    y = run_checked(lambda: metal_qmv.qmv_glu(x, None, identity, identity, activation))
    gate = oracle.f64(x)
    want = oracle.glu(gate, gate, activation)
    cancelled = 2.0**-50 * gate**2  # of 1 + tanh in the float64 formula; the kernel has no such sum
    error = np.abs(want) * 2.0**-22 * (4 + np.abs(gate) ** 3) + cancelled
    assert (np.abs(oracle.f64(y) - want) <= error).all()
