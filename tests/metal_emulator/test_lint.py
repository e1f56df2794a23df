"""What needs types to see: address spaces, program-scope variables, recursion. And that good text passes."""

import pytest

from metal_emulator import MetalError, compile_kernel

HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"
KERNEL = "kernel void k(const device float* x, device float* y, uint i [[thread_position_in_grid]]) {{ {} }}\n"


@pytest.mark.parametrize(
    ("helpers", "body", "message"),
    [
        (
            "float f(const float* p) { return p[0]; }",
            "y[i] = f(x);",
            "no matching function|address space",
        ),
        (
            "float f(float& p) { return p; }",
            "y[i] = f(y[i]);",
            "no matching function|address space|drops",
        ),
        ("", "const float* p = (const float*)x; y[i] = *p;", "address space"),
        ("int state;", "y[i] = x[i];", "variable 'state' stands outside of all functions"),
        (
            "int f(int n) { return n < 2 ? 1 : n * f(n - 1); }",
            "y[i] = f(int(x[i]));",
            "'f' calls itself",
        ),
        (
            "int g(int n);\nint f(int n) { return n < 2 ? 1 : g(n - 1); }\nint g(int n) { return f(n - 1); }",
            "y[i] = f(int(x[i]));",
            "calls itself; Metal has no recursion",
        ),
        (
            "template <class T> T f(T n) { return n < 2 ? n : f(n - 1); }",
            "y[i] = f(x[i]);",
            "'f' calls itself",
        ),
    ],
)
def test_findings(helpers: str, body: str, message: str) -> None:
    with pytest.raises(MetalError, match=message) as caught:
        compile_kernel(HEAD + helpers + "\n" + KERNEL.format(body), "k", file="wrong.metal")
    assert caught.value.file == "wrong.metal"
    assert caught.value.line >= 3


@pytest.mark.parametrize(
    ("helpers", "body"),
    [
        ("constant float table[2] = {1, 2};", "y[i] = table[i & 1] * x[i];"),
        ("constant constexpr int N = 3;", "y[i] = x[i] * N;"),
        ("float f(thread float& p) { return p; }", "float v = x[i]; y[i] = f(v);"),
        ("float f(const device float* p) { return p[0]; }", "y[i] = f(x + i);"),
        ("struct S { float a; S(float b) thread : a(b) {} float get() const thread { return a; } };",
         "S s(x[i]); y[i] = s.get();"),
        ("template <int N> struct C { static constexpr constant int n = N; };", "y[i] = x[i] * C<2>::n;"),
        ("template <typename P> float f(P p) { return p[0]; }", "threadgroup float s[1]; s[0] = 1; "
         "threadgroup_barrier(mem_flags::mem_threadgroup); y[i] = f(x) + f(s);"),
        ("int h(int n) { return n; }\nfloat h(float n) { return n + h(1); }", "y[i] = h(x[i]);"),
    ],
)  # fmt: skip
def test_good_text_passes(helpers: str, body: str) -> None:
    compile_kernel(HEAD + helpers + "\n" + KERNEL.format(body), "k")


def test_the_pass_can_be_left_out() -> None:
    text = (
        HEAD
        + "int f(int n) { return n < 2 ? 1 : n * f(n - 1); }\n"
        + KERNEL.format("y[i] = f(int(x[i]));")
    )
    compile_kernel(text, "k", lint=False)
    compile_kernel(text, "k", mode="fast")
