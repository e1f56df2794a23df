// The vectors that kernels are written in: one header per instruction set, the same names in each.
//
// isa.cpp is compiled once per instruction set with MLX_EDGE_ISA naming it; every kernel lives in that namespace, so
// that no object holds an instruction its machine may lack. `Floats` is the widest float32 vector of the set.
// Products and sums are fused only where the code says `fma` (-ffp-contract=off): a row must give the same bits
// whatever tile it is computed in.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if !defined(MLX_EDGE_ISA)
#error "simd.h belongs to the objects that isa.cpp becomes: define MLX_EDGE_ISA"
#endif

#if defined(MLX_EDGE_AVX512)
#include "simd_avx512.h"
#elif defined(MLX_EDGE_AVX2)
#include "simd_avx2.h"
#elif defined(MLX_EDGE_NEON)
#include "simd_neon.h"
#else
#include "simd_scalar.h"
#endif

namespace mlx_edge::MLX_EDGE_ISA {

// e^x to 2 ulp; what underflows is 0 and x is at most 88; NaN stays (min and max give the second of two when one is NaN). Cephes' polynomial over [-ln 2 / 2, ln 2 / 2].
inline Floats exp(Floats x) {
  const Floats bounded = max(splat(-104.0f), min(splat(88.0f), x));
  const Floats n = round(mul(bounded, splat(1.44269504088896341f)));
  Floats r = fma(n, splat(-0.693359375f), bounded);
  r = fma(n, splat(2.12194440e-4f), r);
  Floats p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(mul(r, r), p, add(r, splat(1.0f)));
  return scale_by_power(p, n);
}

}  // namespace mlx_edge::MLX_EDGE_ISA
