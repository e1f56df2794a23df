"""Messages: a place like a compiler's, the line of the source, who did it, in Metal's words."""

import numpy as np
import pytest

from metal_emulator import MetalError, MetalWarning, Undefined, compile_kernel
from metal_emulator.errors import excerpt, parse_diagnostics

HEAD = """#include <metal_stdlib>
using namespace metal;
kernel void k(const device float* x [[buffer(0)]], device float* y [[buffer(1)]],
              uint i [[thread_position_in_grid]], uint lane [[thread_index_in_simdgroup]]) {
"""


def compiled(body: str, mode: str = "check") -> str:
    """The message of a text that does not compile."""
    with pytest.raises(MetalError) as caught:
        compile_kernel(HEAD + body + "\n}\n", "k", mode=mode, file="wrong.metal")
    return str(caught.value)


def found(body: str, *, mode: str = "check", threads: int = 64, head: str = HEAD) -> MetalError:
    """What a run over 64 floats finds."""
    kernel = compile_kernel(head + body + "\n}\n", "k", mode=mode, file="wrong.metal")
    with pytest.raises(MetalError) as caught:
        kernel.run(
            {"x": np.zeros(64, np.float32)},
            {"y": Undefined((64,), np.float32)},
            (threads, 1, 1),
            (64, 1, 1),
        )
    return caught.value


def test_a_diagnostic_is_parsed_and_speaks_metal() -> None:
    (diagnostic,) = parse_diagnostics(
        "In file included from x:\na.h:3:7: error: cannot pass '__global float *' to '__private float *'\n  code\n"
    )
    assert (diagnostic.file, diagnostic.line, diagnostic.column) == ("a.h", 3, 7)
    assert diagnostic.message == "cannot pass 'device float *' to 'thread float *'"


def test_an_excerpt_marks_the_column() -> None:
    assert excerpt({"a": ["first", "  second"]}, "a", 2, 3) == "\n    2 |   second\n      |   ^"
    assert excerpt({"a": ["first"]}, "a", 2) == ""
    assert excerpt({}, "a", 1) == ""


@pytest.mark.parametrize(
    ("body", "message", "line"),
    [
        ("y[i] = z;", "undeclared identifier 'z'", "y[i] = z;"),
        ("x[i] = 1;", "read-only variable is not assignable", "x[i] = 1;"),
        ("thread float* p = (thread float*)x;", "mismatching address spaces", "thread float*"),
        ("float2 v = float2(1, 2, 3); y[i] = v.x;", "wrong number of vector components", ""),
        (
            "bfloat b = x[i]; y[i] = b;",
            "Metal converts nothing to bfloat implicitly",
            "bfloat b = x[i];",
        ),
    ],
)
def test_compile_errors_name_the_users_line(body: str, message: str, line: str) -> None:
    said = compiled(body)
    assert "wrong.metal:5:" in said
    assert message in said
    assert line in said
    assert "__" not in said.split("\n", 1)[0]


def test_a_kernel_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(MetalError, match=r"kernel 'm' is not in wrong\.metal; there are: k"):
        compile_kernel(HEAD + "}", "m", file="wrong.metal")


@pytest.mark.parametrize(("head", "given"), [("", "half"), ("template <typename T>\n", "")])
def test_template_arguments_must_fit(head: str, given: str) -> None:
    with pytest.raises(MetalError, match="template"):
        compile_kernel(head + "kernel void k(device float* y) {}", "k", given)


@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        ("y[i] = x[i + 1];", "out_of_bounds", "x [[buffer(0)]]"),
        ("y[i + 1] = x[i];", "out_of_bounds", "y [[buffer(1)]]"),
        (
            "threadgroup float s[64]; if (i < 8) s[i] = 1; threadgroup_barrier(mem_flags(2)); y[i] = s[i];",
            "uninitialised",
            "threadgroup",
        ),
        ("if (lane < 3) { y[i] = simd_sum(x[i]); } else { y[i] = 0; }", "divergence", "simd"),
        ("if (i > 0) { y[i] = x[i]; }", "unwritten_output", "y"),
        ("y[0] = x[i];", "device_race", "y"),
    ],
)
def test_findings_name_kind_place_and_thread(body: str, kind: str, words: str) -> None:
    error = found(body)
    assert error.kind == kind
    assert words in error.message
    if kind != "unwritten_output":
        assert (error.file, error.line) == ("wrong.metal", 5)
        assert str(error).startswith("wrong.metal:5:")
        assert body in str(error)
        assert "thread (" in error.thread


def test_a_finding_in_an_included_file_names_that_file(tmp_path: object) -> None:
    from pathlib import Path

    folder = Path(str(tmp_path))
    (folder / "inner.h").write_text(
        "\n\ninline float at(const device float* p, uint i) { return p[i + 64]; }\n"
    )
    text = HEAD.replace("using namespace metal;", '#include "inner.h"') + "y[i] = at(x, i);\n}\n"
    kernel = compile_kernel(text, "k", file="outer.metal", folders=[folder])
    with pytest.raises(MetalError) as caught:
        kernel.run(
            {"x": np.zeros(64, np.float32)},
            {"y": Undefined((64,), np.float32)},
            (64, 1, 1),
            (64, 1, 1),
        )
    assert (caught.value.file, caught.value.line) == ("inner.h", 3)


def test_an_undefined_function_constant_is_named() -> None:
    text = "constant int n [[function_constant(7)]];\n" + HEAD + "y[i] = n;\n}\n"
    with pytest.raises(MetalError, match="'n' is used and has no value"):
        compile_kernel("#include <metal_stdlib>\n" + text, "k")


@pytest.mark.parametrize("mode", ["fast", "check"])
def test_warnings_are_given_each_time(mode: str) -> None:
    for _ in range(2):
        with pytest.warns(MetalWarning, match=r"wrong\.metal:5:.*'v' is uninitialized"):
            compile_kernel(HEAD + "float v; y[i] = v;\n}\n", "k", mode=mode, file="wrong.metal")


def test_unknown_buffers_are_refused() -> None:
    kernel = compile_kernel(HEAD + "y[i] = x[i];\n}\n", "k", mode="fast")
    with pytest.raises(ValueError, match="has no buffer 'z'; it has x, y"):
        kernel.run({"z": np.zeros(1)}, {}, (1, 1, 1), (1, 1, 1))
    with pytest.raises(ValueError, match="'x' of kernel k is const"):
        kernel.run({}, {"x": Undefined((1,), np.float32)}, (1, 1, 1), (1, 1, 1))
