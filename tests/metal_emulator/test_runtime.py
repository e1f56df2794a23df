"""What the emulator finds in a running kernel, each kind by a kernel with that one bug; schedules, poison, counters.

Knows no real kernel. A bug's text is as short as the bug; the line that a finding names is the one marked `// here`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from metal_emulator import MetalError, Undefined, compile_kernel
from metal_emulator.runtime import load_runtime

Array = npt.NDArray[Any]

HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"
PARAMETERS = """(const device float* x, device float* o, uint t [[thread_index_in_threadgroup]],
    uint i [[thread_position_in_grid]], uint lane [[thread_index_in_simdgroup]],
    uint s [[simdgroup_index_in_threadgroup]], uint g [[threadgroup_position_in_grid]])"""
X = np.arange(128, dtype=np.float32)


def run(
    body: str,
    *,
    mode: str = "check",
    threads: int = 128,
    group: int = 64,
    x: Array = X,
    o: Array | Undefined | None = None,
    head: str = "",
    **how: Any,
) -> Array:
    """Output `o` of `body`, over two threadgroups of two simdgroups."""
    text = f"{HEAD}{head}[[kernel]] void k{PARAMETERS} {{\n{body}\n}}\n"
    kernel = compile_kernel(text, "k", mode=mode)
    output = Undefined((128,), np.float32) if o is None else o
    return kernel.run({"x": x}, {"o": output}, (threads, 1, 1), (group, 1, 1), **how).outputs["o"]


def find(body: str, kind: str, *words: str, **how: Any) -> MetalError:
    """The finding that `body` gives, of this kind, with these words, at the line that is marked."""
    with pytest.raises(MetalError) as caught:
        run(body, **how)
    found = caught.value
    assert found.kind == kind, str(found)
    for word in words:
        assert word in str(found)
    marked = [n for n, line in enumerate(body.split("\n")) if "// here" in line]
    if marked and found.line:  # a sanitizer's trap may have lost its line
        assert found.line == len((HEAD + PARAMETERS).split("\n")) + 1 + marked[0], str(found)
    return found


# ---- memory

NEIGHBOUR = """threadgroup float shared[64];
shared[t] = x[i];
BARRIER
o[i] = shared[OTHER]; // here
"""


@pytest.mark.parametrize("order", [0, 1])
def test_correct_kernel(order: int) -> None:
    body = NEIGHBOUR.replace("BARRIER", "threadgroup_barrier(mem_flags::mem_threadgroup);").replace(
        "OTHER", "63 - t"
    )
    for mode in ("fast", "check", "count"):
        np.testing.assert_array_equal(
            run(body, mode=mode, order=order), X.reshape(2, 64)[:, ::-1].ravel()
        )


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize(
    ("other", "barrier"),
    [
        ("(t + 32) % 64", ""),
        ("(t + 32) % 64", "threadgroup_barrier(mem_flags::mem_none);"),
        ("(t + 32) % 64", "threadgroup_barrier(mem_flags::mem_device);"),
        ("(t + 32) % 64", "simdgroup_barrier(mem_flags::mem_threadgroup);"),
        ("t ^ 1", "simdgroup_barrier(mem_flags::mem_none);"),
        ("t ^ 1", "simd_sum(1);"),
    ],
)
def test_threadgroup_race(other: str, barrier: str, order: int) -> None:
    body = NEIGHBOUR.replace("BARRIER", barrier).replace("OTHER", other)
    with pytest.raises(
        MetalError, match=r"threadgroup data race|uninitialised threadgroup"
    ) as caught:
        run(body, order=order)
    assert caught.value.kind in ("threadgroup_race", "uninitialised")


def test_a_simdgroup_barrier_orders_its_lanes() -> None:
    barrier = "simdgroup_barrier(mem_flags::mem_threadgroup);"
    body = NEIGHBOUR.replace("BARRIER", barrier).replace("OTHER", "t ^ 1")
    np.testing.assert_array_equal(run(body), X[np.arange(128) ^ 1])


@pytest.mark.parametrize("order", [0, 1])
def test_write_after_read_race(order: int) -> None:
    body = f"""threadgroup float shared[64];
    shared[t] = x[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float v = shared[(t + 32) % 64];
    if (s == {1 - order}) shared[t] = v; // here
    o[i] = v;"""
    find(
        body,
        "threadgroup_race",
        "write of 4 bytes",
        "after a read by thread",
        "in line 6",
        order=order,
    )


@pytest.mark.parametrize("writer", [0, 31, 32, 63])
def test_readers_of_two_simdgroups_are_both_remembered(writer: int) -> None:
    body = f"""threadgroup float shared[1];
    if (t == 0) shared[0] = 1;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float v = shared[0];
    threadgroup_barrier(mem_flags::mem_none);
    if (t == {writer}) shared[0] = 2; // here
    o[i] = v;"""
    find(body, "threadgroup_race", "write of 4 bytes", "after a read")


def test_an_atomic_and_a_plain_access_race() -> None:
    body = """threadgroup atomic_int shared;
    if (t == 0) atomic_store_explicit(&shared, 0, memory_order_relaxed);
    BARRIER
    atomic_fetch_add_explicit(&shared, 1, memory_order_relaxed);
    o[i] = t;"""
    run(body.replace("BARRIER", "threadgroup_barrier(mem_flags::mem_threadgroup);"))
    find(body.replace("BARRIER", "").replace("t == 0", "t == 63"), "uninitialised", "atomic access")
    plain = body.replace("atomic_int shared", "int shared[1]").replace(
        "atomic_store_explicit(&shared, 0, memory_order_relaxed)", "shared[0] = 0"
    ).replace("&shared", "(threadgroup atomic_int*)shared").replace("BARRIER", "")  # fmt: skip
    find(plain, "threadgroup_race", "atomic access", "after a write by thread 0")


def test_uninitialised_threadgroup_memory() -> None:
    body = """threadgroup half shared[64];
    if (t < 63) shared[t] = 1;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    o[i] = shared[t]; // here"""
    found = find(body, "uninitialised", "uninitialised threadgroup memory", "2 bytes at index 63")
    assert "thread (63, 0, 0) of threadgroup (0, 0, 0), simdgroup 1, lane 31" in found.thread


def test_threadgroup_memory_is_new_in_every_group() -> None:
    body = """threadgroup float shared[64];
    if (g == 0) shared[t] = 1;
    o[i] = shared[t]; // here"""
    found = find(body, "uninitialised")
    assert "threadgroup (1, 0, 0)" in found.thread
    assert np.isnan(run(body, mode="fast")[64:]).all()
    assert "threadgroup (1, 0, 0)" in find(body, "uninitialised", order=1).thread


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
        run("o[i] = x[min(i + 2, 127u)];", mode="fast", x=X[:126])[124:]
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
    run("if (i != 7) o[i] = 1;", o=np.zeros(128, np.float32))


# ---- device memory between threads


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("o[i / 2] = x[i]; o[64 + i / 2] = 0;", ["write of 4 bytes", "after a write by thread"]),
        ("o[i] = x[i]; if (g == 0) o[0] = o[64 + t]; // here", []),
        ("o[i] = 1; float v = o[127 - i]; if (v < 0) o[i] = v;", ["which nothing orders"]),
        (
            "if (g == 0) o[t] = o[64 + t] + 1; else o[i] = 1;",
            ["threadgroup (", "which nothing orders"],
        ),
        (
            "o[i] = x[i]; threadgroup_barrier(mem_flags::mem_threadgroup); o[i ^ 1] += 1;",
            ["with no barrier between"],
        ),
    ],
)
def test_device_race(body: str, words: list[str], order: int) -> None:
    find(
        body.replace(" // here", ""),
        "device_race",
        "device data race",
        *words,
        order=order,
        o=np.zeros(128, np.float32),
    )


def test_read_then_write_between_groups() -> None:
    """The first group only reads what the second writes: no value shows it in the forward schedule."""
    body = "float v = g == 0 ? o[64 + t] : 0; o[i] = v;"
    found = find(body, "device_race", "write of 4 bytes", "after a read by thread 0 of threadgroup (0, 0, 0)",
                 o=np.zeros(128, np.float32))  # fmt: skip
    assert "threadgroup (1, 0, 0)" in found.thread


@pytest.mark.parametrize(
    "barrier",
    ["threadgroup_barrier(mem_flags::mem_device);", "simdgroup_barrier(mem_flags::mem_device);"],
)
def test_device_memory_ordered_by_a_barrier(barrier: str) -> None:
    np.testing.assert_array_equal(
        run(f"o[i] = x[i]; {barrier} float v = o[i ^ 1]; {barrier} o[i] = v;"),
        X[np.arange(128) ^ 1],
    )


def test_the_same_value_written_twice() -> None:
    body = "o[t] = x[t]; o[64 + t] = 1;"
    find(body, "device_race", "after a write by thread 0 of threadgroup (0, 0, 0)")
    run(body, same_value_ok=True)
    find("o[t] = x[i]; o[64 + t] = 1;", "device_race", "the values differ", same_value_ok=True)


def test_atomics_of_two_groups_do_not_race() -> None:
    body = "atomic_fetch_add_explicit((device atomic<float>*)o + t, x[i], memory_order_relaxed);"
    made = run(body, o=np.zeros(128, np.float32))
    np.testing.assert_array_equal(made[:64], X.reshape(2, 64).sum(0))


# ---- lanes that do not meet


@pytest.mark.parametrize("mode", ["fast", "check"])
@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            "if (lane < 16) o[i] = simd_sum(x[i]); else o[i] = 0;",
            ["simd operation", "only 0000ffff wait"],
        ),
        (
            "o[i] = lane < 16 ? simd_sum(x[i]) : simd_max(x[i]);",
            ["divergent simdgroup", "lanes 0000ffff wait at"],
        ),
        (
            "for (uint j = 0; j <= lane; j++) o[i] = simd_sum(1.0f);",
            ["is not reached by all lanes"],
        ),
        (
            "if (t == 5) return; threadgroup_barrier(mem_flags::mem_none); o[i] = 1;",
            ["not reached by all lanes"],
        ),
        (
            "o[i] = 1; if (s) threadgroup_barrier(mem_flags::mem_none);",
            ["a simdgroup has returned", "simdgroup 1 waits"],
        ),
        (
            "o[i] = 1;\nif (s) threadgroup_barrier(mem_flags::mem_none);\n"
            "else threadgroup_barrier(mem_flags::mem_none);",
            ["different threadgroup_barriers: simdgroup 0 at", "simdgroup 1 at"],
        ),
        (
            "if (lane & 1) simdgroup_barrier(mem_flags::mem_none); o[i] = simd_sum(1.0f);",
            ["divergent simdgroup"],
        ),
        ("if (lane / 4 == 3) return; o[i] = quad_sum(1.0f);", ["quad operation", "ffff0fff"]),
    ],
)
def test_divergence(body: str, words: list[str], mode: str) -> None:
    found = find(body, "divergence", *words, mode=mode)
    assert found.line and found.column


def test_a_divergence_names_its_lines() -> None:
    body = "if (lane < 7)\n o[i] = simd_sum(1.0f);\nelse\n  o[i] = simd_sum(2.0f); // here"
    found = find(
        body,
        "divergence",
        "lanes 0000007f wait at simd operation",
        "lane 7 waits at simd operation",
    )
    assert f"{found.line - 2}:" in str(found) and f"{found.line}:" in str(found)


def test_lanes_that_returned_are_left_out_where_that_is_allowed() -> None:
    body = "if (lane >= 20) { o[i] = 0; return; } o[i] = simd_sum(1.0f); SHUFFLE"
    for order in (0, 1):
        made = run(body.replace("SHUFFLE", ""), strict_exit=1, order=order).reshape(4, 32)
        np.testing.assert_array_equal(made, np.where(np.arange(32) < 20, 20, 0)[None].repeat(4, 0))
        shuffle = "o[i] = simd_shuffle_down(o[i], 1);"
        found = find(body.replace("SHUFFLE", shuffle), "simd_misuse", strict_exit=1, order=order)
        assert "shuffle from inactive lane 20: active are 000fffff" in str(found)


def test_the_lanes_of_an_operation_are_those_at_its_release() -> None:
    """A lane that returns right after a shuffle was still active in it, whenever the others resume."""
    body = (
        "float v = simd_shuffle_xor(x[i], 1); if (lane & 1) { o[i] = v; return; } o[i] = v + 0 * v;"
    )
    for order in (0, 1):
        np.testing.assert_array_equal(run(body, strict_exit=0, order=order), X[np.arange(128) ^ 1])


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ("o[i] = simd_shuffle(x[i], 32);", "lane 32 is out of range"),
        (
            "o[i] = quad_broadcast(x[i], 4);",
            "lane 4 is out of range: the operation has lanes 0 to 3",
        ),
        ("o[i] = simd_shuffle_down(x[i], 40);", "delta or modulo 40 is out of range"),
        ("o[i] = simd_shuffle_and_fill_up(x[i], 0.0f, 1, 6);", "delta or modulo 6"),
    ],
)
def test_lanes_out_of_range(body: str, word: str) -> None:
    find(body, "simd_misuse", word)


def test_matrices_need_all_lanes() -> None:
    body = """simdgroup_float8x8 a(1.0f), b(2.0f), c;
    if (lane > 15) { o[i] = 0; return; }
    simdgroup_multiply(c, a, b);
    o[i] = c.thread_elements()[0];"""
    find(body, "divergence", "simdgroup_multiply", "0000ffff")
    find(body, "simd_misuse", "inactive lanes: active are 0000ffff", strict_exit=0)


# ---- launches


@pytest.mark.parametrize(
    ("grid", "group", "word"),
    [
        ((2048, 1, 1), (2048, 1, 1), "threadgroup of 2048 threads"),
        ((0, 1, 1), (32, 1, 1), "a size is 0"),
    ],
)
def test_launch_that_metal_refuses(
    grid: tuple[int, int, int], group: tuple[int, int, int], word: str
) -> None:
    kernel = compile_kernel(
        f"{HEAD}[[kernel]] void k{PARAMETERS} {{ o[i] = 1; }}", "k", mode="fast"
    )
    with pytest.raises(MetalError, match=word):
        kernel.run({"x": X}, {"o": Undefined((128,), np.float32)}, grid, group)


def test_an_unordered_kernel_shows_in_two_schedules() -> None:
    body = "threadgroup float last[1]; last[0] = t; simdgroup_barrier(mem_flags::mem_none); o[i] = last[0];"
    forward, reverse = (run(body, mode="fast", order=order) for order in (0, 1))
    assert (forward != reverse).any()


def test_a_process_lives_on_after_findings() -> None:
    for _ in range(3):
        find("o[i] = x[i * 4096];", "out_of_bounds", mode="fast")
        np.testing.assert_array_equal(run("o[i] = x[i];", mode="fast"), X)


@pytest.mark.parametrize("mode", ["fast", "check"])
def test_a_kernel_without_end(mode: str) -> None:
    body = "volatile int n = 1; while (n) n = n + 2; o[i] = n; // here"
    load_runtime().emu_limit_time(50)
    try:
        find(body, "deadlock", "no end after 50 ms", mode=mode)
        np.testing.assert_array_equal(run("o[i] = x[i];", mode=mode), X)
    finally:
        load_runtime().emu_limit_time(600_000)


def test_outputs_of_growing_and_shrinking_sizes() -> None:
    kernel = compile_kernel(
        f"{HEAD}[[kernel]] void k{PARAMETERS} {{ o[i] = x[i]; }}", "k", mode="fast"
    )
    for size in (1, 5000, 3, 100_000, 64, 1_000_000, 2):
        x = np.arange(size, dtype=np.float32)
        outputs: Mapping[str, Undefined] = {"o": Undefined((size,), np.float32)}
        made = kernel.run({"x": x}, outputs, (size, 1, 1), (64, 1, 1)).outputs["o"]
        np.testing.assert_array_equal(made, x)


def test_the_switch_between_fibers() -> None:
    assert 0 < load_runtime().emu_switch_cost(1000) < 1e6


# ---- counters


def test_counts() -> None:
    body = """threadgroup float shared[64];
    shared[t] = x[i] + x[i ^ 1];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    o[i] = simd_sum(shared[(t * 2) % 64]) + quad_max(x[0]);"""
    kernel = compile_kernel(f"{HEAD}[[kernel]] void k{PARAMETERS} {{ {body} }}", "k", mode="count")
    counts = kernel.run(
        {"x": X}, {"o": Undefined((128,), np.float32)}, (128, 1, 1), (64, 1, 1)
    ).counts
    assert counts
    assert (counts.threads, counts.threadgroups, counts.simdgroups) == (128, 2, 4)
    assert (counts.simd_operations, counts.quad_operations, counts.threadgroup_barriers) == (
        4,
        4,
        2,
    )
    assert (
        counts.threadgroup_bytes == 256 and counts.bank_cycles == 4 * 1 + 4 * 2
    )  # one in two banks: twice as long
    x, o = counts.buffers["x"].reads, counts.buffers["o"].writes
    assert (x.bytes_asked, x.unique_lines, x.group_lines) == (128 * 12, 4, 5)
    assert (x.instructions, x.lines) == (12, 12)
    assert (o.bytes_asked, o.unique_lines, o.group_lines, o.lines) == (512, 4, 4, 4)


def test_neighbouring_loads_are_merged_to_sixteen_bytes() -> None:
    body = "float v = 0; for (int j = 0; j < 8; j++) v += x[t * 8 % 120 + j]; o[i] = v;"
    kernel = compile_kernel(f"{HEAD}[[kernel]] void k{PARAMETERS} {{ {body} }}", "k", mode="count")
    counts = kernel.run(
        {"x": X}, {"o": Undefined((128,), np.float32)}, (128, 1, 1), (64, 1, 1)
    ).counts
    assert counts
    x = counts.buffers["x"].reads
    assert x.merged_instructions == 4 * 2 and x.instructions >= 4 * 2
    assert x.bytes_asked == 128 * 32


def test_counts_of_divergent_lanes() -> None:
    body = "if (lane < 8) o[i] = x[i]; else o[i] = 1;"
    kernel = compile_kernel(f"{HEAD}[[kernel]] void k{PARAMETERS} {{ {body} }}", "k", mode="count")
    counts = kernel.run(
        {"x": X}, {"o": Undefined((128,), np.float32)}, (128, 1, 1), (64, 1, 1)
    ).counts
    assert counts
    x = counts.buffers["x"].reads
    assert (x.bytes_asked, x.instructions, x.unique_lines, x.merged_instructions) == (
        4 * 8 * 4,
        4,
        4,
        4,
    )
