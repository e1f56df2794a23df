// AVX-512 and its relatives in plain C++, from SIMDe and, where its release has none, from here: found before the compiler's
// own header, so that the kernels run where no such machine is at hand.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#ifndef _MM_FROUND_NO_EXC
#define _MM_FROUND_NO_EXC SIMDE_MM_FROUND_NO_EXC
#endif
#ifndef _MM_FROUND_TO_NEAREST_INT
#define _MM_FROUND_TO_NEAREST_INT SIMDE_MM_FROUND_TO_NEAREST_INT
#endif

namespace emulated {

// f of each of the N elements, as vectors of the outer types.
template <class To, class ToElement, class FromElement, int N, class From, class F>
inline To each(const From& from, F f) {
  FromElement x[sizeof(From) / sizeof(FromElement)];
  ToElement y[sizeof(To) / sizeof(ToElement)] = {};
  std::memcpy(x, &from, sizeof from);
  for (int i = 0; i < N; i++) y[i] = f(x[i]);
  To to;
  std::memcpy(&to, y, sizeof to);
  return to;
}
template <class F>
inline float fold(const __m512& from, F f) {
  float x[16];
  std::memcpy(x, &from, sizeof x);
  for (int step = 8; step > 0; step /= 2)  // the halves meet, as compilers do it
    for (int i = 0; i < step; i++) x[i] = f(x[i], x[i + step]);
  return x[0];
}

}  // namespace emulated

inline __m512i _mm512_cvtepu16_epi32(__m256i x) {
  return emulated::each<__m512i, int32_t, uint16_t, 16>(x, [](uint16_t v) { return v; });
}
inline __m512i _mm512_cvtepu8_epi32(__m128i x) {
  return emulated::each<__m512i, int32_t, uint8_t, 16>(x, [](uint8_t v) { return v; });
}
inline __m128i _mm512_cvtepi32_epi8(__m512i x) {
  return emulated::each<__m128i, int8_t, int32_t, 16>(x, [](int32_t v) { return static_cast<int8_t>(v); });
}
inline __m512 _mm512_cvtepi32_ps(__m512i x) {
  return emulated::each<__m512, float, int32_t, 16>(x, [](int32_t v) { return static_cast<float>(v); });
}
inline __m512i _mm512_cvtps_epi32(__m512 x) {
  return emulated::each<__m512i, int32_t, float, 16>(x, [](float v) {
    return std::fabs(v) < 2147483648.0f ? static_cast<int32_t>(std::nearbyint(v)) : std::numeric_limits<int32_t>::min();
  });
}
inline __m512 _mm512_cvtph_ps(__m256i x) {
  return emulated::each<__m512, float, uint16_t, 16>(x, [](uint16_t v) {
    const simde__m128i half = simde_mm_cvtsi32_si128(v);
    return simde_mm_cvtss_f32(simde_mm_cvtph_ps(half));
  });
}
inline __m256i _mm512_cvtps_ph(__m512 x, int) {
  return emulated::each<__m256i, uint16_t, float, 16>(x, [](float v) {
    return static_cast<uint16_t>(simde_mm_extract_epi16(simde_mm_cvtps_ph(simde_mm_set_ss(v), 0), 0));
  });
}
inline float _mm512_reduce_add_ps(__m512 x) {
  return emulated::fold(x, [](float a, float b) { return a + b; });
}
inline float _mm512_reduce_max_ps(__m512 x) {
  return emulated::fold(x, [](float a, float b) { return a > b ? a : b; });
}
