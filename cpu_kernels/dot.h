// Integer dots of codes: one header per instruction set, the same names in each.
//
// A register of codes holds WIDTH rows x 4 columns, a byte each (`Bytes`); dot() multiplies it with four int8 codes of the
// activations and adds each row's four products to a `Partial`; widen() empties that into 32 bits (`Ints`).
#pragma once

#include "simd.h"

#if defined(MLX_EDGE_AVX512)
#include "dot_avx512.h"
#elif defined(MLX_EDGE_AVX2)
#include "dot_avx2.h"
#elif defined(MLX_EDGE_NEON)
#include "dot_neon.h"
#else
#include "dot_scalar.h"
#endif
