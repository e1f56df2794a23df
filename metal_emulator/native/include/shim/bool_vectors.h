// bool2, bool3, bool4: OpenCL has none. Classes, so that the integer vector which a comparison gives converts to them.
#pragma once

namespace metal {

template <int N>
struct emu_bools;
template <>
struct emu_bools<2> {
  bool x, y;
};
template <>
struct emu_bools<3> {
  bool x, y, z;
};
template <>
struct emu_bools<4> {
  bool x, y, z, w;
};

template <int N>
struct bool_vector : emu_bools<N> {
  EMU_FUNC bool_vector() : emu_bools<N>{} {}
  EMU_FUNC bool_vector(bool all) {
    for (int i = 0; i < N; i++) (*this)[i] = all;
  }
  template <class T>
  EMU_FUNC bool_vector(vec<T, N> v) {
    for (int i = 0; i < N; i++) (*this)[i] = v[i] != T(0);
  }
  EMU_FUNC bool& operator[](int i) { return (&this->x)[i]; }
  EMU_FUNC bool operator[](int i) const { return (&this->x)[i]; }
  EMU_FUNC bool operator[](int i) const constant { return (&this->x)[i]; }
};

template <int N>
struct emu_vector_traits<bool_vector<N>> {
  using element = bool;
  static constexpr constant int size = N;
};

// Non-template friends would be needed for conversions on both sides; a mask of a comparison is converted on the
// right.
#define EMU_BOOL_OPERATOR(op)                                                             \
  template <int N>                                                                        \
  EMU_FUNC bool_vector<N> operator op(bool_vector<N> a, bool_vector<N> b) {               \
    bool_vector<N> r;                                                                     \
    for (int i = 0; i < N; i++) r[i] = bool(a[i] op b[i]);                                \
    return r;                                                                             \
  }                                                                                       \
  template <class T, int N>                                                               \
  EMU_FUNC bool_vector<N> operator op(bool_vector<N> a, vec<T, N> b) {                    \
    return a op bool_vector<N>(b);                                                        \
  }                                                                                       \
  template <class T, int N>                                                               \
  EMU_FUNC bool_vector<N> operator op(vec<T, N> a, bool_vector<N> b) {                    \
    return bool_vector<N>(a) op b;                                                        \
  }
EMU_BOOL_OPERATOR(&)
EMU_BOOL_OPERATOR(|)
EMU_BOOL_OPERATOR(^)
EMU_BOOL_OPERATOR(&&)
EMU_BOOL_OPERATOR(||)
EMU_BOOL_OPERATOR(==)
EMU_BOOL_OPERATOR(!=)
#undef EMU_BOOL_OPERATOR

template <int N>
EMU_FUNC bool_vector<N> operator!(bool_vector<N> a) {
  bool_vector<N> r;
  for (int i = 0; i < N; i++) r[i] = !a[i];
  return r;
}

template <int N>
EMU_FUNC bool any(bool_vector<N> v) {
  bool r = false;
  for (int i = 0; i < N; i++) r = r || v[i];
  return r;
}
template <int N>
EMU_FUNC bool all(bool_vector<N> v) {
  bool r = true;
  for (int i = 0; i < N; i++) r = r && v[i];
  return r;
}
// Of the integer vector that a comparison gives.
template <class T, int N, class = enable_if_t<is_integral<T>::value>>
EMU_FUNC bool any(vec<T, N> v) {
  return any(bool_vector<N>(v));
}
template <class T, int N, class = enable_if_t<is_integral<T>::value>>
EMU_FUNC bool all(vec<T, N> v) {
  return all(bool_vector<N>(v));
}

using bool2 = bool_vector<2>;
using bool3 = bool_vector<3>;
using bool4 = bool_vector<4>;

}  // namespace metal

using metal::bool2;
using metal::bool3;
using metal::bool4;
