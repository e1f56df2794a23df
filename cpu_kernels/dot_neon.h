// Integer dots of NEON: four signed products at once into 32 bits, nothing overflows.
#pragma once

namespace mlx_edge::MLX_EDGE_ISA {

constexpr int TILE = 4;        // rows of activations that meet one load of the weight's codes
constexpr int DENSE_TILE = 5;  // the same among floats, with four rows of the weight

using Bytes = uint8x16_t;  // the codes of WIDTH rows x 4 columns
using Partial = int32x4_t;
using Ints = int32x4_t;  // WIDTH sums of 32 bits

constexpr int depth(int) { return 8; }
constexpr bool SIGNED = true;  // codes of 8 bits are dotted as code - 128

inline Bytes load_bytes(const uint8_t* p) { return vld1q_u8(p); }
inline void store_bytes(uint8_t* p, Bytes x) { vst1q_u8(p, x); }
template <int LEFT>  // a negative shift goes right
inline Bytes shift_and_mask(Bytes x, int mask) {
  if constexpr (LEFT > 0) x = vshlq_n_u8(x, LEFT);
  if constexpr (LEFT < 0) x = vshrq_n_u8(x, -LEFT);
  return vandq_u8(x, vdupq_n_u8(static_cast<uint8_t>(mask)));
}
inline Bytes either(Bytes a, Bytes b) { return vorrq_u8(a, b); }
inline Bytes minus_128(Bytes x) { return veorq_u8(x, vdupq_n_u8(128)); }
inline Bytes look_up(const uint8_t* table, Bytes index) { return vqtbl1q_u8(vld1q_u8(table), index); }
inline Bytes four_codes(const int8_t* x) {
  uint32_t four;
  std::memcpy(&four, x, sizeof four);
  return vreinterpretq_u8_u32(vdupq_n_u32(four));
}

inline Partial no_partial() { return vdupq_n_s32(0); }
inline Partial dot(Partial sum, Bytes w, Bytes x) {
  return vdotq_s32(sum, vreinterpretq_s8_u8(w), vreinterpretq_s8_u8(x));
}
inline Ints no_ints() { return vdupq_n_s32(0); }
template <int FACTOR>
inline Ints widen(Ints sum, Partial p) {
  static_assert(FACTOR == 1);
  return vaddq_s32(sum, p);
}
inline Floats to_floats(Ints x) { return vcvtq_f32_s32(x); }

}  // namespace mlx_edge::MLX_EDGE_ISA
