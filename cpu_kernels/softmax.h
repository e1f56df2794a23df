// The parts of a softmax over a long row: its largest element, and the sum of exponentials.
//
//   log softmax(x) = x - max - log(sum(exp(x - max)))      memory: each number is read once a part; tolerance 1e-6
#pragma once

#include <algorithm>
#include <limits>

#include "simd.h"

namespace mlx_edge::MLX_EDGE_ISA {

inline float largest(const float* x, int n) {
  float highest = -std::numeric_limits<float>::infinity();
  int i = 0;
  if (n >= WIDTH) {
    Floats best = load(x);
    for (i = WIDTH; i + WIDTH <= n; i += WIDTH) best = max(best, load(x + i));
    highest = max_of(best);
  }
  for (; i < n; i++) highest = std::max(highest, x[i]);
  return highest;
}

inline float sum_exp(const float* x, float shift, int n) {
  Floats sum = zeros();
  int i = 0;
  for (; i + WIDTH <= n; i += WIDTH) sum = add(sum, exp(sub(load(x + i), splat(shift))));
  float rest[WIDTH];
  std::fill(rest, rest + WIDTH, -std::numeric_limits<float>::infinity());
  std::copy(x + i, x + n, rest);
  return sum_of(add(sum, exp(sub(load(rest), splat(shift)))));
}

}  // namespace mlx_edge::MLX_EDGE_ISA
