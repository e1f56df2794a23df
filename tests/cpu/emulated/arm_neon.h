// NEON in plain C++, from SIMDe and, where its release has none, from here: found where the compiler has no such header.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/arm/neon.h>

#include <cmath>

inline int32x4_t vcvtnq_s32_f32(float32x4_t x) {
  float from[4];
  int32_t to[4];
  vst1q_f32(from, x);
  for (int i = 0; i < 4; i++) to[i] = static_cast<int32_t>(std::nearbyint(from[i]));
  return vld1q_s32(to);
}
inline float32x4_t vdivq_f32(float32x4_t a, float32x4_t b) {
  float x[4], y[4];
  vst1q_f32(x, a), vst1q_f32(y, b);
  for (int i = 0; i < 4; i++) x[i] /= y[i];
  return vld1q_f32(x);
}
