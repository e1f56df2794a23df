"""Metal's numbers in the emulator, against numpy: roundings of half and bfloat, functions of floats and integers."""

from collections.abc import Callable

import numpy as np
import pytest

from metal_emulator import MetalError, Undefined
from tests.metal_emulator.small_kernels import (
    MODES,
    Array,
    bfloats,
    evaluate,
    from_bfloats,
    run_text,
)


@pytest.mark.parametrize("mode", MODES)
def test_half_rounds_each_operation(mode: str) -> None:
    rng = np.random.default_rng(2)
    x, y, z = (rng.standard_normal(32).astype(np.float16) for _ in range(3))
    found = evaluate(
        ["vx * vy + vz", "vx / vy - vz", "(vx + vy) * 3", "fma(vx, vy, vz)", "half(float(vx) * 1.0001f)"],
        {"x": x, "y": y, "z": z}, "half", np.float16, mode=mode,
    )  # fmt: skip
    exact = x.astype(np.float64) * y.astype(np.float64) + z.astype(np.float64)
    expected = [
        x * y + z,
        x / y - z,
        (x + y) * np.float16(3),
        exact,
        x.astype(np.float32) * np.float32(1.0001),
    ]
    np.testing.assert_array_equal(found, np.stack(expected).astype(np.float16))
    assert (found[0] != exact.astype(np.float16)).any()


@pytest.mark.parametrize("mode", MODES)
def test_bfloat_rounds_each_operation(mode: str) -> None:
    rng = np.random.default_rng(3)
    x, y, z = (bfloats(rng.standard_normal(32)) for _ in range(3))
    found = evaluate(
        ["vx * vy + vz", "vx / vy", "(vx + vy) * bfloat(3.0f)", "bfloat(float(vx) * 1.0001f)", "exp(vx)"],
        {"x": x, "y": y, "z": z}, "bfloat", np.uint16, mode=mode,
    )  # fmt: skip
    a, b, c = (from_bfloats(v) for v in (x, y, z))

    def rounded(v: Array) -> Array:
        return from_bfloats(bfloats(v))

    expected = [
        rounded(a * b) + c,
        a / b,
        rounded(a + b) * np.float32(3),
        a * np.float32(1.0001),
        np.exp(a),
    ]
    np.testing.assert_array_equal(found, np.stack([bfloats(e) for e in expected]))
    assert (found[0] != bfloats(a * b + c)).any()


@pytest.mark.parametrize("mode", MODES)
def test_every_half_is_converted(mode: str) -> None:
    halves = np.arange(2**16, dtype=np.uint16)
    text = """[[kernel]] void k(const device half* x, const device float* y, device float* o, device half* back,
        uint t [[thread_position_in_grid]]) {
      for (uint i = t; i < 65536; i += 64) { o[i] = float(x[i]); back[i] = half(y[i]); }
    }"""
    with np.errstate(invalid="ignore"):
        y = halves.view(np.float16).astype(np.float32) * np.float32(1.0002) + np.float32(1e-9)
    made = run_text(
        text, {"x": halves, "y": y}, {"o": Undefined((2**16,), np.float32), "back": Undefined((2**16,), np.float16)},
        threads=64, mode=mode,
    )  # fmt: skip
    np.testing.assert_array_equal(made["o"], halves.view(np.float16).astype(np.float32))
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(made["back"], y.astype(np.float16))


FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "exp": np.exp, "exp2": np.exp2, "log": np.log, "log2": np.log2, "sqrt": np.sqrt, "sin": np.sin, "cos": np.cos,
    "tanh": np.tanh, "rsqrt": lambda x: 1 / np.sqrt(x), "atan": np.arctan, "sinh": np.sinh, "asinh": np.arcsinh,
}  # fmt: skip


def ulps(found: Array, exact: Array) -> Array:
    return np.abs(found.astype(np.float64) - exact) / np.spacing(np.abs(exact.astype(np.float32)))


def test_fast_functions_are_off_by_up_to_two_ulps() -> None:
    x = np.random.default_rng(4).uniform(0.1, 3, 32).astype(np.float32)
    names = list(FUNCTIONS)
    calls = [f"{space}::{name}(vx)" for space in ("precise", "fast") for name in names] + [
        f"{n}(vx)" for n in names
    ]
    precise, fast, plain = evaluate(calls, {"x": x}, "float", np.float32).reshape(3, len(names), 32)
    exact = np.stack([FUNCTIONS[n](x.astype(np.float64)) for n in names])
    assert ulps(precise, exact).max() < 1.5
    assert 1.5 < ulps(fast, exact).max() < 3.5
    np.testing.assert_array_equal(plain, precise)
    again = evaluate(calls, {"x": x}, "float", np.float32, mode="fast").reshape(3, len(names), 32)
    np.testing.assert_array_equal(again[1], fast)


def test_fast_functions_keep_what_is_no_number() -> None:
    x = np.array([np.inf, -np.inf, np.nan, 0] * 8, np.float32)
    found = evaluate(["fast::exp(vx)", "fast::divide(1.0f, vx)"], {"x": x}, "float", np.float32)
    np.testing.assert_array_equal(found[0, :3], [np.inf, 0, np.nan])
    np.testing.assert_array_equal(found[1, :4], [0, 0, np.nan, np.inf])


def test_functions_of_floats() -> None:
    x = np.array(
        [-2.5, -1.5, -0.5, -0.0, 0.0, 0.5, 1.5, 2.5, 3.75, -3.75, 1e9, -7, 7, 0.25, 100, -100] * 2,
        np.float32,
    )
    expressions = {
        "rint(vx)": np.rint(x), "round(vx)": np.trunc(x + np.copysign(np.float32(0.5), x)), "trunc(vx)": np.trunc(x),
        "fract(vx)": x - np.floor(x), "abs(vx)": np.abs(x), "sign(vx)": np.sign(x), "saturate(vx)": x.clip(0, 1),
        "clamp(vx, -1.0f, 2.0f)": x.clip(-1, 2), "mix(vx, 4.0f, 0.5f)": x + (4 - x) * np.float32(0.5),
        "step(1.0f, vx)": (x >= 1).astype(np.float32), "fmin(vx, NAN)": x, "max(vx, 1.0f)": np.maximum(x, 1),
        "copysign(1.0f, vx)": np.copysign(np.float32(1), x), "ldexp(vx, 3)": x * 8, "float(isnan(vx / vx))": x == 0,
        "max3(vx, -1.0f, 1.0f)": np.maximum(x, 1), "median3(vx, -1.0f, 1.0f)": x.clip(-1, 1),
        "select(1.0f, 2.0f, vx > 0)": np.where(x > 0, 2, 1), "fmod(vx, 2.0f)": np.fmod(x, np.float32(2)),
        "pow(abs(vx), 2.0f)": np.abs(x) ** 2,
    }  # fmt: skip
    found = evaluate(list(expressions), {"x": x}, "float", np.float32)
    for row, (expression, expected) in zip(found, expressions.items(), strict=True):
        np.testing.assert_array_equal(row, np.asarray(expected, np.float32), err_msg=expression)


def test_functions_of_integers() -> None:
    x = (np.arange(32) * 0x9E3779B1 % 2**32).astype(np.uint32)
    wide, bits = x.astype(np.uint64), [f"{v:032b}" for v in x]
    expressions = {
        "popcount(vx)": [b.count("1") for b in bits], "clz(vx)": [(b + "1").index("1") for b in bits],
        "ctz(vx)": [(b[::-1] + "1").index("1") for b in bits], "reverse_bits(vx)": [int(b[::-1], 2) for b in bits],
        "rotate(vx, 5u)": (wide << 5 | wide >> 27) % 2**32, "extract_bits(vx, 7, 9)": x >> 7 & 511,
        "insert_bits(vx, 5u, 4, 8)": (x & ~np.uint32(0xFF0)) | 0x50, "mulhi(vx, vx)": wide * wide >> 32,
        "absdiff(vx, 77u)": np.abs(x.astype(np.int64) - 77), "addsat(vx, vx)": np.minimum(wide * 2, 2**32 - 1),
        "subsat(77u, vx)": np.maximum(77 - x.astype(np.int64), 0), "hadd(vx, 3u)": (wide + 3) // 2,
        "uint(extract_bits(int(vx), 0, 4))": ((x & 15) ^ 8).astype(np.int64) - 8, "uint(char(vx))": x.astype(np.int8),
        "mad24(vx, 2u, 1u)": (x & 0xFFFFFF) * 2 + 1, "min(vx, 5u)": np.minimum(x, 5), "vx >> 3 << 1": x >> 3 << 1,
    }  # fmt: skip
    found = evaluate(list(expressions), {"x": x}, "uint", np.uint32)
    for row, (expression, expected) in zip(found, expressions.items(), strict=True):
        np.testing.assert_array_equal(
            row, (np.asarray(expected).astype(np.int64) % 2**32), err_msg=expression
        )


@pytest.mark.parametrize("wrong", ["max(vx, 1)", "double(vx)", "metal::erf(vx)", "bfloat b = vx"])
def test_what_metal_refuses(wrong: str) -> None:
    with pytest.raises(MetalError):
        evaluate([f"({{ auto r = {wrong}; float(r); }})" if "=" not in wrong else f"({{ {wrong}; float(b); }})"],
                 {"x": np.ones(32, np.float32)}, "float", np.float32)  # fmt: skip
