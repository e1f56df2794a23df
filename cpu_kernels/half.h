// float16 and bfloat16 as numbers, one at a time, for packing and for the scalar kernels. No instruction set needed.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "matrix.h"

namespace mlx_edge {

inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float bf16_to_float(uint16_t h) { return bits_to_float(static_cast<uint32_t>(h) << 16); }

inline float f16_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t exponent = (h >> 10) & 31, mantissa = h & 1023;
  if (exponent == 0) {
    const float small = std::ldexp(static_cast<float>(mantissa), -24);
    return sign ? -small : small;
  }
  const uint32_t wide = exponent == 31 ? 255 : exponent + 112;
  return bits_to_float(sign | wide << 23 | mantissa << 13);
}

// Rounds to nearest, ties to even.
inline uint16_t float_to_f16(float x) {
  const uint32_t bits = float_to_bits(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  if (magnitude < 0x38800000)  // below the normal halves: count in units of 2^-24
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(std::ldexp(std::fabs(x), 24))));
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13));
}

// Rounds to nearest, ties to even.
inline uint16_t float_to_bf16(float x) {
  const uint32_t bits = float_to_bits(x);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// x as the type holds it.
inline float round_to(Float type, float x) {
  if (type == Float::f32) return x;
  return type == Float::f16 ? f16_to_float(float_to_f16(x)) : bf16_to_float(float_to_bf16(x));
}

}  // namespace mlx_edge
