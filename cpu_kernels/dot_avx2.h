// Integer dots of AVX2: products of bytes are added up in pairs of 16 bits first, which hold only so many of them.
#pragma once

namespace mlx_edge::MLX_EDGE_ISA {

constexpr int TILE = 4;        // rows of activations that meet one load of the weight's codes
constexpr int DENSE_TILE = 3;  // the same among floats, with four rows of the weight

using Bytes = __m256i;    // the codes of WIDTH rows x 4 columns
using Partial = __m256i;  // 16-bit sums on their way
using Ints = __m256i;     // WIDTH sums of 32 bits

// Slices whose products a Partial holds when codes go up to `largest`; none means that a code is dotted in two halves.
constexpr int depth(int largest) { return 32767 / (2 * 127 * largest); }
constexpr bool SIGNED = false;  // codes are dotted as unsigned bytes

inline Bytes load_bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline void store_bytes(uint8_t* p, Bytes x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
template <int LEFT>  // a negative shift goes right; bits that wander into a neighbour are masked off
inline Bytes shift_and_mask(Bytes x, int mask) {
  if constexpr (LEFT > 0) x = _mm256_slli_epi16(x, LEFT);
  if constexpr (LEFT < 0) x = _mm256_srli_epi16(x, -LEFT);
  return _mm256_and_si256(x, _mm256_set1_epi8(static_cast<char>(mask)));
}
inline Bytes either(Bytes a, Bytes b) { return _mm256_or_si256(a, b); }
inline Bytes minus_128(Bytes x) { return _mm256_xor_si256(x, _mm256_set1_epi8(-128)); }
inline Bytes look_up(const uint8_t* table, Bytes index) {
  const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(sixteen), index);
}
inline Bytes four_codes(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, sizeof four);
  return _mm256_set1_epi32(four);
}

inline Partial no_partial() { return _mm256_setzero_si256(); }
inline Partial dot(Partial sum, Bytes w, Bytes x) {
  sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x));
  asm("" : "+x"(sum));  // compilers would make a tree of these sums, and run out of registers for its leaves
  return sum;
}
inline Ints no_ints() { return _mm256_setzero_si256(); }
template <int FACTOR>
inline Ints widen(Ints sum, Partial p) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(p, _mm256_set1_epi16(FACTOR)));
}
inline Floats to_floats(Ints x) { return _mm256_cvtepi32_ps(x); }

}  // namespace mlx_edge::MLX_EDGE_ISA
