// float4(a, b), vec<T, N>(...), as_type<T>(x), static_cast where clang has none. clang has no constructor syntax for
// ext vectors: the named types are macros, vec<T, N>(...) is rewritten to emu_vector before compiling.
#pragma once

// bfloat and half do not convert into each other in clang; Metal goes through float.
template <class T, class F>
EMU_FUNC constexpr T emu_cast(F f) {
  if constexpr ((__is_same(T, bfloat) && __is_same(F, half)) || (__is_same(T, half) && __is_same(F, bfloat)))
    return static_cast<T>(static_cast<float>(f));
  else
    return static_cast<T>(f);
}

template <class V, class A>
EMU_FUNC void emu_append(thread V& v, thread int& next, A a) {
  using E = metal::emu_element<V>;
  if constexpr (metal::emu_size<A> == 1)
    v[next++] = emu_cast<E>(a);
  else
    for (int i = 0; i < metal::emu_size<A>; i++) v[next++] = emu_cast<E>(a[i]);
}

template <class V>
EMU_FUNC constexpr V emu_vector() {
  return V{};
}

template <class V, class A>
EMU_FUNC constexpr V emu_vector(A a) {
  using E = metal::emu_element<V>;
  if constexpr (metal::emu_size<V> == 1) {
    return emu_cast<V>(a);
  } else if constexpr (metal::emu_size<A> == 1) {
    if constexpr (__is_convertible(A, V) && !metal::is_arithmetic_v<A>)
      return static_cast<V>(a);  // a packed vector
    else
      return (V)(emu_cast<E>(a));
  } else {
    static_assert(metal::emu_size<A> == metal::emu_size<V>, "vector conversion changes the number of components");
    V v;
    for (int i = 0; i < metal::emu_size<V>; i++) v[i] = emu_cast<E>(a[i]);
    return v;
  }
}

template <class V, class A, class B, class... C>
EMU_FUNC V emu_vector(A a, B b, C... c) {
  static_assert(metal::emu_size<A> + metal::emu_size<B> + (0 + ... + metal::emu_size<C>) == metal::emu_size<V>,
                "wrong number of vector components");
  V v;
  int next = 0;
  emu_append(v, next, a);
  emu_append(v, next, b);
  (emu_append(v, next, c), ...);
  return v;
}

// `pointer += object` where the object converts to an integer: clang takes no pointer that lies in `thread` memory.
#define EMU_MOVE_POINTER(op)                                                                                   \
  template <class T, class I, class = metal::enable_if_t<__is_class(I) && __is_convertible(I, long)>>          \
  EMU_FUNC T* thread& operator op##=(T* thread& pointer, I by) {                                               \
    return pointer = pointer op static_cast<long>(by);                                                         \
  }
EMU_MOVE_POINTER(+)
EMU_MOVE_POINTER(-)
#undef EMU_MOVE_POINTER

template <class T, class F>
EMU_FUNC constexpr T as_type(F f) {
  static_assert(sizeof(T) == sizeof(F), "as_type changes the size");
  return __builtin_bit_cast(T, f);
}

namespace metal {
using ::as_type;
using ::emu_cast;
using ::emu_vector;

// An attribute as the kernel declares it: uint, ushort, uint2, uint3, ushort3 ...
template <class T>
EMU_FUNC T emu_read_attribute(const thread uint* components) {
  if constexpr (emu_size<T> == 1) {
    return (T)components[0];
  } else {
    T v;
    for (int i = 0; i < emu_size<T>; i++) v[i] = (emu_element<T>)components[i];
    return v;
  }
}
}  // namespace metal

template <class T>
EMU_FUNC T emu_attribute(const thread uint* components) {
  return metal::emu_read_attribute<T>(components);
}

#define bool2(...) emu_vector<bool2>(__VA_ARGS__)
#define bool3(...) emu_vector<bool3>(__VA_ARGS__)
#define bool4(...) emu_vector<bool4>(__VA_ARGS__)
#define char2(...) emu_vector<char2>(__VA_ARGS__)
#define char3(...) emu_vector<char3>(__VA_ARGS__)
#define char4(...) emu_vector<char4>(__VA_ARGS__)
#define uchar2(...) emu_vector<uchar2>(__VA_ARGS__)
#define uchar3(...) emu_vector<uchar3>(__VA_ARGS__)
#define uchar4(...) emu_vector<uchar4>(__VA_ARGS__)
#define short2(...) emu_vector<short2>(__VA_ARGS__)
#define short3(...) emu_vector<short3>(__VA_ARGS__)
#define short4(...) emu_vector<short4>(__VA_ARGS__)
#define ushort2(...) emu_vector<ushort2>(__VA_ARGS__)
#define ushort3(...) emu_vector<ushort3>(__VA_ARGS__)
#define ushort4(...) emu_vector<ushort4>(__VA_ARGS__)
#define int2(...) emu_vector<int2>(__VA_ARGS__)
#define int3(...) emu_vector<int3>(__VA_ARGS__)
#define int4(...) emu_vector<int4>(__VA_ARGS__)
#define uint2(...) emu_vector<uint2>(__VA_ARGS__)
#define uint3(...) emu_vector<uint3>(__VA_ARGS__)
#define uint4(...) emu_vector<uint4>(__VA_ARGS__)
#define long2(...) emu_vector<long2>(__VA_ARGS__)
#define long3(...) emu_vector<long3>(__VA_ARGS__)
#define long4(...) emu_vector<long4>(__VA_ARGS__)
#define ulong2(...) emu_vector<ulong2>(__VA_ARGS__)
#define ulong3(...) emu_vector<ulong3>(__VA_ARGS__)
#define ulong4(...) emu_vector<ulong4>(__VA_ARGS__)
#define half2(...) emu_vector<half2>(__VA_ARGS__)
#define half3(...) emu_vector<half3>(__VA_ARGS__)
#define half4(...) emu_vector<half4>(__VA_ARGS__)
#define bfloat2(...) emu_vector<bfloat2>(__VA_ARGS__)
#define bfloat3(...) emu_vector<bfloat3>(__VA_ARGS__)
#define bfloat4(...) emu_vector<bfloat4>(__VA_ARGS__)
#define float2(...) emu_vector<float2>(__VA_ARGS__)
#define float3(...) emu_vector<float3>(__VA_ARGS__)
#define float4(...) emu_vector<float4>(__VA_ARGS__)
