// Plain C++: four floats in an array, for machines without a vector set of their own here, and for the sanitizers.
#pragma once

#include <algorithm>

#include "half.h"

namespace mlx_edge::MLX_EDGE_ISA {

constexpr int WIDTH = 4;  // floats in a vector
struct Floats {
  float at[WIDTH];
};

template <class F>
inline Floats each(F f) {
  Floats y;
  for (int i = 0; i < WIDTH; i++) y.at[i] = f(i);
  return y;
}
inline Floats splat(float x) {
  return each([&](int) { return x; });
}
inline Floats zeros() { return splat(0.0f); }
inline Floats load(const float* p) {
  return each([&](int i) { return p[i]; });
}
inline Floats load_f16(const uint16_t* p) {
  return each([&](int i) { return f16_to_float(p[i]); });
}
inline Floats load_bf16(const uint16_t* p) {
  return each([&](int i) { return bf16_to_float(p[i]); });
}
// WIDTH bytes as numbers.
inline Floats load_u8(const uint8_t* p) {
  return each([&](int i) { return static_cast<float>(p[i]); });
}
// WIDTH powers of two as mxfp4 has them: 2^(byte - 127).
inline Floats load_e8m0(const uint8_t* p) {
  return each([&](int i) { return bits_to_float(std::max<uint32_t>(static_cast<uint32_t>(p[i]) << 23, 0x400000)); });
}
inline void store(float* p, Floats x) { std::copy(x.at, x.at + WIDTH, p); }
// Rounds to the nearest half; what is too large becomes the largest half, never infinity.
inline void store_f16(uint16_t* p, Floats x) {
  for (int i = 0; i < WIDTH; i++) p[i] = float_to_f16(x.at[i] > 65504.0f ? 65504.0f : x.at[i] < -65504.0f ? -65504.0f : x.at[i]);
}
// WIDTH whole numbers from -128 to 127 as bytes.
inline void store_int8(int8_t* p, Floats x) {
  for (int i = 0; i < WIDTH; i++) p[i] = static_cast<int8_t>(x.at[i]);
}
inline Floats add(Floats a, Floats b) {
  return each([&](int i) { return a.at[i] + b.at[i]; });
}
inline Floats sub(Floats a, Floats b) {
  return each([&](int i) { return a.at[i] - b.at[i]; });
}
inline Floats mul(Floats a, Floats b) {
  return each([&](int i) { return a.at[i] * b.at[i]; });
}
inline Floats div(Floats a, Floats b) {
  return each([&](int i) { return a.at[i] / b.at[i]; });
}
inline Floats fma(Floats a, Floats b, Floats c) {
  return each([&](int i) { return a.at[i] * b.at[i] + c.at[i]; });
}
inline Floats max(Floats a, Floats b) {
  return each([&](int i) { return a.at[i] > b.at[i] ? a.at[i] : b.at[i]; });
}
inline Floats min(Floats a, Floats b) {
  return each([&](int i) { return a.at[i] < b.at[i] ? a.at[i] : b.at[i]; });
}
inline Floats abs(Floats a) {
  return each([&](int i) { return std::fabs(a.at[i]); });
}
inline Floats round(Floats a) {
  return each([&](int i) { return std::nearbyint(a.at[i]); });
}
inline float sum_of(Floats a) { return (a.at[0] + a.at[2]) + (a.at[1] + a.at[3]); }
inline float max_of(Floats a) { return std::max(std::max(a.at[0], a.at[2]), std::max(a.at[1], a.at[3])); }
// p * 2^n for whole n.
inline Floats scale_by_power(Floats p, Floats n) {
  return each([&](int i) { return std::ldexp(p.at[i], static_cast<int>(n.at[i])); });
}
// The larger one; b where a is not a number.
inline Floats max_number(Floats a, Floats b) {
  return each([&](int i) { return a.at[i] > b.at[i] ? a.at[i] : b.at[i]; });
}
// The halves of bytes as floats, those that begin at bit `shift`, 0 or 4.
inline Floats load_u4(const uint8_t* p, int shift) {
  return each([&](int i) { return static_cast<float>((p[i] >> shift) & 15); });
}

}  // namespace mlx_edge::MLX_EDGE_ISA
