"""Accesses of memory that a kernel does not have, and outputs that it leaves unwritten, each by one bug."""

import numpy as np
import pytest

from metal_emulator import MetalError, Undefined, compile_kernel
from tests.metal_emulator.small_kernels import HEAD, PARAMETERS, X, find, run_body


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            "o[i] = x[i + 1]; // here",
            ["read of 4 bytes at byte 512 (index 128) of x [[buffer(0)]]", "512 bytes"],
        ),
        ("o[i + (i == 127)] = x[i]; // here", ["write of 4 bytes at byte 512", "of o"]),
        ("o[i] = x[long(i) - 1]; // here", ["read of 4 bytes at byte -4 (index -1) of x"]),
        ("o[i] = x[i == 5 ? 1 << 22 : i]; // here", ["at byte 16777216 (index 4194304)", "of x"]),
        (
            "o[i] = ((const device packed_float2*)(x + 1))[i / 2].y; // here",
            ["read of 4 bytes at byte 512"],
        ),
    ],
)
def test_device_memory_out_of_bounds(body: str, words: list[str]) -> None:
    find(body, "out_of_bounds", "out-of-bounds device", *words)


def test_inputs_that_lie_side_by_side_are_told_apart() -> None:
    text = f"""{HEAD}[[kernel]] void k(const device float* a, const device float* b, device float* o,
        uint i [[thread_position_in_grid]]) {{ o[i] = a[i + 32] + b[i]; }}"""
    both = np.zeros(64, np.float32)
    inputs, outputs = {"a": both[:32], "b": both[32:]}, {"o": Undefined((32,), np.float32)}
    with pytest.raises(MetalError, match="byte 128 \\(index 32\\) of a "):
        compile_kernel(text, "k").run(inputs, outputs, (32, 1, 1), (32, 1, 1))


def test_guard_pages_stop_the_fast_mode() -> None:
    found = find("o[i] = x[i * 4096];", "out_of_bounds", "device access", mode="fast")
    assert "of x [[buffer(0)]], which has 512 bytes" in str(found)
    assert np.isnan(
        run_body("o[i] = x[min(i + 2, 127u)];", mode="fast", x=X[:126])[124:]
    ).all()  # up to 16 bytes: poison


@pytest.mark.parametrize(
    ("index", "word"), [("t + 1", "at byte 128 (index 64)"), ("t * 3 - 1", "at byte -2 (index -1)")]
)
def test_threadgroup_memory_out_of_bounds(index: str, word: str) -> None:
    body = f"""threadgroup half before[8], shared[64], after[8];
    if (!t) before[0] = after[0] = 0;
    threadgroup half* p = shared;
    p[int({index})] = half(x[i]); // here
    o[i] = x[i];"""
    find(
        body,
        "out_of_bounds",
        "out-of-bounds threadgroup write of 2 bytes",
        word,
        "which has 128 bytes",
    )


def test_private_array_out_of_bounds() -> None:
    body = """float a[4] = {1, 2, 3, 4};
    o[i] = a[int(x[i])]; // here"""
    find(body, "undefined", "array index out of bounds")


def test_integer_division_by_zero() -> None:
    body = "o[i] = 7 / int(x[i]); // here"
    find(body, "undefined", "division by zero")
    find(body, "undefined", "division by zero", mode="fast")


def test_misaligned_vector() -> None:
    body = "float4 v = *((const device float4*)(x + (i & 4) + 1)); o[i] = v.x + v.w; // here"
    find(body, "undefined", "misaligned pointer")


def test_wild_pointer() -> None:
    find(
        "o[i] = *(const device float*)(0x1000ul + i * 4); // here", "wild_pointer", "does not have"
    )
    find("o[i] = *(const device float*)0x1000ul;", "wild_pointer", mode="fast")


def test_stack_overflow() -> None:
    body = """float a[32768];
    for (int j = 0; j < 32768; j++) a[j] = x[j % 128];
    o[i] = a[int(x[i]) * 7 + 32000];"""
    find(body, "stack_overflow", "private memory", mode="fast")


def test_write_to_an_input() -> None:
    find("((device float*)x)[i] = 1; // here", "write_to_input", "input x [[buffer(0)]]")


def test_too_much_threadgroup_memory() -> None:
    body = "threadgroup float a[8000], b[193]; a[t] = b[t % 8] = 1; o[i] = 1;"
    find(body, "threadgroup_memory", "32772 bytes: at most 32768", mode="fast")


def test_output_that_nobody_writes() -> None:
    found = find(
        "if (i != 7) o[i] = 1;", "unwritten_output", "output o [[buffer(1)]]", "4 of its 512 bytes"
    )
    assert not found.thread
    kernel = compile_kernel(
        f"{HEAD}[[kernel]] void k{PARAMETERS} {{ if (i != 7) o[i] = 1; }}", "k", mode="check"
    )
    made = kernel.run(
        {"x": X}, {"o": Undefined((128,), np.float32)}, (128, 1, 1), (64, 1, 1), unwritten_ok=("o",)
    )
    assert made.unwritten == {"o": 4} and np.isnan(made.outputs["o"][7])
    run_body("if (i != 7) o[i] = 1;", o=np.zeros(128, np.float32))
