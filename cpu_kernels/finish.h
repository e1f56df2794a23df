// Where products go: y = sums + bias + add.
#pragma once

#include <algorithm>

#include "matrix.h"
#include "simd.h"

namespace mlx_edge::MLX_EDGE_ISA {

struct Output {
  const float* add;  // null or laid out as y
  float* y;
  ptrdiff_t stride;
};

// sums (last - first, ROWS) of one block to rows [first, last) of y; nothing beyond the weight's rows is written.
inline void finish(const Matrix& w, const Output& out, int block, int first, int last, const float* sums) {
  const int n = block * ROWS, count = std::min(ROWS, w.rows - n);
  for (int m = first; m < last; m++, sums += ROWS) {
    float* y = out.y + m * out.stride + n;
    const float* plus = out.add ? out.add + m * out.stride + n : nullptr;
    int i = 0;
    for (; i + WIDTH <= count; i += WIDTH) {
      Floats sum = load(sums + i);
      if (w.bias) sum = add(sum, load(w.bias + n + i));
      if (plus) sum = add(sum, load(plus + i));
      store(y + i, sum);
    }
    for (; i < count; i++) {
      float sum = sums[i];
      if (w.bias) sum += w.bias[n + i];
      if (plus) sum += plus[i];
      y[i] = sum;
    }
  }
}

}  // namespace mlx_edge::MLX_EDGE_ISA
