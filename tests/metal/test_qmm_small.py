"""The products of decoding on 8x8 matrices: against float64, and rows that do not meet."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_edge.ops import metal_launch as launch
from tests.metal.devices import CHECKED, bits, run_checked
from tests.metal.product_cases import FORMATS, Case, check_against_float64, make_inputs, sweep


@pytest.mark.parametrize("case", list(sweep(exact=False)), ids=str)
def test_matches_float64(case: Case):
    check_against_float64(case)


@pytest.mark.parametrize("form", FORMATS)
def test_rows_do_not_meet_on_matrices(form: int | str):
    case = Case("norm", form, mx.float16, 16, (40,), 160, 32, exact=False)
    inputs = make_inputs(case)
    with launch.on(CHECKED[0]):
        together = bits(inputs.run(case))
        for first, last in ((0, 4), (5, 16), (8, 15)):
            part = bits(inputs.run(case, slice(first, last)))
            np.testing.assert_array_equal(part, together[first:last])


def test_infinite_rows_stay_alone():
    case = Case("norm", 4, mx.float32, 5, (12,), 96, 32, exact=False, has_norm=False)
    inputs = make_inputs(case)
    inputs = replace(inputs, x=inputs.x.at[2, 7].add(mx.inf))
    y = np.array(run_checked(lambda: inputs.run(case)))
    assert not np.isfinite(y[2]).any()
    assert np.isfinite(np.delete(y, 2, axis=0)).all()
