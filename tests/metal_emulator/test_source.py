"""The pre-pass: lines stay where they were, and each rule does what it says, no more."""

from pathlib import Path

import pytest

from metal_emulator.errors import MetalError
from metal_emulator.rewrite import rewrite
from metal_emulator.signature import read_signature
from metal_emulator.source import closing, find_instances, find_kernels, flatten, split_list
from metal_emulator.subset import check_subset

KERNEL = "[[kernel]] void k(device float* y [[buffer(0)]]) {{\n{}\n}}\n"


def rewritten(body: str) -> str:
    return rewrite(flatten(KERNEL.format(body), "k.metal")).split("\n", 1)[1].rsplit("\n}", 1)[0]


def test_include_is_put_in_once_between_line_marks(tmp_path: Path) -> None:
    (tmp_path / "a.h").write_text("#pragma once\nint a; // first\n")
    source = flatten('#include "a.h"\n#include "a.h"\nint b;', "k.metal", [tmp_path])
    assert source.text.count("int a;") == 1
    assert source.place(source.text.index("int a;")) == ("a.h", 2, 1)
    assert source.place(source.text.index("int b;")) == ("k.metal", 3, 1)
    assert source.lines["a.h"][1] == "int a; // first"


def test_a_missing_include_names_the_line() -> None:
    with pytest.raises(MetalError, match=r"k\.metal:2: error: file 'none\.h' not found"):
        flatten('int a;\n#include "none.h"', "k.metal")


def test_a_skipped_file_is_left_out() -> None:
    assert "#line" not in flatten('#include "x/none.h"', "k.metal", skip=["none.h"]).text


@pytest.mark.parametrize(
    "text",
    [
        "/* threadgroup int a; */ int b;",
        "// goto\nint c;",
        'os_log("// not a comment");',
        "/*\n\n*/ int d;",
    ],
)
def test_comments_become_spaces_of_the_same_extent(text: str) -> None:
    flat = flatten(text, "k.metal").text
    assert len(flat) == len(text)
    assert flat.count("\n") == text.count("\n")
    assert "goto" not in flat
    assert ("os_log" in text) == ("// not a comment" in flat)


@pytest.mark.parametrize(
    ("text", "end"), [("(a(b)c)d", 6), ("<a, (b->c), d<e>>f", 16), ("{[}]", 2), ("(", -1)]
)
def test_closing_bracket(text: str, end: int) -> None:
    assert closing(text, 0) == end


def test_list_is_split_outside_of_brackets() -> None:
    assert split_list("T a[N, M], vec<T, 2> b, f(x, y)") == [
        "T a[N, M]",
        " vec<T, 2> b",
        " f(x, y)",
    ]


@pytest.mark.parametrize(
    ("declared", "types"),
    [
        ("threadgroup float a[32];", ["float [32]"]),
        ("threadgroup float a;", ["float"]),
        ("threadgroup T Xs[BM * (BK + 16 / sizeof(T))];", ["T [BM * (BK + 16 / sizeof(T))]"]),
        ("threadgroup float a[4], b[N<3>::n][2];", ["float [4]", "float [N<3>::n][2]"]),
        ("threadgroup vec<half, 4> a[8];", ["vec<half, 4> [8]"]),
        ("threadgroup typename G::type a[8];", ["typename G::type [8]"]),
        ("threadgroup atomic_uint n;", ["atomic_uint"]),
    ],
)
def test_threadgroup_variables_become_references(declared: str, types: list[str]) -> None:
    text = rewritten(declared)
    for index, kind in enumerate(types):
        assert f"_{index} = {kind.strip()}" in text.replace("  ", " ")
    assert text.count("emu_threadgroup(") == len(types)
    assert text.count(f"EMU_SITE(__LINE__, {declared.index('threadgroup') + 1})") == len(types)


def test_alignment_of_a_threadgroup_variable_is_kept() -> None:
    assert ", 16, EMU_SITE" in rewritten("alignas(16) threadgroup half a[8];")


@pytest.mark.parametrize(
    "declared",
    [
        "threadgroup float* p = buf;",
        "threadgroup float& r = buf[0];",
        "const threadgroup float* p;",
        "f((threadgroup float*)p);",
        "for (threadgroup float* p = a; p < b; p++) {}",
        "threadgroup_barrier(mem_flags::mem_threadgroup);",
        "threadgroup float* p[2];",
    ],
)
def test_pointers_to_threadgroup_memory_stay(declared: str) -> None:
    assert rewritten(declared) == declared


def test_a_statement_over_lines_keeps_its_lines() -> None:
    text = rewrite(
        flatten(KERNEL.format("threadgroup float\n  a[32],\n  b;\nint here;"), "k.metal")
    )
    assert text.split("\n")[4] == "int here;"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "threadgroup float a = 0;",
            r"k\.metal:2:1: error: a threadgroup variable has no initialiser",
        ),
        (
            "}\nvoid f() { threadgroup float a[2];",
            r"k\.metal:3:12: error: a threadgroup variable must be declared",
        ),
    ],
)
def test_threadgroup_variables_that_metal_refuses(body: str, message: str) -> None:
    with pytest.raises(MetalError, match=message):
        rewritten(body)


def test_a_threadgroup_variable_at_program_scope_is_refused() -> None:
    with pytest.raises(MetalError, match="must be declared in the body of a kernel"):
        rewrite(flatten("threadgroup float a[2];\n" + KERNEL.format(""), "k.metal"))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("vec<T, 2>(a, b)", "emu_vector<vec<T, 2>>(a, b)"),
        ("metal::vec<vec_t<T>, 4> (a)", "emu_vector<metal::vec<vec_t<T>, 4>> (a)"),
        ("vec<T, 2> v = {a, b};", "vec<T, 2> v = {a, b};"),
        ("using V = vec<T, 2>; V(a, b); W(c);", "using V = vec<T, 2>; emu_vector<V>(a, b); W(c);"),
        ("my_vec<T, 2>(a)", "my_vec<T, 2>(a)"),
        ("static_cast<bfloat>(h)", "emu_cast<bfloat>(h)"),
        ("static_cast<device T*>(p)", "static_cast<device T*>(p)"),
        ("f(const thread T& x)", "f(const T& x)"),
        ("f(thread T& x)", "f(thread T& x)"),
        ("f(const constant T& x)", "f(      constant T& x)"),
        ("f(constant const T& x)", "f(constant       T& x)"),
        ("bool f() const constant {}", "bool f() const constant {}"),
    ],
)
def test_spellings_that_clang_wants(before: str, after: str) -> None:
    assert rewritten(before) == after


def test_thread_is_dropped_on_constructors_and_operators_alone() -> None:
    text = (
        "struct C {\n C(float x) thread : r(x) {}\n operator float() const thread { return r; }\n"
        " float get() thread { return r; }\n C(float x) device;\n float r;\n};\n"
    )
    lines = rewrite(flatten(text, "k.metal")).split("\n")
    assert "thread" not in lines[1] + lines[2]
    assert "thread" in lines[3]
    assert "device" in lines[4]


def test_function_constants_get_values_or_stay_undefined() -> None:
    source = flatten(
        "constant bool a [[function_constant(1)]];\nconstant int b [[function_constant(2)]];",
        "k.metal",
    )
    assert rewrite(source, {1: True}) == "constant bool a = true;\nextern constant int b;"


SIGNATURE = """
namespace n {
template <typename T, int D, int V = D>
[[kernel, max_total_threads_per_threadgroup(64)]] void k(
    const device T* x [[buffer(0)]],
    constant int& n,
    device vec<T, 4>* y [[buffer(5)]],
    const constant Params<2>* p [[buffer(2), function_constant(has_p)]],
    uint3 tid [[thread_position_in_grid]],
    const ushort lane [[thread_index_in_simdgroup]]) {
}
}
"""


def test_signature_is_read() -> None:
    source = flatten(SIGNATURE, "k.metal")
    (kernel,) = find_kernels(source)
    signature = read_signature(source, kernel)
    assert kernel.name == "n::k"
    assert [(b.index, b.name, b.is_writable) for b in signature.buffers] == [
        (0, "x", False),
        (1, "n", False),
        (2, "p", False),
        (5, "y", True),
    ]
    assert signature.arguments[1] == "*(constant int*)t->group->buffer[1]"
    assert signature.arguments[4:] == (
        "emu_attribute<uint3>(t->thread_position_in_grid)",
        "emu_attribute<ushort>(&t->thread_index_in_simdgroup)",
    )
    assert "n::k<T, D, V>(" in signature.entry("half, 64")
    assert "emu_call<half, 64>(t)" in signature.entry("half, 64")


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        ("threadgroup float* s [[threadgroup(0)]]", "neither a device or constant pointer"),
        ("device float* a [[buffer(31)]]", "Metal has 31 buffers"),
        ("device float* a [[buffer(0)]], device float* b [[buffer(0)]]", "bound twice; 'a' has it"),
        ("texture2d<float> t [[texture(0)]]", "neither a device or constant pointer"),
        ("float x", "neither a device or constant pointer"),
    ],
)
def test_parameters_that_cannot_be_passed(parameter: str, message: str) -> None:
    source = flatten(f"kernel void k({parameter}) {{}}", "k.metal")
    with pytest.raises(MetalError, match=message):
        read_signature(source, find_kernels(source)[0])


@pytest.mark.parametrize(
    "text",
    [
        'template [[host_name("n")]] [[kernel]] decltype(f<half, 4>) f<half, 4>;',
        'template [[host_name("n")]] [[kernel]] void f<half, 4>(device half* x [[buffer(0)]]);',
    ],
)
def test_instances_are_found_and_blanked(text: str) -> None:
    (instance,) = find_instances(text)
    assert (instance.host_name, instance.function, instance.arguments) == ("n", "f", "half, 4")
    assert not rewrite(flatten(text, "k.metal")).strip()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("void f() { goto end; end: return; }", "'goto': Metal has no goto"),
        ("__local int x;", "this is OpenCL"),
        ("void f() { double x; }", "Metal has no double"),
        ("void f() { long long x; }", "Metal has no long long"),
        ("int emu_x;", "belong to the emulator"),
        ("void f(float4 v) { v.lo; }", r"'\.lo' is OpenCL's way"),
        ("void f(float4 v) { v.s0; }", r"'\.s0' is OpenCL's way"),
        (
            "void f(uint i [[thread_index_in_simdgrup]]);",
            "attribute 'thread_index_in_simdgrup' is unknown",
        ),
        ("int *p = new int;", "no dynamic memory"),
    ],
)
def test_what_clang_takes_and_metal_does_not(text: str, message: str) -> None:
    with pytest.raises(MetalError, match=message) as caught:
        check_subset(flatten("\n" + text, "k.metal"))
    assert caught.value.line == 2
    assert caught.value.kind == "subset"


@pytest.mark.parametrize(
    "text",
    [
        "struct P { float lo, hi; }; float f(P p) { return p.lo; }",
        "// goto\nfloat f(float4 v) { return v.xy.x; }",
        "uint u = a[b[0]]; [[kernel]] void k(device int* x [[buffer(0)]]) {}",
        "float new_max;",
    ],
)
def test_what_metal_takes_is_let_through(text: str) -> None:
    check_subset(flatten(text, "k.metal"))
