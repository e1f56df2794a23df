"""Metal's language and library in the emulator, against numpy: lanes, matrices, atomics, vectors, roundings, functions.

Knows no real kernel: each text here is as small as what it shows.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from metal_emulator import MetalError, Undefined, compile_kernel

Array = npt.NDArray[Any]

HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"
LANES = np.arange(32)
MODES = ("fast", "check")


def run(
    text: str,
    inputs: Mapping[str, Array],
    outputs: Mapping[str, Array | Undefined],
    *,
    threads: int = 32,
    template: str = "",
    mode: str = "check",
    order: int = 0,
) -> dict[str, Array]:
    """The outputs of one threadgroup of kernel `k`."""
    kernel = compile_kernel(HEAD + text, "k", template, mode=mode)
    return kernel.run(inputs, outputs, (threads, 1, 1), (threads, 1, 1), order=order).outputs


def evaluate(
    expressions: list[str],
    inputs: Mapping[str, Array],
    result: str,
    dtype: npt.DTypeLike,
    **how: Any,
) -> Array:
    """Each expression in each of 32 lanes, (expressions, 32); `x` is an input, `vx` its element of the lane."""
    types = {
        "float32": "float", "float16": "half", "int32": "int", "uint32": "uint", "uint16": "bfloat",
        "uint8": "uchar", "int16": "short",
    }  # fmt: skip
    parameters = "".join(f"const device {types[a.dtype.name]}* {n}, " for n, a in inputs.items())
    elements = "".join(f"auto v{n} = {n}[lane]; (void)v{n}; " for n in inputs)
    stores = "\n".join(f"  o[{32 * i} + lane] = {e};" for i, e in enumerate(expressions))
    text = (
        f"[[kernel]] void k({parameters}device {result}* o, uint lane [[thread_index_in_simdgroup]]) "
        f"{{\n{elements}\n{stores}\n}}"
    )
    made = run(text, inputs, {"o": Undefined((len(expressions), 32), dtype)}, **how)
    return made["o"]


def bfloats(values: Array) -> Array:
    """float32 rounded to bfloat16, ties to even, as uint16."""
    bits = np.asarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bfloats(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


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
    o = run(text, {"x": x}, {"o": Undefined((2, 32, 4), np.float32)})["o"]
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
    o = run(MATRICES, given, {"o": Undefined((4, 8, 8), np.float32)}, template=name, mode=mode)["o"]
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
    made = run(text, {}, outputs, threads=64, order=order)
    assert made["o"].tolist() == [64, 2**32 - 1, 63, 128, 2016]
    assert (made["f"][0], made["s"][0], made["wide"][0]) == (32.0, -63, 63 << 33)


@pytest.mark.parametrize("type_name", ["half", "ushort", "long"])
def test_no_other_atomics(type_name: str) -> None:
    text = f"[[kernel]] void k(device atomic<{type_name}>* o) {{ atomic_load_explicit(o, memory_order_relaxed); }}"
    with pytest.raises(MetalError, match=r"no atomic of this type|no matching function"):
        compile_kernel(HEAD + text, "k")


# ---- vectors


def test_vectors_are_made_and_taken_apart() -> None:
    text = """[[kernel]] void k(device float* o, device int* i, uint t [[thread_position_in_grid]]) {
      if (t) return;
      float4 a = float4(1, float2(2, 3), 4), b = float4(a.xy, a.wz), c = float4(2);
      vec<float, 3> d = vec<float, 3>(half3(1.5h), vec<float, 3>(0).x == 0 ? 0.0f : 1.0f).xyz;
      a.yz = b.zw * c.xy;
      o[0] = a.x; o[1] = a.y; o[2] = a.z; o[3] = a[3]; o[4] = b.z; o[5] = dot(b, c); o[6] = d.z;
      int3 e = int3(float3(1.9f, -1.9f, 2.5f));
      i[0] = e.x; i[1] = e.y; i[2] = e.z;
      i[3] = as_type<int>(1.0f);
      i[4] = as_type<int>(ushort2(1, 2));
      uchar4 bytes = as_type<uchar4>(0x04030201u);
      i[5] = bytes.x + 10 * bytes.w;
      i[6] = int(max(int2(3, 9), int2(5, 2)).x) + clamp(int2(7, -7), -1, 5).y;
      i[7] = sizeof(float3) + sizeof(vec<half, 4>) + alignof(float2);
      half2 h = half2(a.xy);
      o[7] = float(h.y + h.x);
      bfloat2 g = bfloat2(bfloat(1.0f), bfloat(0.5f));
      o[8] = float(g.x + g.y);
      float4 m = metal::max(a, 2.5f);
      o[9] = m.x + length(float2(3, 4)) + cross(float3(1, 0, 0), float3(0, 1, 0)).z;
    }"""
    text = text.replace(
        "vec<float, 3>(half3(1.5h), vec<float, 3>(0).x == 0 ? 0.0f : 1.0f).xyz",
        "float3(half3(1.5h))",
    )
    made = run(text, {}, {"o": np.zeros(10, np.float32), "i": np.zeros(8, np.int32)}, threads=1)
    assert made["o"].tolist() == [1, 8, 6, 4, 4, 20, 1.5, 9, 1.5, 8.5]
    assert made["i"].tolist() == [1, -1, 2, 0x3F800000, 0x20001, 41, 4, 32]


@pytest.mark.parametrize("wrong", ["float4(1, 2)", "float2(float3(1))", "int3(int2(1), int2(2))"])
def test_vectors_need_all_components(wrong: str) -> None:
    with pytest.raises(MetalError, match=r"number of (?:vector )?components"):
        compile_kernel(
            HEAD + f"[[kernel]] void k(device float* o) {{ auto v = {wrong}; o[0] = v.x; }}", "k"
        )


@pytest.mark.parametrize("mode", MODES)
def test_bool_vectors(mode: str) -> None:
    text = """[[kernel]] void k(const device float4* x, device float4* o, device bool4* b, device int* i) {
      float4 a = x[0], c = x[1];
      bool4 less = a < c;
      o[0] = select(a, c, a < c);
      o[1] = select(a, c, less & !(c == float4(2)));
      o[2] = float4(less);
      b[0] = less || isnan(x[2]);
      b[1] = bool4(bool2(true, false), false, less.y);
      half4 h = half4(a);
      i[0] = any(a < c); i[1] = all(a < c); i[2] = all(a <= a); i[3] = any(h > half4(3.5h));
      i[4] = less.x + less.y + less.z + less.w;
      i[5] = int3(bool3(a.xyz == a.xyz)).z;
      i[6] = select(1, 2, less[0]);
    }"""
    nan = np.nan
    x = np.array([[1, 2, 3, 4], [2, 2, 4, 0], [0, nan, 0, nan]], np.float32)
    outputs: dict[str, Array | Undefined] = {
        "o": Undefined((3, 4), np.float32), "b": Undefined((2, 4), np.bool_), "i": Undefined((7,), np.int32)
    }  # fmt: skip
    made = run(text, {"x": x}, outputs, threads=1, mode=mode)
    assert made["o"].tolist() == [[2, 2, 4, 4], [1, 2, 4, 4], [1, 0, 1, 0]]
    assert made["b"].tolist() == [[True, True, True, True], [True, False, False, False]]
    assert made["i"].tolist() == [1, 0, 1, 1, 2, 1, 2]


def test_packed_vectors() -> None:
    text = """struct Vertex { packed_float3 place; uchar flag; };
    [[kernel]] void k(const device packed_float3* x, constant packed_short2* s, device packed_float3* o,
        device float* f, uint t [[thread_position_in_grid]]) {
      float3 a = x[t];
      o[t] = a * 2.0f + float3(x[t]);
      packed_half4 h = half4(1, 2, 3, 4);
      h[2] = 7.0h;
      f[t] = x[t].y + float(h.z) + float(s[t].x) + sizeof(Vertex);
    }"""
    x, s = np.arange(12, dtype=np.float32).reshape(4, 3), np.arange(8, dtype=np.int16).reshape(4, 2)
    outputs: dict[str, Array | Undefined] = {
        "o": Undefined((4, 3), np.float32),
        "f": Undefined((4,), np.float32),
    }
    made = run(text, {"x": x, "s": s}, outputs, threads=4)
    np.testing.assert_array_equal(made["o"], 3 * x)
    np.testing.assert_array_equal(made["f"], x[:, 1] + 7 + s[:, 0] + 16)


def test_arrays() -> None:
    text = """constant metal::array<float, 3> table = {1.0f, 2.0f, 4.0f};
    struct Pair { array<int, 2> of; };
    [[kernel]] void k(const device array<float, 4>* x, device array<float, 4>* o, device int* n,
        uint t [[thread_position_in_grid]]) {
      array<float, 4> a = x[t];
      for (size_t i = 0; i < a.size(); i++) a[i] *= table[i % table.size()];
      o[t] = a;
      Pair p = {{1, 2}};
      p.of[1] += int(t);
      n[t] = p.of[0] + p.of[1];
    }"""
    x = np.ones((2, 4), np.float32)
    outputs: dict[str, Array | Undefined] = {
        "o": Undefined((2, 4), np.float32),
        "n": Undefined((2,), np.int32),
    }
    made = run(text, {"x": x}, outputs, threads=2)
    assert made["o"].tolist() == [[1, 2, 4, 1]] * 2 and made["n"].tolist() == [3, 4]


def test_a_pointer_moves_by_an_object_that_is_a_number() -> None:
    text = """template <int N> struct Int { constexpr operator int() const { return N; } };
    [[kernel]] void k(const device float* x, device float* o, uint t [[thread_position_in_grid]]) {
      threadgroup float shared[4];
      threadgroup float* q = shared;
      x += Int<2>{};
      q += Int<1>{};
      *q = *x + x[Int<1>{}];
      q -= Int<1>{};
      o[t] = q[1];
    }"""
    made = run(text, {"x": np.arange(4, dtype=np.float32)}, {"o": Undefined((1,), np.float32)}, threads=1)
    assert made["o"].tolist() == [5]


# ---- numbers


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
    made = run(
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


# ---- where a thread is


def test_positions_at_a_ragged_end() -> None:
    text = """[[kernel]] void k(device uint* o, uint3 p [[thread_position_in_grid]],
        ushort3 q [[thread_position_in_threadgroup]], uint3 g [[threadgroup_position_in_grid]],
        uint2 size [[threads_per_threadgroup]], uint3 grid [[threads_per_grid]],
        uint i [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
        uint simdgroup [[simdgroup_index_in_threadgroup]], uint quad [[quadgroup_index_in_threadgroup]],
        uint simdgroups [[simdgroups_per_threadgroup]], uint3 full [[dispatch_threads_per_threadgroup]]) {
      device uint* at = o + 10 * ((p.z * grid.y + p.y) * grid.x + p.x);
      at[0] = q.x + 100 * q.y; at[1] = g.x + 100 * g.y; at[2] = size.x + 100 * size.y; at[3] = i;
      at[4] = lane; at[5] = simdgroup; at[6] = quad; at[7] = simdgroups; at[8] = full.x; at[9] = grid.x;
    }"""
    kernel = compile_kernel(HEAD + text, "k")
    grid, group = (19, 7, 2), (8, 4, 2)
    for order in (0, 1):
        o = kernel.run(
            {}, {"o": Undefined((2, 7, 19, 10), np.uint32)}, grid, group, order=order
        ).outputs["o"]
        z, y, x = np.indices((2, 7, 19))
        width, height = np.minimum(8, 19 - x // 8 * 8), np.minimum(4, 7 - y // 4 * 4)
        index = ((z * height) + y % 4) * width + x % 8
        expected = [
            x % 8 + 100 * (y % 4), x // 8 + 100 * (y // 4), width + 100 * height, index, index % 32, index // 32,
            index // 4, -(-width * height * 2 // 32), np.full_like(x, 8), np.full_like(x, 19),
        ]  # fmt: skip
        np.testing.assert_array_equal(o, np.stack(expected, -1))
