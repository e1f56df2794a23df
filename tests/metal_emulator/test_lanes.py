"""What the lanes of a simdgroup do together, against numpy: exchange, matrices, atomics."""

from collections.abc import Callable

import numpy as np
import pytest

from metal_emulator import MetalError, Undefined, compile_kernel
from tests.metal_emulator.small_kernels import (
    HEAD,
    LANES,
    MODES,
    Array,
    bfloats,
    evaluate,
    run_text,
)

# ---- lanes


def shifted(by: int) -> Callable[[Array], Array]:
    """Each lane takes from lane + by; where there is none it keeps its own."""
    source = LANES + by
    return lambda x: np.where((source >= 0) & (source < 32), x[source.clip(0, 31)], x)


def filled(by: int, modulo: int) -> Callable[[Array], Array]:
    """The same within blocks of `modulo`; where there is none it takes 100 more from the block's other end."""
    rank, block = LANES % modulo + by, LANES // modulo * modulo
    inside = (rank >= 0) & (rank < modulo)
    return lambda x: x[block + rank % modulo] + np.where(inside, 0, 100).astype(x.dtype)


LANE_OPERATIONS: dict[str, Callable[[Array], Array]] = {
    "simd_sum(vx)": lambda x: np.full(32, x.sum()),
    "simd_max(vx)": lambda x: np.full(32, x.max()),
    "simd_min(vx)": lambda x: np.full(32, x.min()),
    "simd_product(decltype(vx)(vx == 3 ? 2 : 1))": lambda x: np.full(32, 2 ** (x == 3).sum()),
    "simd_prefix_inclusive_sum(vx)": np.cumsum,
    "simd_prefix_exclusive_sum(vx)": lambda x: np.cumsum(x) - x,
    "simd_prefix_inclusive_product(decltype(vx)(vx == 3 ? 2 : 1))": lambda x: np.cumprod(
        np.where(x == 3, 2, 1)
    ),
    "simd_prefix_exclusive_product(decltype(vx)(vx == 3 ? 2 : 1))": lambda x: np.cumprod(
        np.r_[1, np.where(x == 3, 2, 1)[:-1]]
    ),
    "simd_broadcast(vx, 7)": lambda x: np.full(32, x[7]),
    "simd_broadcast_first(vx)": lambda x: np.full(32, x[0]),
    "simd_shuffle(vx, (lane * 7) % 32)": lambda x: x[LANES * 7 % 32],
    "simd_shuffle_xor(vx, 5)": lambda x: x[LANES ^ 5],
    "simd_shuffle_down(vx, 3)": shifted(3),
    "simd_shuffle_up(vx, 3)": shifted(-3),
    "simd_shuffle_rotate_down(vx, 5)": lambda x: np.roll(x, -5),
    "simd_shuffle_rotate_up(vx, 5)": lambda x: np.roll(x, 5),
    "simd_shuffle_and_fill_down(vx, decltype(vx)(vx + 100), 3)": filled(3, 32),
    "simd_shuffle_and_fill_up(vx, decltype(vx)(vx + 100), 3)": filled(-3, 32),
    "simd_shuffle_and_fill_down(vx, decltype(vx)(vx + 100), 3, 8)": filled(3, 8),
    "simd_shuffle_and_fill_up(vx, decltype(vx)(vx + 100), 3, 8)": filled(-3, 8),
    "simd_any(vx == 3)": lambda x: np.full(32, True),
    "simd_any(vx == 99)": lambda x: np.full(32, False),
    "simd_all(vx < 99)": lambda x: np.full(32, True),
    "simd_all(vx == 3)": lambda x: np.full(32, False),
    "simd_is_first()": lambda x: LANES == 0,
    "quad_sum(vx)": lambda x: x.reshape(8, 4).sum(1).repeat(4),
    "quad_max(vx)": lambda x: x.reshape(8, 4).max(1).repeat(4),
    "quad_min(vx)": lambda x: x.reshape(8, 4).min(1).repeat(4),
    "quad_prefix_inclusive_sum(vx)": lambda x: x.reshape(8, 4).cumsum(1).ravel(),
    "quad_broadcast(vx, 2)": lambda x: x[LANES // 4 * 4 + 2],
    "quad_broadcast_first(vx)": lambda x: x[LANES // 4 * 4],
    "quad_shuffle(vx, 3 - lane % 4)": lambda x: x[LANES ^ 3],
    "quad_shuffle_xor(vx, 1)": lambda x: x[LANES ^ 1],
    "quad_shuffle_down(vx, 1)": lambda x: x[np.where(LANES % 4 < 3, LANES + 1, LANES)],
    "quad_shuffle_up(vx, 1)": lambda x: x[np.where(LANES % 4 > 0, LANES - 1, LANES)],
    "quad_shuffle_rotate_down(vx, 1)": lambda x: x[LANES // 4 * 4 + (LANES + 1) % 4],
    "quad_shuffle_rotate_up(vx, 1)": lambda x: x[LANES // 4 * 4 + (LANES - 1) % 4],
    "quad_shuffle_and_fill_down(vx, decltype(vx)(vx + 100), 1)": filled(1, 4),
    "quad_shuffle_and_fill_up(vx, decltype(vx)(vx + 100), 1)": filled(-1, 4),
    "quad_any(vx == 3)": lambda x: (x == 3).reshape(8, 4).any(1).repeat(4),
    "quad_all(vx < 4)": lambda x: (x < 4).reshape(8, 4).all(1).repeat(4),
    "quad_is_first()": lambda x: LANES % 4 == 0,
}


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.float16])
def test_lanes_exchange(dtype: type, order: int) -> None:
    x: Array = np.array([*map(int, "31415926535897932384626433832795")]).astype(dtype)
    mode = MODES[order & 1]
    found = evaluate(list(LANE_OPERATIONS), {"x": x}, "float", np.float32, order=order, mode=mode)
    for row, (expression, reference) in zip(found, LANE_OPERATIONS.items(), strict=True):
        np.testing.assert_array_equal(row, reference(x).astype(np.float32), err_msg=expression)


def test_bits_of_all_lanes() -> None:
    x = (np.arange(32) * 2654435761 % 2**32).astype(np.uint32)
    found = evaluate(
        ["simd_and(vx | 7u)", "simd_or(vx)", "simd_xor(vx)", "uint(ulong(simd_ballot(vx & 1)))",
         "uint(ulong(simd_active_threads_mask()))", "uint(simd_ballot(true).all())", "quad_xor(vx)"],
        {"x": x}, "uint", np.uint32,
    )  # fmt: skip
    ballot = np.bitwise_or.reduce((x & 1) << np.arange(32, dtype=np.uint32))
    expected = [
        np.bitwise_and.reduce(x | 7),
        np.bitwise_or.reduce(x),
        np.bitwise_xor.reduce(x),
        ballot,
        2**32 - 1,
        1,
    ]
    np.testing.assert_array_equal(found[:6], np.array(expected, np.uint32)[:, None].repeat(32, 1))
    np.testing.assert_array_equal(found[6], np.bitwise_xor.reduce(x.reshape(8, 4), 1).repeat(4))


def tree(x: Array, strides: list[int]) -> np.float32:
    x = x.copy()
    for stride in strides:
        x = x + x[np.arange(32) ^ stride]
    return np.float32(x[0])


def test_the_order_of_a_sum_is_a_choice() -> None:
    x = np.random.default_rng(5).standard_normal(32).astype(np.float32)
    near, far = (
        evaluate(["simd_sum(vx)"], {"x": x}, "float", np.float32, order=o)[0, 0] for o in (0, 2)
    )
    assert near == tree(x, [1, 2, 4, 8, 16]) and far == tree(x, [16, 8, 4, 2, 1])
    assert near != far


def test_vectors_go_through_lanes() -> None:
    text = """[[kernel]] void k(const device float4* x, device float4* o, uint lane [[thread_index_in_simdgroup]]) {
      o[lane] = simd_sum(x[lane]) + simd_shuffle_xor(x[lane], 1);
      o[32 + lane] = simd_shuffle_and_fill_down(x[lane], float4(-1), 30);
    }"""
    x = np.arange(128, dtype=np.float32).reshape(32, 4)
    o = run_text(text, {"x": x}, {"o": Undefined((2, 32, 4), np.float32)})["o"]
    np.testing.assert_array_equal(o[0], x.sum(0) + x[LANES ^ 1])
    np.testing.assert_array_equal(o[1], np.r_[x[30:], np.full((30, 4), -1)])


@pytest.mark.parametrize(
    "expression", ["simd_sum(ulong(vx))", "simd_shuffle(bool(vx), 1)", "simd_max(long(vx))"]
)
def test_lanes_exchange_no_bool_and_no_64_bits(expression: str) -> None:
    with pytest.raises(MetalError, match="no matching function"):
        evaluate([expression], {"x": np.ones(32, np.float32)}, "float", np.float32)


# ---- matrices

MATRICES = """template <typename T> [[kernel]] void k(const device T* a, const device T* b, device float* o,
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup T shared[10 * 16];
  for (uint i = lane; i < 160; i += 32) shared[i] = b[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  simdgroup_matrix<T, 8, 8> x, y, z;
  simdgroup_load(x, a, 12);
  simdgroup_load(y, shared, 16, ulong2(3, 1), false);
  simdgroup_load(z, shared, 16, ulong2(3, 1), true);
  simdgroup_matrix<float, 8, 8> sum = make_filled_simdgroup_matrix<float, 8, 8>(2.0f), product;
  simdgroup_multiply_accumulate(sum, x, y, sum);
  simdgroup_multiply(product, x, z);
  simdgroup_store(sum, o, 8);
  simdgroup_store(product, o + 64, 8, ulong2(0, 0), true);
  simdgroup_float8x8 identity(1.0f);
  simdgroup_store(identity, o + 128);
  o[192 + 2 * lane] = float(x.thread_elements()[0]);
  o[193 + 2 * lane] = float(x.thread_elements()[1]);
}"""


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("name", "dtype"), [("float", np.float32), ("half", np.float16), ("bfloat", np.uint16)]
)
def test_matrices(name: str, dtype: type, mode: str) -> None:
    rng = np.random.default_rng(1)
    a, b = (
        rng.integers(-8, 8, (8, 12)).astype(np.float32),
        rng.integers(-8, 8, (10, 16)).astype(np.float32),
    )
    given = {
        n: bfloats(v) if dtype is np.uint16 else v.astype(dtype) for n, v in (("a", a), ("b", b))
    }
    o = run_text(
        MATRICES, given, {"o": Undefined((4, 8, 8), np.float32)}, template=name, mode=mode
    )["o"]
    x, y = a[:, :8], b[1:9, 3:11]
    np.testing.assert_array_equal(o[0], x @ y + 2)
    np.testing.assert_array_equal(o[1], (x @ y.T).T)
    np.testing.assert_array_equal(o[2], np.eye(8))
    rows, columns = (LANES // 4 & 4) + LANES // 2 % 4, (LANES // 4 & 2) * 2 + LANES % 2 * 2
    np.testing.assert_array_equal(
        o[3].reshape(32, 2), np.stack([x[rows, columns], x[rows, columns + 1]], 1)
    )


# ---- atomics


@pytest.mark.parametrize("order", [0, 1])
def test_atomics(order: int) -> None:
    text = """[[kernel]] void k(device atomic_uint* o, device atomic<float>* f, device atomic_int* s,
        device atomic_ulong* wide, uint t [[thread_position_in_grid]]) {
      threadgroup atomic_uint shared;
      if (t == 0) atomic_store_explicit(&shared, 0, memory_order_relaxed);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      atomic_fetch_add_explicit(&shared, t, memory_order_relaxed);
      atomic_fetch_add_explicit(&o[0], 1, memory_order_relaxed);
      atomic_fetch_or_explicit(&o[1], 1u << (t % 32), memory_order_relaxed);
      atomic_fetch_max_explicit(&o[2], t * 7 % 64, memory_order_relaxed);
      atomic_fetch_add_explicit(f, 0.5f, memory_order_relaxed);
      atomic_fetch_min_explicit(s, -int(t), memory_order_relaxed);
      atomic_max_explicit(wide, ulong(t) << 33, memory_order_relaxed);
      uint seen = atomic_load_explicit(&o[3], memory_order_relaxed);
      while (!atomic_compare_exchange_weak_explicit(
          &o[3], &seen, seen + 2, memory_order_relaxed, memory_order_relaxed));
      threadgroup_barrier(mem_flags::mem_threadgroup);
      uint all = atomic_load_explicit(&shared, memory_order_relaxed);
      if (t == 0) atomic_exchange_explicit(&o[4], all, memory_order_relaxed);
    }"""
    outputs: dict[str, Array | Undefined] = {
        "o": np.zeros(5, np.uint32), "f": np.zeros(1, np.float32), "s": np.zeros(1, np.int32),
        "wide": np.zeros(1, np.uint64),
    }  # fmt: skip
    made = run_text(text, {}, outputs, threads=64, order=order)
    assert made["o"].tolist() == [64, 2**32 - 1, 63, 128, 2016]
    assert (made["f"][0], made["s"][0], made["wide"][0]) == (32.0, -63, 63 << 33)


@pytest.mark.parametrize("type_name", ["half", "ushort", "long"])
def test_no_other_atomics(type_name: str) -> None:
    text = f"[[kernel]] void k(device atomic<{type_name}>* o) {{ atomic_load_explicit(o, memory_order_relaxed); }}"
    with pytest.raises(MetalError, match=r"no atomic of this type|no matching function"):
        compile_kernel(HEAD + text, "k")
