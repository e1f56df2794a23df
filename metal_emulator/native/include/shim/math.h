// <metal_math>. metal::precise:: is the C library's, metal::fast:: the same with up to 2 ulp of error added, so that a
// tolerance which the hardware's fast functions would not meet is seen here. An unqualified name is precise, as under
// MLX's default math mode; with EMU_FAST_MATH it is fast. half and bfloat are calculated in float and rounded once.
#pragma once

extern "C" {
float expf(float);
float exp2f(float);
float exp10f(float);
float logf(float);
float log2f(float);
float log10f(float);
float sinf(float);
float cosf(float);
float tanf(float);
float asinf(float);
float acosf(float);
float atanf(float);
float sinhf(float);
float coshf(float);
float tanhf(float);
float asinhf(float);
float acoshf(float);
float atanhf(float);
float atan2f(float, float);
float powf(float, float);
float fmodf(float, float);
float ldexpf(float, int);
float nextafterf(float, float);
int ilogbf(float);
}

namespace metal {

// The same argument gives the same error, different arguments different ones, in -2 to 2 ulp.
EMU_FUNC float emu_perturb(float x) {
  uint bits = __builtin_bit_cast(uint, x), exponent = bits >> 23 & 255;
  uint ulps = (bits * 2654435761u >> 16) * 5 >> 16;  // 0 to 4
  return exponent - 2 < 252 ? __builtin_bit_cast(float, bits + ulps - 2) : x;
}

#define EMU_UNARY(name, expression)                                    \
  EMU_FUNC float name(float x) { return expression; }                  \
  EMU_FUNC half name(half h) {                                         \
    float x = h;                                                       \
    return (half)(expression);                                         \
  }                                                                    \
  EMU_FUNC bfloat name(bfloat h) {                                     \
    float x = h;                                                       \
    return (bfloat)(expression);                                       \
  }                                                                    \
  EMU_ELEMENTWISE1(name)
#define EMU_BINARY(name, expression)                                   \
  EMU_FUNC float name(float x, float y) { return expression; }         \
  EMU_FUNC half name(half g, half h) {                                 \
    float x = g, y = h;                                                \
    return (half)(expression);                                         \
  }                                                                    \
  EMU_FUNC bfloat name(bfloat g, bfloat h) {                           \
    float x = g, y = h;                                                \
    return (bfloat)(expression);                                       \
  }                                                                    \
  EMU_ELEMENTWISE2(name)

#ifdef EMU_FAST_MATH
namespace precise {
#else
inline namespace precise {
#endif
#define EMU_RESULT(x) (x)
#include "transcendental.h"
#undef EMU_RESULT
}  // namespace precise

#ifdef EMU_FAST_MATH
inline namespace fast {
#else
namespace fast {
#endif
#define EMU_RESULT(x) emu_perturb(x)
#include "transcendental.h"
#undef EMU_RESULT
}  // namespace fast

EMU_UNARY(floor, __builtin_floorf(x))
EMU_UNARY(ceil, __builtin_ceilf(x))
EMU_UNARY(trunc, __builtin_truncf(x))
EMU_UNARY(rint, __builtin_rintf(x))
EMU_UNARY(round, __builtin_roundf(x))
EMU_UNARY(fabs, __builtin_fabsf(x))
EMU_UNARY(fract, __builtin_fminf(x - __builtin_floorf(x), 0x1.fffffep-1f))
EMU_UNARY(saturate, __builtin_fminf(__builtin_fmaxf(x, 0.0f), 1.0f))
EMU_UNARY(sign, x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x == 0.0f ? x : 0.0f)
EMU_BINARY(fmax, __builtin_fmaxf(x, y))
EMU_BINARY(fmin, __builtin_fminf(x, y))
EMU_BINARY(fdim, x > y ? x - y : x <= y ? 0.0f : x + y)
EMU_BINARY(copysign, __builtin_copysignf(x, y))
EMU_BINARY(step, y < x ? 0.0f : 1.0f)
EMU_FUNC float nextafter(float x, float y) { return nextafterf(x, y); }

#define EMU_TERNARY(T)                                                                                         \
  EMU_FUNC T fma(T a, T b, T c) { return (T)__builtin_fmaf((float)a, (float)b, (float)c); }                    \
  EMU_FUNC T mix(T a, T b, T t) { return T(a + T(T(b - a) * t)); }                                             \
  EMU_FUNC T smoothstep(T low, T high, T x) {                                                                  \
    T t = clamp(T(T(x - low) / T(high - low)), T(0), T(1));                                                    \
    return T(T(t * t) * T(T(3) - T(T(2) * t)));                                                                \
  }                                                                                                            \
  EMU_FUNC T fmax3(T a, T b, T c) { return max3(a, b, c); }                                                    \
  EMU_FUNC T fmin3(T a, T b, T c) { return min3(a, b, c); }                                                    \
  EMU_FUNC T fmedian3(T a, T b, T c) { return median3(a, b, c); }                                              \
  EMU_FUNC T ldexp(T x, int exponent) { return (T)ldexpf((float)x, exponent); }                                \
  EMU_FUNC int ilogb(T x) { return ilogbf((float)x); }                                                         \
  EMU_FUNC T modf(T x, thread T& whole) {                                                                      \
    whole = trunc(x);                                                                                          \
    return copysign(isinf_bits((float)x) ? T(0) : T(x - whole), x);                                            \
  }                                                                                                            \
  EMU_FUNC T frexp(T x, thread int& exponent) {                                                                \
    exponent = 0;                                                                                              \
    if (x == T(0) || isinf_bits((float)x) || x != x) return x;                                                 \
    exponent = ilogbf((float)x) + 1;                                                                           \
    return (T)ldexpf((float)x, -exponent);                                                                     \
  }
EMU_FUNC bool isinf_bits(float x) { return (__builtin_bit_cast(uint, x) & 0x7FFFFFFFu) == 0x7F800000u; }
EMU_TERNARY(float)
EMU_TERNARY(half)
EMU_TERNARY(bfloat)
#undef EMU_TERNARY
EMU_ELEMENTWISE3(fma)
EMU_ELEMENTWISE3(mix)
EMU_ELEMENTWISE3(smoothstep)

#undef EMU_UNARY
#undef EMU_BINARY

#define EMU_ALSO_THERE    \
  using metal::abs;       \
  using metal::ceil;      \
  using metal::clamp;     \
  using metal::fabs;      \
  using metal::floor;     \
  using metal::fma;       \
  using metal::fmax;      \
  using metal::fmin;      \
  using metal::fract;     \
  using metal::max;       \
  using metal::min;       \
  using metal::mix;       \
  using metal::rint;      \
  using metal::round;     \
  using metal::saturate;  \
  using metal::sign;      \
  using metal::trunc;
namespace precise {
EMU_ALSO_THERE
}
namespace fast {
EMU_ALSO_THERE
}
#undef EMU_ALSO_THERE

}  // namespace metal
