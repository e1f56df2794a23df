// NEON with dot products and half conversion (AArch64, ARMv8.2): four floats at a time.
#pragma once

#include <arm_neon.h>

namespace mlx_edge::MLX_EDGE_ISA {

using Floats = float32x4_t;
constexpr int WIDTH = 4;  // floats in a vector

inline Floats splat(float x) { return vdupq_n_f32(x); }
inline Floats zeros() { return vdupq_n_f32(0.0f); }
inline Floats load(const float* p) { return vld1q_f32(p); }
inline Floats load_f16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
inline Floats load_bf16(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
// WIDTH bytes as numbers.
inline uint32x4_t load_wide_u8(const uint8_t* p) {
  uint32_t four;
  std::memcpy(&four, p, sizeof four);
  return vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four))));
}
inline Floats load_u8(const uint8_t* p) { return vcvtq_f32_u32(load_wide_u8(p)); }
// WIDTH powers of two as mxfp4 has them: 2^(byte - 127).
inline Floats load_e8m0(const uint8_t* p) {
  return vreinterpretq_f32_u32(vmaxq_u32(vshlq_n_u32(load_wide_u8(p), 23), vdupq_n_u32(0x400000)));
}
inline void store(float* p, Floats x) { vst1q_f32(p, x); }
// Rounds to the nearest half; what is too large becomes the largest half, never infinity.
inline void store_f16(uint16_t* p, Floats x) {
  const Floats bounded = vminq_f32(vmaxq_f32(x, splat(-65504.0f)), splat(65504.0f));
  vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(bounded)));
}
// WIDTH whole numbers from -128 to 127 as bytes.
inline void store_int8(int8_t* p, Floats x) {
  const int16x4_t words = vmovn_s32(vcvtnq_s32_f32(x));
  const int8x8_t bytes = vmovn_s16(vcombine_s16(words, words));
  const uint32_t four = vget_lane_u32(vreinterpret_u32_s8(bytes), 0);
  std::memcpy(p, &four, sizeof four);
}
inline Floats add(Floats a, Floats b) { return vaddq_f32(a, b); }
inline Floats sub(Floats a, Floats b) { return vsubq_f32(a, b); }
inline Floats mul(Floats a, Floats b) { return vmulq_f32(a, b); }
inline Floats div(Floats a, Floats b) { return vdivq_f32(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
inline Floats max(Floats a, Floats b) { return vmaxq_f32(a, b); }
inline Floats min(Floats a, Floats b) { return vminq_f32(a, b); }
inline Floats abs(Floats a) { return vabsq_f32(a); }
inline Floats round(Floats a) { return vrndnq_f32(a); }
inline float sum_of(Floats a) { return vaddvq_f32(a); }
inline float max_of(Floats a) { return vmaxvq_f32(a); }
// p * 2^n for whole n from -151 to 128, in two steps, so that results below the normal range are still right.
inline Floats scale_by_power(Floats p, Floats n) {
  const int32x4_t whole = vcvtnq_s32_f32(n);
  const int32x4_t half = vshrq_n_s32(whole, 1);
  const int32x4_t rest = vsubq_s32(whole, half);
  const int32x4_t one = vdupq_n_s32(127);
  const Floats first = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(half, one), 23));
  const Floats second = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(rest, one), 23));
  return vmulq_f32(vmulq_f32(p, first), second);
}
// The larger one; b where a is not a number.
inline Floats max_number(Floats a, Floats b) { return vmaxnmq_f32(a, b); }
// The halves of bytes as floats, those that begin at bit `shift`, 0 or 4.
inline Floats load_u4(const uint8_t* p, int shift) {
  const uint32x4_t moved = vshlq_u32(load_wide_u8(p), vdupq_n_s32(-shift));
  return vcvtq_f32_u32(vandq_u32(moved, vdupq_n_u32(15)));
}

}  // namespace mlx_edge::MLX_EDGE_ISA
