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

// Clamped, steeper than silu, and one more than up: gpt-oss's.
inline Floats gate_oai(Floats gate, Floats up) {
  const Floats x = min(gate, splat(7.0f));
  const Floats bounded = max(splat(-7.0f), min(up, splat(7.0f)));
  return mul(div(x, add(splat(1.0f), exp(mul(x, splat(-1.702f))))), add(bounded, splat(1.0f)));
}

template <Floats (*activate)(Floats)>
Floats gate_with(Floats gate, Floats up) {
  return mul(activate(gate), up);
}

template <Floats (*gated)(Floats, Floats)>
void gate_row(const float* gate, const float* up, float* y, int n) {
  int i = 0;
  for (; i + WIDTH <= n; i += WIDTH) store(y + i, gated(load(gate + i), load(up + i)));
  if (i == n) return;
  float last[2][WIDTH] = {};
  for (int j = i; j < n; j++) last[0][j - i] = gate[j], last[1][j - i] = up[j];
  store(last[0], gated(load(last[0]), load(last[1])));
  for (int j = i; j < n; j++) y[j] = last[0][j - i];
}

inline void glu(Activation activation, const float* gate, const float* up, float* y, int n) {
  switch (activation) {
    case Activation::silu: return gate_row<gate_with<silu>>(gate, up, y, n);
    case Activation::gelu_tanh: return gate_row<gate_with<gelu_tanh>>(gate, up, y, n);
    case Activation::swiglu_oai: return gate_row<gate_oai>(gate, up, y, n);
  }
}

// softcap * tanh(x / softcap), tanh(u) = 1 - 2 / (1 + e^2u)
inline Floats cap_of(Floats x, float softcap) {
  const Floats power = exp(mul(x, splat(2.0f / softcap)));
  return mul(splat(softcap), sub(splat(1.0f), div(splat(2.0f), add(splat(1.0f), power))));
}

inline void cap(float* x, float scale, float softcap, int n) {
  const auto one = [&](Floats v) {
    const Floats scaled = mul(v, splat(scale));
    return softcap > 0.0f ? cap_of(scaled, softcap) : scaled;
  };
  int i = 0;
  for (; i + WIDTH <= n; i += WIDTH) store(x + i, one(load(x + i)));
  float last[WIDTH] = {};
  for (int j = i; j < n; j++) last[j - i] = x[j];
  store(last, one(load(last)));
  for (int j = i; j < n; j++) x[j] = last[j - i];
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
