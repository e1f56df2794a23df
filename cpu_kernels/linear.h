// y = add + x . W^T + bias: the family's entries in the table of kernels, and the quantization of activations.
#pragma once

#include <limits>

#include "linear_codes.h"
#include "linear_dense.h"

namespace mlx_edge::MLX_EDGE_ISA {

inline size_t codes_bytes(int rows, int columns) { return (static_cast<size_t>(rows) * columns + 63) / 64 * 64; }
inline size_t scales_count(int rows, int columns, int group_size) {
  return (static_cast<size_t>(rows) * (columns / group_size) + 15) / 16 * 16;
}

// One group of one row: codes = round(127 x / max|x|). A group with a value that is no finite number has NaN for scale and
// sum, so that it cannot pass unseen; one below 1e-30 is zero.
inline void quantize_group(const float* x, int size, int8_t* codes, float* scale, float* sum) {
  Floats largest = zeros(), unsound = zeros();
  for (int i = 0; i < size; i += WIDTH) {
    largest = max(largest, abs(load(x + i)));
    unsound = fma(load(x + i), zeros(), unsound);
  }
  const float top = max_of(largest), doubt = sum_of(unsound);
  const bool is_sound = doubt == 0.0f, is_zero = top < 1e-30f;
  if (!is_sound || is_zero) {
    for (int i = 0; i < size; i++) codes[i] = 0;
    *scale = *sum = is_sound ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    return;
  }
  const Floats inverse = splat(127.0f / top);
  Floats total = zeros();
  for (int i = 0; i < size; i += WIDTH) {
    const Floats code = round(mul(load(x + i), inverse));
    total = add(total, code);
    store_int8(codes + i, code);
  }
  *scale = top / 127.0f;
  *sum = *scale * sum_of(total);  // of the codes, not of x: what rounding took from the dot it must take from the offset too
}

inline void quantize(const Rows& x, int begin, int end, int first_group, int last_group) {
  const int groups = x.columns / x.group_size;
  for (int m = begin; m < end; m++) {
    const ptrdiff_t tile = m / TILE * TILE, rows = std::min<ptrdiff_t>(TILE, x.count - tile), lane = m - tile;
    for (int g = first_group; g < last_group; g++) {
      int8_t codes[128];
      const ptrdiff_t number = tile * groups + g * rows + lane;
      quantize_group(x.values + m * x.stride + g * x.group_size, x.group_size, codes, x.scales + number, x.sums + number);
      int8_t* to = x.codes + tile * x.columns + g * rows * x.group_size + lane * 4;
      for (int i = 0; i < x.group_size; i += 4, to += rows * 4) std::memcpy(to, codes + i, 4);
    }
  }
}

template <class Code>
void multiply_packed(const Matrix& w, const Rows& x, const Output& y, int begin, int end) {
  if (x.codes)
    multiply_codes<Code>(w, x, y, begin, end);
  else
    multiply_as_floats<PackedRows<Code>>(w, x, y, begin, end);
}

inline void multiply(const Matrix& w, const Rows& x, const float* add, float* y, ptrdiff_t stride, int begin, int end) {
  const Output out{add, y, stride};
  if (w.format == Format::dense) {
    if (w.float_type == Float::f32) return multiply_dense<Float::f32>(w, x, out, begin, end);
    if (w.float_type == Float::f16) return multiply_dense<Float::f16>(w, x, out, begin, end);
    return multiply_dense<Float::bf16>(w, x, out, begin, end);
  }
  if (w.format == Format::mxfp4) return multiply_packed<Mxfp4>(w, x, out, begin, end);
  switch (w.bits) {
    case 2: return multiply_packed<Affine<2>>(w, x, out, begin, end);
    case 3: return multiply_packed<Affine<3>>(w, x, out, begin, end);
    case 4: return multiply_packed<Affine<4>>(w, x, out, begin, end);
    case 5: return multiply_packed<Affine<5>>(w, x, out, begin, end);
    case 6: return multiply_packed<Affine<6>>(w, x, out, begin, end);
    default: return multiply_packed<Affine<8>>(w, x, out, begin, end);
  }
}

}  // namespace mlx_edge::MLX_EDGE_ISA
