// <metal_geometric>.
#pragma once

namespace metal {

template <class T, int N>
EMU_FUNC T dot(vec<T, N> a, vec<T, N> b) {
  T sum = T(a[0] * b[0]);
  for (int i = 1; i < N; i++) sum = T(sum + T(a[i] * b[i]));
  return sum;
}
template <class T, int N>
EMU_FUNC T length_squared(vec<T, N> v) {
  return dot(v, v);
}
template <class T, int N>
EMU_FUNC T length(vec<T, N> v) {
  return sqrt(dot(v, v));
}
template <class T, int N>
EMU_FUNC T distance_squared(vec<T, N> a, vec<T, N> b) {
  return length_squared(a - b);
}
template <class T, int N>
EMU_FUNC T distance(vec<T, N> a, vec<T, N> b) {
  return length(a - b);
}
template <class T, int N>
EMU_FUNC vec<T, N> normalize(vec<T, N> v) {
  return v * rsqrt(dot(v, v));
}
template <class T>
EMU_FUNC vec<T, 3> cross(vec<T, 3> a, vec<T, 3> b) {
  return a.yzx * b.zxy - a.zxy * b.yzx;
}

}  // namespace metal
