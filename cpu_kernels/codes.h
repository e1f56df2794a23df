// The weight's codes as registers: one unit of 32 columns is eight slices of 16 rows x 4 columns, a code a byte.
//
// Knows how a packed group lies in memory (README.md) and nothing of what it is multiplied with.
#pragma once

#include <type_traits>
#include <utility>

#include "matrix.h"
#include "dot.h"

// Tiles live in registers only where everything is one function. The tests do without: it is much to compile.
#if defined(MLX_EDGE_OUTLINED)
#define MLX_EDGE_ALWAYS_INLINE
#else
#define MLX_EDGE_ALWAYS_INLINE __attribute__((always_inline))
#endif
#define MLX_EDGE_INLINE MLX_EDGE_ALWAYS_INLINE inline

namespace mlx_edge::MLX_EDGE_ISA {

constexpr int UNIT = 32;            // columns
constexpr int SLICES = UNIT / 4;    // of a unit
constexpr int SLICE = 4 * ROWS;     // bytes, unpacked
constexpr int PARTS = ROWS / WIDTH; // registers that hold a slice, and 16 floats

template <class F, int... I>
MLX_EDGE_INLINE void unroll(F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
// f(0), ..., f(N - 1) with the number known to the compiler, as shifts want it.
template <int N, class F>
MLX_EDGE_INLINE void unroll(F&& f) {
  unroll(static_cast<F&&>(f), std::make_integer_sequence<int, N>{});
}

// Slice J of the planes of a unit from width P downwards; SHIFT bits of the code lie in wider planes.
template <int BITS, int J, int P = 8, int SHIFT = 0>
MLX_EDGE_INLINE Bytes slice_of(const uint8_t* unit) {
  constexpr int rest = BITS & (P - 1);
  if constexpr ((BITS & P) == 0) {
    return slice_of<BITS, J, P / 2, SHIFT>(unit);
  } else {
    const Bytes raw = load_bytes(unit + SLICE * SHIFT + SLICE * (J * P / 8));
    constexpr int mask = ((1 << P) - 1) << SHIFT;
    const Bytes mine = P == 8 ? raw : shift_and_mask<SHIFT - J * P % 8>(raw, mask);
    if constexpr (rest == 0)
      return mine;
    else
      return either(mine, slice_of<rest, J, P / 2, SHIFT + P>(unit));
  }
}

template <int N>
struct Affine {
  static constexpr int BITS = N, LARGEST = (1 << N) - 1;
  template <int J>
  MLX_EDGE_INLINE static Bytes slice(const uint8_t* unit) {
    return slice_of<N, J>(unit);
  }
};

struct Mxfp4 {
  static constexpr int BITS = 4, LARGEST = 24;
  template <int J>
  MLX_EDGE_INLINE static Bytes slice(const uint8_t* unit) {
    return look_up(MXFP4_TABLE, slice_of<4, J>(unit));
  }
};

MLX_EDGE_INLINE Floats load_number(const uint8_t* p, Float type, int i) {
  if (type == Float::f32) return load(reinterpret_cast<const float*>(p) + i);
  const uint16_t* halves = reinterpret_cast<const uint16_t*>(p) + i;
  return type == Float::f16 ? load_f16(halves) : load_bf16(halves);
}

// Scales and offsets of a group, part P of the rows: value = scale * code + offset.
struct Scales {
  Floats scale, offset;
};
template <class Code>
MLX_EDGE_INLINE Scales scales_of(const uint8_t* p, Float type, int part) {
  if constexpr (std::is_same_v<Code, Mxfp4>) {  // value = 2^e * (code - 12) / 2
    const Floats power = load_e8m0(p + part * WIDTH);
    return {mul(power, splat(0.5f)), mul(power, splat(-6.0f))};
  } else {
    return {load_number(p, type, part * WIDTH), load_number(p, type, ROWS + part * WIDTH)};
  }
}

}  // namespace mlx_edge::MLX_EDGE_ISA
