// AVX-512 (F, BW, DQ, VL, VNNI): sixteen floats at a time.
#pragma once

#include <immintrin.h>

namespace mlx_edge::MLX_EDGE_ISA {

using Floats = __m512;
constexpr int WIDTH = 16;  // floats in a vector

inline Floats splat(float x) { return _mm512_set1_ps(x); }
inline Floats zeros() { return _mm512_setzero_ps(); }
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline Floats load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Floats load_bf16(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
// WIDTH bytes as numbers.
inline Floats load_u8(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
// WIDTH powers of two as mxfp4 has them: 2^(byte - 127).
inline Floats load_e8m0(const uint8_t* p) {
  const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_slli_epi32(wide, 23), _mm512_set1_epi32(0x400000)));
}
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
// Rounds to the nearest half; what is too large becomes the largest half, never infinity.
inline void store_f16(uint16_t* p, Floats x) {
  const Floats bounded = _mm512_min_ps(splat(65504.0f), _mm512_max_ps(splat(-65504.0f), x));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(bounded, _MM_FROUND_TO_NEAREST_INT));
}
// WIDTH whole numbers from -128 to 127 as bytes.
inline void store_int8(int8_t* p, Floats x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
}
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats abs(Floats a) { return _mm512_abs_ps(a); }
inline Floats round(Floats a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline float sum_of(Floats a) { return _mm512_reduce_add_ps(a); }
inline float max_of(Floats a) { return _mm512_reduce_max_ps(a); }
// p * 2^n for whole n.
inline Floats scale_by_power(Floats p, Floats n) { return _mm512_scalef_ps(p, n); }
// The larger one; b where a is not a number.
inline Floats max_number(Floats a, Floats b) { return _mm512_max_ps(a, b); }
// The halves of bytes as floats, those that begin at bit `shift`, 0 or 4.
inline Floats load_u4(const uint8_t* p, int shift) {
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m512i moved = _mm512_srl_epi32(bytes, _mm_cvtsi32_si128(shift));
  return _mm512_cvtepi32_ps(_mm512_and_si512(moved, _mm512_set1_epi32(15)));
}

}  // namespace mlx_edge::MLX_EDGE_ISA
