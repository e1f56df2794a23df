// Kernels over one row: norm, gate, rotation, argmax. Included by isa.cpp, once for each instruction set.
#pragma once

#include <cmath>

#include "kernels.h"
#include "simd.h"

namespace mlx_edge::MLX_EDGE_ISA {

inline float sum_of_squares(const float* x, int n) {
  constexpr int LANES = 4;  // independent sums, to hide the latency of an addition and to keep the error small
  Floats sums[LANES] = {zeros(), zeros(), zeros(), zeros()};
  int i = 0;
  for (; i + LANES * WIDTH <= n; i += LANES * WIDTH) {
    for (int lane = 0; lane < LANES; lane++) {
      const Floats v = load(x + i + lane * WIDTH);
      sums[lane] = fma(v, v, sums[lane]);
    }
  }
  float sum = sum_of(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  for (; i < n; i++) sum += x[i] * x[i];
  return sum;
}

inline void rms_norm(const float* x, const float* weight, float eps, float* y, int n) {
  const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(sum_of_squares(x, n)) / n + eps));
  int i = 0;
  for (; i + WIDTH <= n; i += WIDTH) store(y + i, mul(mul(load(x + i), splat(scale)), load(weight + i)));
  for (; i < n; i++) y[i] = x[i] * scale * weight[i];
}

// x / (1 + e^-x)
inline Floats silu(Floats x) { return div(x, add(splat(1.0f), exp(sub(zeros(), x)))); }

// x / 2 * (1 + tanh(u)) = x / (1 + e^-2u), u = sqrt(2 / pi) * (x + 0.044715 x^3)
inline Floats gelu_tanh(Floats x) {
  const Floats cubic = fma(mul(mul(x, x), splat(0.044715f)), x, x);
  return div(x, add(splat(1.0f), exp(mul(cubic, splat(-1.5957691216057308f)))));
}

template <Floats (*activate)(Floats)>
void gate_row(const float* gate, const float* up, float* y, int n) {
  int i = 0;
  for (; i + WIDTH <= n; i += WIDTH) store(y + i, mul(activate(load(gate + i)), load(up + i)));
  if (i == n) return;
  float last[WIDTH] = {};
  for (int j = i; j < n; j++) last[j - i] = gate[j];
  store(last, activate(load(last)));
  for (int j = i; j < n; j++) y[j] = last[j - i] * up[j];
}

inline void glu(Activation activation, const float* gate, const float* up, float* y, int n) {
  if (activation == Activation::silu) return gate_row<silu>(gate, up, y, n);
  gate_row<gelu_tanh>(gate, up, y, n);
}

inline void rotate(float* head, const float* cos, const float* sin, int dims, bool is_interleaved) {
  const int half = dims / 2;
  const int step = is_interleaved ? 2 : 1, apart = is_interleaved ? 1 : half;
  int i = 0;
  if (!is_interleaved) {
    for (; i + WIDTH <= half; i += WIDTH) {
      const Floats a = load(head + i), b = load(head + half + i), c = load(cos + i), s = load(sin + i);
      store(head + i, sub(mul(a, c), mul(b, s)));
      store(head + half + i, add(mul(b, c), mul(a, s)));
    }
  }
  for (; i < half; i++) {
    float &a = head[i * step], &b = head[i * step + apart];
    const float turned = a * cos[i] - b * sin[i];
    b = b * cos[i] + a * sin[i];
    a = turned;
  }
}

inline int argmax(const float* x, int n) {
  constexpr int BLOCK = 1024;
  float best = -INFINITY;
  int where = 0;  // the block of the first largest element
  for (int begin = 0; begin < n; begin += BLOCK) {
    const int end = begin + BLOCK < n ? begin + BLOCK : n;
    Floats largest = splat(-INFINITY);
    int i = begin;
    for (; i + WIDTH <= end; i += WIDTH) largest = max_number(load(x + i), largest);
    float top = max_of(largest);
    for (; i < end; i++) top = x[i] > top ? x[i] : top;
    if (top > best) {
      best = top;
      where = begin;
    }
  }
  for (int i = where; i < n; i++)
    if (x[i] == best) return i;
  return 0;  // nothing but NaN
}

}  // namespace mlx_edge::MLX_EDGE_ISA
