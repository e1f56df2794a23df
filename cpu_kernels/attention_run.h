// Attention of a run of rows over itself, both ways: the patches of an image. Included by isa.cpp, once for each instruction
// set.
//
//   y = sum_p softmax_p(scale * q . k_p) v_p over all positions p of the run
//
// A tile of queries meets the keys a block of RUN_KEYS at a time, with its own running maximum, sum of weights and weighted sum
// of values: no score matrix exists. Reads: keys and values once for every RUN_QUERIES queries. A query's bits do not depend
// on its neighbours in the call. Tolerance: that of a float32 sum over the run.
#pragma once

#include "attention.h"

namespace mlx_edge::MLX_EDGE_ISA {

constexpr int RUN_ROWS = 6;                            // queries of a tile
constexpr int RUN_VECTORS = WIDTH == 8 ? 2 : 4;        // vectors of a tile: its sums fill the registers
static_assert(RUN_QUERIES % RUN_ROWS == 0 && RUN_VECTORS >= MIN_VECTORS);

inline void turn_keys(const float* keys, int count, int dim, float* to) {
  for (int d = 0; d < dim; d++) {
    for (int p = 0; p < count; p++) to[d * RUN_KEYS + p] = keys[p * dim + d];
    for (int p = count; p < RUN_KEYS; p++) to[d * RUN_KEYS + p] = 0.0f;
  }
}

template <int R = RUN_ROWS>
void multiply_run(int rows, const float* a, int a_stride, const FloatPlane& b, int depth, int columns, const float* factors,
                  float* c, int c_stride) {
  Still still;
  if (rows == R)
    multiply_columns<R, RUN_VECTORS>(a, a_stride, b, 0, depth, 0, columns, factors, c, c_stride, still);
  else if constexpr (R > 1)
    multiply_run<R - 1>(rows, a, a_stride, b, depth, columns, factors, c, c_stride);
}

// One query's sums so far, relative to its largest score.
struct RunSum {
  float largest = -INFINITY, weights = 0.0f;

  // `count` scores of a block become weights, the rest of it zeros; returns the factor for all that was gathered before.
  float weigh(float* scores, int count) {
    for (int p = count; p < RUN_KEYS; p++) scores[p] = -INFINITY;
    Floats top = load(scores);
    for (int p = WIDTH; p < RUN_KEYS; p += WIDTH) top = max(top, load(scores + p));
    const float before = largest, highest = max_of(top);
    if (highest > before) largest = highest;
    Floats sum = zeros();
    for (int p = 0; p < RUN_KEYS; p += WIDTH) {
      const Floats weight = exp(sub(load(scores + p), splat(largest)));
      store(scores + p, weight);
      sum = add(sum, weight);
    }
    const float factor = largest == before ? 1.0f : std::exp(before - largest);
    weights = weights * factor + sum_of(sum);
    return factor;
  }
};

inline void attend_run(const float* q, int count, const float* turned, const float* values, int stride, int num_keys, int dim,
                       float scale, float* y) {
  alignas(64) float queries[RUN_QUERIES * MAX_HEAD_DIM], results[RUN_QUERIES * MAX_HEAD_DIM];
  alignas(64) float scores[RUN_ROWS * RUN_KEYS];
  RunSum sums[RUN_QUERIES];
  for (int i = 0; i < count * dim; i++) queries[i] = q[i] * scale;
  for (int i = 0; i < count * stride; i++) results[i] = 0.0f;
  for (int key = 0; key < num_keys; key += RUN_KEYS) {
    const FloatPlane keys(turned + static_cast<ptrdiff_t>(key) * dim, RUN_KEYS);
    const FloatPlane mixed(values + static_cast<ptrdiff_t>(key) * stride, stride);
    const int met = num_keys - key < RUN_KEYS ? num_keys - key : RUN_KEYS;
    for (int i = 0; i < count; i += RUN_ROWS) {
      const int rows = count - i < RUN_ROWS ? count - i : RUN_ROWS;
      float factors[RUN_ROWS];
      multiply_run(rows, queries + i * dim, dim, keys, dim, RUN_KEYS, nullptr, scores, RUN_KEYS);
      for (int r = 0; r < rows; r++) factors[r] = sums[i + r].weigh(scores + r * RUN_KEYS, met);
      multiply_run(rows, scores, RUN_KEYS, mixed, met, stride, factors, results + i * stride, stride);
    }
  }
  for (int i = 0; i < count; i++) {
    const float share = 1.0f / sums[i].weights;
    for (int d = 0; d < dim; d++) y[i * dim + d] = results[i * stride + d] * share;
  }
}

}  // namespace mlx_edge::MLX_EDGE_ISA
