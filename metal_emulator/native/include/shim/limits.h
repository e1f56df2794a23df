// <metal_limits>.
#pragma once

namespace metal {

template <class T>
struct numeric_limits;

#define EMU_INTEGER_LIMITS(T, low, high, bits)                              \
  template <>                                                               \
  struct numeric_limits<T> {                                                \
    static constexpr constant bool is_specialized = true, is_integer = true; \
    static constexpr constant bool is_signed = (low) < 0;               \
    static constexpr constant bool has_infinity = false;                    \
    static constexpr constant int digits = bits;                            \
    static constexpr T min() { return low; }                                \
    static constexpr T max() { return high; }                               \
    static constexpr T lowest() { return low; }                             \
    static constexpr T epsilon() { return 0; }                           \
    static constexpr T infinity() { return 0; }                          \
    static constexpr T quiet_NaN() { return 0; }                         \
  };
EMU_INTEGER_LIMITS(bool, false, true, 1)
EMU_INTEGER_LIMITS(char, -128, 127, 7)
EMU_INTEGER_LIMITS(signed char, -128, 127, 7)
EMU_INTEGER_LIMITS(uchar, 0, 255, 8)
EMU_INTEGER_LIMITS(short, -32768, 32767, 15)
EMU_INTEGER_LIMITS(ushort, 0, 65535, 16)
EMU_INTEGER_LIMITS(int, INT_MIN, INT_MAX, 31)
EMU_INTEGER_LIMITS(uint, 0, UINT_MAX, 32)
EMU_INTEGER_LIMITS(long, LONG_MIN, LONG_MAX, 63)
EMU_INTEGER_LIMITS(ulong, 0, ULONG_MAX, 64)
#undef EMU_INTEGER_LIMITS

#define EMU_FLOAT_LIMITS(T, smallest, largest, unit, bits)                     \
  template <>                                                                  \
  struct numeric_limits<T> {                                                   \
    static constexpr constant bool is_specialized = true, is_integer = false;  \
    static constexpr constant bool is_signed = true, has_infinity = true;      \
    static constexpr constant int digits = bits;                               \
    static constexpr T min() { return T(smallest); }                           \
    static constexpr T max() { return T(largest); }                            \
    static constexpr T lowest() { return T(-largest); }                        \
    static constexpr T epsilon() { return T(unit); }                           \
    static constexpr T infinity() { return T(__builtin_inff()); }              \
    static constexpr T quiet_NaN() { return T(__builtin_nanf("")); }           \
  };
EMU_FLOAT_LIMITS(float, FLT_MIN, FLT_MAX, FLT_EPSILON, 24)
EMU_FLOAT_LIMITS(half, 6.103515625e-05f, 65504.0f, 9.765625e-04f, 11)
EMU_FLOAT_LIMITS(bfloat, FLT_MIN, 3.38953139e38f, 7.8125e-03f, 8)
#undef EMU_FLOAT_LIMITS

}  // namespace metal
