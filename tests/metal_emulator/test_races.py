"""Data races and reads of what nobody wrote: kernels with one such bug, and those beside them that have none."""

import numpy as np
import pytest

from metal_emulator import MetalError
from tests.metal_emulator.small_kernels import X, find, run_body

# ---- threadgroup memory

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
            run_body(body, mode=mode, order=order), X.reshape(2, 64)[:, ::-1].ravel()
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
        run_body(body, order=order)
    assert caught.value.kind in ("threadgroup_race", "uninitialised")


def test_a_simdgroup_barrier_orders_its_lanes() -> None:
    barrier = "simdgroup_barrier(mem_flags::mem_threadgroup);"
    body = NEIGHBOUR.replace("BARRIER", barrier).replace("OTHER", "t ^ 1")
    np.testing.assert_array_equal(run_body(body), X[np.arange(128) ^ 1])


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
    run_body(body.replace("BARRIER", "threadgroup_barrier(mem_flags::mem_threadgroup);"))
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
    assert np.isnan(run_body(body, mode="fast")[64:]).all()
    assert "threadgroup (1, 0, 0)" in find(body, "uninitialised", order=1).thread


# ---- device memory


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
        run_body(f"o[i] = x[i]; {barrier} float v = o[i ^ 1]; {barrier} o[i] = v;"),
        X[np.arange(128) ^ 1],
    )


def test_the_same_value_written_twice() -> None:
    body = "o[t] = x[t]; o[64 + t] = 1;"
    find(body, "device_race", "after a write by thread 0 of threadgroup (0, 0, 0)")
    run_body(body, same_value_ok=True)
    find("o[t] = x[i]; o[64 + t] = 1;", "device_race", "the values differ", same_value_ok=True)


def test_atomics_of_two_groups_do_not_race() -> None:
    body = "atomic_fetch_add_explicit((device atomic<float>*)o + t, x[i], memory_order_relaxed);"
    made = run_body(body, o=np.zeros(128, np.float32))
    np.testing.assert_array_equal(made[:64], X.reshape(2, 64).sum(0))
