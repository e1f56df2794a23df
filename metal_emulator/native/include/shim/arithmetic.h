// Functions of integers, and those that integers and floats share. One overload a type, not one template: mixed
// arguments are ambiguous, as they are in Metal.
#pragma once

namespace metal {

// In a parameter: takes what the other parameters have made of T, and what converts to it.
template <class T>
struct emu_identity {
  using type = T;
};
template <class T>
using emu_same = typename emu_identity<T>::type;

// A function of scalars, applied to the elements of vectors.
#define EMU_ELEMENTWISE1(name)                           \
  template <class T, int N>                              \
  EMU_FUNC vec<T, N> name(vec<T, N> a) {                 \
    vec<T, N> r;                                         \
    for (int i = 0; i < N; i++) r[i] = name(T(a[i]));    \
    return r;                                            \
  }
#define EMU_ELEMENTWISE2(name)                                     \
  template <class T, int N>                                        \
  EMU_FUNC vec<T, N> name(vec<T, N> a, emu_same<vec<T, N>> b) {    \
    vec<T, N> r;                                                   \
    for (int i = 0; i < N; i++) r[i] = name(T(a[i]), T(b[i]));     \
    return r;                                                      \
  }
#define EMU_ELEMENTWISE3(name)                                                                \
  template <class T, int N>                                                                   \
  EMU_FUNC vec<T, N> name(vec<T, N> a, emu_same<vec<T, N>> b, emu_same<vec<T, N>> c) {        \
    vec<T, N> r;                                                                              \
    for (int i = 0; i < N; i++) r[i] = name(T(a[i]), T(b[i]), T(c[i]));                       \
    return r;                                                                                 \
  }

// A NaN loses against a number, as in IEEE 754-2008 minNum.
template <class T>
EMU_FUNC constexpr T emu_max(T a, T b) {
  if constexpr (is_floating_point_v<T>)
    return (T)__builtin_fmaxf((float)a, (float)b);
  else
    return a < b ? b : a;
}
template <class T>
EMU_FUNC constexpr T emu_min(T a, T b) {
  if constexpr (is_floating_point_v<T>)
    return (T)__builtin_fminf((float)a, (float)b);
  else
    return b < a ? b : a;
}

#define EMU_ORDERED(T)                                                                      \
  EMU_FUNC constexpr T max(T a, T b) { return emu_max<T>(a, b); }                           \
  EMU_FUNC constexpr T min(T a, T b) { return emu_min<T>(a, b); }                           \
  EMU_FUNC constexpr T max3(T a, T b, T c) { return max(max(a, b), c); }                    \
  EMU_FUNC constexpr T min3(T a, T b, T c) { return min(min(a, b), c); }                    \
  EMU_FUNC constexpr T median3(T a, T b, T c) { return max(min(a, b), min(max(a, b), c)); } \
  EMU_FUNC constexpr T clamp(T x, T low, T high) { return min(max(x, low), high); }
EMU_ORDERED(float)
EMU_ORDERED(half)
EMU_ORDERED(bfloat)
EMU_ORDERED(char)
EMU_ORDERED(signed char)
EMU_ORDERED(uchar)
EMU_ORDERED(short)
EMU_ORDERED(ushort)
EMU_ORDERED(int)
EMU_ORDERED(uint)
EMU_ORDERED(long)
EMU_ORDERED(ulong)
#undef EMU_ORDERED
EMU_ELEMENTWISE2(max)
EMU_ELEMENTWISE2(min)
EMU_ELEMENTWISE3(max3)
EMU_ELEMENTWISE3(min3)
EMU_ELEMENTWISE3(median3)
EMU_ELEMENTWISE3(clamp)

#define EMU_ABS(T) \
  EMU_FUNC constexpr T abs(T x) { return x < 0 ? (T)-x : x; }
EMU_ABS(char)
EMU_ABS(signed char)
EMU_ABS(short)
EMU_ABS(int)
EMU_ABS(long)
#undef EMU_ABS
#define EMU_ABS(T) \
  EMU_FUNC constexpr T abs(T x) { return x; }
EMU_ABS(uchar)
EMU_ABS(ushort)
EMU_ABS(uint)
EMU_ABS(ulong)
#undef EMU_ABS
EMU_FUNC constexpr float abs(float x) { return __builtin_fabsf(x); }
EMU_FUNC constexpr half abs(half x) { return (half)__builtin_fabsf((float)x); }
EMU_FUNC constexpr bfloat abs(bfloat x) { return (bfloat)__builtin_fabsf((float)x); }
EMU_ELEMENTWISE1(abs)

#define EMU_INTEGER(T)                                                                                      \
  EMU_FUNC T popcount(T x) { return (T)__builtin_popcountg(make_unsigned_t<T>(x)); }                        \
  EMU_FUNC T clz(T x) { return (T)__builtin_clzg(make_unsigned_t<T>(x), int(sizeof(T) * 8)); }              \
  EMU_FUNC T ctz(T x) { return (T)__builtin_ctzg(make_unsigned_t<T>(x), int(sizeof(T) * 8)); }              \
  EMU_FUNC T reverse_bits(T x) {                                                                            \
    T r = 0;                                                                                                \
    for (uint i = 0; i < sizeof(T) * 8; i++) r |= T(T(x >> i & T(1)) << (sizeof(T) * 8 - 1 - i));           \
    return r;                                                                                               \
  }                                                                                                         \
  EMU_FUNC T rotate(T x, T by) {                                                                            \
    using U = make_unsigned_t<T>;                                                                           \
    uint n = uint(by) % (sizeof(T) * 8);                                                                    \
    return n ? T(U(U(x) << n) | U(U(x) >> (sizeof(T) * 8 - n))) : x;                                        \
  }                                                                                                         \
  EMU_FUNC T extract_bits(T x, uint offset, uint bits) {                                                    \
    if (bits == 0) return 0;                                                                                \
    uint above = sizeof(T) * 8 - offset - bits;                                                             \
    return T(T(make_unsigned_t<T>(x) << above) >> (sizeof(T) * 8 - bits));                                  \
  }                                                                                                         \
  EMU_FUNC T insert_bits(T base, T insert, uint offset, uint bits) {                                        \
    using U = make_unsigned_t<T>;                                                                           \
    if (bits == 0) return base;                                                                             \
    U mask = U(U(U(~U(0)) >> (sizeof(T) * 8 - bits)) << offset);                                            \
    return T((U(base) & ~mask) | (U(U(insert) << offset) & mask));                                          \
  }                                                                                                         \
  EMU_FUNC make_unsigned_t<T> absdiff(T a, T b) {                                                           \
    using U = make_unsigned_t<T>;                                                                           \
    return a < b ? U(U(b) - U(a)) : U(U(a) - U(b));                                                         \
  }                                                                                                         \
  EMU_FUNC T addsat(T a, T b) {                                                                             \
    T r;                                                                                                    \
    if (!__builtin_add_overflow(a, b, (thread T*)&r)) return r;                                             \
    return a < T(0) ? numeric_limits<T>::min() : numeric_limits<T>::max();                                  \
  }                                                                                                         \
  EMU_FUNC T subsat(T a, T b) {                                                                             \
    T r;                                                                                                    \
    if (!__builtin_sub_overflow(a, b, (thread T*)&r)) return r;                                             \
    return a < b ? numeric_limits<T>::min() : numeric_limits<T>::max();                                     \
  }                                                                                                         \
  EMU_FUNC T hadd(T a, T b) { return T((a & b) + T((a ^ b) >> 1)); }                                        \
  EMU_FUNC T rhadd(T a, T b) { return T((a | b) - T((a ^ b) >> 1)); }
EMU_INTEGER(char)
EMU_INTEGER(uchar)
EMU_INTEGER(short)
EMU_INTEGER(ushort)
EMU_INTEGER(int)
EMU_INTEGER(uint)
EMU_INTEGER(long)
EMU_INTEGER(ulong)
#undef EMU_INTEGER
EMU_ELEMENTWISE1(popcount)
EMU_ELEMENTWISE1(clz)
EMU_ELEMENTWISE1(ctz)
EMU_ELEMENTWISE1(reverse_bits)
EMU_ELEMENTWISE2(rotate)
EMU_ELEMENTWISE2(addsat)
EMU_ELEMENTWISE2(subsat)
template <class T, int N>
EMU_FUNC vec<T, N> extract_bits(vec<T, N> x, uint offset, uint bits) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r[i] = extract_bits(T(x[i]), offset, bits);
  return r;
}

#define EMU_WIDE_PRODUCT(T, W)                                                       \
  EMU_FUNC T mulhi(T a, T b) { return T((W)a * (W)b >> (sizeof(T) * 8)); }           \
  EMU_FUNC T madhi(T a, T b, T c) { return T(mulhi(a, b) + c); }
EMU_WIDE_PRODUCT(char, int)
EMU_WIDE_PRODUCT(uchar, uint)
EMU_WIDE_PRODUCT(short, int)
EMU_WIDE_PRODUCT(ushort, uint)
EMU_WIDE_PRODUCT(int, long)
EMU_WIDE_PRODUCT(uint, ulong)
EMU_WIDE_PRODUCT(long, __int128)
EMU_WIDE_PRODUCT(ulong, unsigned __int128)
#undef EMU_WIDE_PRODUCT
EMU_ELEMENTWISE2(mulhi)

// 24-bit operands: what lies above is not looked at by the hardware, and undefined by the language.
EMU_FUNC int mul24(int a, int b) { return a * b; }
EMU_FUNC uint mul24(uint a, uint b) { return (a & 0xFFFFFFu) * (b & 0xFFFFFFu); }
EMU_FUNC int mad24(int a, int b, int c) { return a * b + c; }
EMU_FUNC uint mad24(uint a, uint b, uint c) { return mul24(a, b) + c; }

}  // namespace metal
