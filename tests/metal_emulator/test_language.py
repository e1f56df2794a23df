"""Metal's language in the emulator: vectors, bool vectors, packed vectors, arrays, where a thread is."""

import numpy as np
import pytest

from metal_emulator import MetalError, Undefined, compile_kernel
from tests.metal_emulator.small_kernels import HEAD, MODES, Array, run_text

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
    made = run_text(
        text, {}, {"o": np.zeros(10, np.float32), "i": np.zeros(8, np.int32)}, threads=1
    )
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
    made = run_text(text, {"x": x}, outputs, threads=1, mode=mode)
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
    made = run_text(text, {"x": x, "s": s}, outputs, threads=4)
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
    made = run_text(text, {"x": x}, outputs, threads=2)
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
    made = run_text(
        text, {"x": np.arange(4, dtype=np.float32)}, {"o": Undefined((1,), np.float32)}, threads=1
    )
    assert made["o"].tolist() == [5]


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
