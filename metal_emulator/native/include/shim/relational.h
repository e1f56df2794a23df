// <metal_relational>: tests of floats, select.
#pragma once

namespace metal {

#define EMU_TEST(name, expression)                                 \
  EMU_FUNC bool name(float x) { return expression; }               \
  EMU_FUNC bool name(half h) {                                     \
    float x = h;                                                   \
    return expression;                                             \
  }                                                                \
  EMU_FUNC bool name(bfloat h) {                                   \
    float x = h;                                                   \
    return expression;                                             \
  }                                                                \
  template <class T, int N>                                        \
  EMU_FUNC bool_vector<N> name(vec<T, N> v) {                      \
    bool_vector<N> r;                                              \
    for (int i = 0; i < N; i++) r[i] = name(T(v[i]));              \
    return r;                                                      \
  }
EMU_TEST(isnan, __builtin_isnan(x))
EMU_TEST(isinf, __builtin_isinf(x))
EMU_TEST(isfinite, __builtin_isfinite(x))
EMU_TEST(signbit, __builtin_bit_cast(uint, x) >> 31 != 0)
#undef EMU_TEST
EMU_FUNC bool isnormal(float x) { return __builtin_isnormal(x); }
EMU_FUNC bool isordered(float x, float y) { return x == x && y == y; }
EMU_FUNC bool isunordered(float x, float y) { return x != x || y != y; }

// b where c is true. For vectors c is a bool vector, or the comparison of two vectors.
template <class T>
EMU_FUNC T select(T a, emu_same<T> b, bool c) {
  return c ? b : a;
}
template <class T, int N>
EMU_FUNC vec<T, N> select(vec<T, N> a, emu_same<vec<T, N>> b, bool_vector<N> c) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r[i] = c[i] ? b[i] : a[i];
  return r;
}
template <class T, int N, class C, class = enable_if_t<is_integral_v<C>>>
EMU_FUNC vec<T, N> select(vec<T, N> a, emu_same<vec<T, N>> b, vec<C, N> c) {
  return select(a, b, bool_vector<N>(c));
}

EMU_FUNC bool any(bool x) { return x; }
EMU_FUNC bool all(bool x) { return x; }

}  // namespace metal
