// vec<T, N> and its names. clang's ext vectors have Metal's swizzles, operators and layout. One thing differs:
// comparing two of them gives an integer vector of 0 and -1, not a vector of bool. It converts to one
// (bool_vectors.h), so `bool4 m = a < b`, `select(a, b, a < b)`, `any(a < b)` mean what they mean in Metal; arithmetic
// on the comparison itself does not, and the lint refuses it.
#pragma once

namespace metal {

template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));

// Element type and number of elements of a vector; a scalar has one.
template <class V>
struct emu_vector_traits {
  using element = V;
  static constexpr constant int size = 1;
};
template <class T, int N>
struct emu_vector_traits<T __attribute__((ext_vector_type(N)))> {
  using element = T;
  static constexpr constant int size = N;
};
template <class V>
using emu_element = typename emu_vector_traits<V>::element;
template <class V>
constexpr constant int emu_size = emu_vector_traits<V>::size;

template <class T>
struct is_vector : bool_constant<(emu_size<remove_cv_t<T>> > 1)> {};
template <class T>
constexpr constant bool is_vector_v = is_vector<T>::value;
template <class T>
struct make_scalar {
  using type = emu_element<T>;
};
template <class T>
using make_scalar_t = typename make_scalar<T>::type;

}  // namespace metal

#define EMU_NAME_VECTORS(T)                        \
  typedef T T##2 __attribute__((ext_vector_type(2))); \
  typedef T T##3 __attribute__((ext_vector_type(3))); \
  typedef T T##4 __attribute__((ext_vector_type(4))); \
  namespace metal {                                \
  using ::T##2;                                    \
  using ::T##3;                                    \
  using ::T##4;                                    \
  }
EMU_NAME_VECTORS(char)
EMU_NAME_VECTORS(uchar)
EMU_NAME_VECTORS(short)
EMU_NAME_VECTORS(ushort)
EMU_NAME_VECTORS(int)
EMU_NAME_VECTORS(uint)
EMU_NAME_VECTORS(long)
EMU_NAME_VECTORS(ulong)
EMU_NAME_VECTORS(half)
EMU_NAME_VECTORS(float)
EMU_NAME_VECTORS(bfloat)
#undef EMU_NAME_VECTORS
