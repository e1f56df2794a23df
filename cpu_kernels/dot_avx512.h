// Integer dots of AVX-512 VNNI: four products at once into 32 bits, nothing overflows.
#pragma once

namespace mlx_edge::MLX_EDGE_ISA {

constexpr int TILE = 8;        // rows of activations that meet one load of the weight's codes
constexpr int DENSE_TILE = 6;  // the same among floats, with four rows of the weight

using Bytes = __m512i;  // the codes of WIDTH rows x 4 columns
using Partial = __m512i;
using Ints = __m512i;  // WIDTH sums of 32 bits

constexpr int depth(int) { return 8; }
constexpr bool SIGNED = false;  // codes are dotted as unsigned bytes

inline Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline void store_bytes(uint8_t* p, Bytes x) { _mm512_storeu_si512(p, x); }
template <int LEFT>  // a negative shift goes right; bits that wander into a neighbour are masked off
inline Bytes shift_and_mask(Bytes x, int mask) {
  if constexpr (LEFT > 0) x = _mm512_slli_epi16(x, LEFT);
  if constexpr (LEFT < 0) x = _mm512_srli_epi16(x, -LEFT);
  return _mm512_and_si512(x, _mm512_set1_epi8(static_cast<char>(mask)));
}
inline Bytes either(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
inline Bytes minus_128(Bytes x) { return _mm512_xor_si512(x, _mm512_set1_epi8(-128)); }
inline Bytes look_up(const uint8_t* table, Bytes index) {
  const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(sixteen), index);
}
inline Bytes four_codes(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, sizeof four);
  return _mm512_set1_epi32(four);
}

inline Partial no_partial() { return _mm512_setzero_si512(); }
inline Partial dot(Partial sum, Bytes w, Bytes x) { return _mm512_dpbusd_epi32(sum, w, x); }
inline Ints no_ints() { return _mm512_setzero_si512(); }
template <int FACTOR>
inline Ints widen(Ints sum, Partial p) {
  static_assert(FACTOR == 1);
  return _mm512_add_epi32(sum, p);
}
inline Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }

}  // namespace mlx_edge::MLX_EDGE_ISA
