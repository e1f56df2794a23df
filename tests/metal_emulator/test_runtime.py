"""Lanes that do not meet, launches, schedules, counters. Knows no real kernel."""

from collections.abc import Mapping

import numpy as np
import pytest

from metal_emulator import MetalError, Undefined, compile_kernel
from metal_emulator.runtime import load_runtime
from tests.metal_emulator.small_kernels import HEAD, PARAMETERS, X, find, run_body

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
        made = run_body(body.replace("SHUFFLE", ""), strict_exit=1, order=order).reshape(4, 32)
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
        np.testing.assert_array_equal(
            run_body(body, strict_exit=0, order=order), X[np.arange(128) ^ 1]
        )


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
    forward, reverse = (run_body(body, mode="fast", order=order) for order in (0, 1))
    assert (forward != reverse).any()


def test_a_process_lives_on_after_findings() -> None:
    for _ in range(3):
        find("o[i] = x[i * 4096];", "out_of_bounds", mode="fast")
        np.testing.assert_array_equal(run_body("o[i] = x[i];", mode="fast"), X)


@pytest.mark.parametrize("mode", ["fast", "check"])
def test_a_kernel_without_end(mode: str) -> None:
    body = "volatile int n = 1; while (n) n = n + 2; o[i] = n; // here"
    load_runtime().emu_limit_time(50)
    try:
        find(body, "deadlock", "no end after 50 ms", mode=mode)
        np.testing.assert_array_equal(run_body("o[i] = x[i];", mode=mode), X)
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
