// What the checks of the CPU kernels share: saying what is wrong, random numbers, and weights in MLX's layout with their
// values as doubles. The layout is written here a second time, bit by bit, from its definition.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "half.h"
#include "matrix.h"

namespace check {

using Floats32 = std::vector<float>;

inline int checks = 0;

// Ends the program with 1 and a line that says what is wrong.
template <class... Args>
void expect(bool is_right, const char* format, Args... args) {
  checks++;
  if (is_right) return;
  std::printf("wrong: ");
  std::printf(format, args...);
  std::printf("\n");
  std::exit(1);
}

inline uint64_t random_bits() {
  static uint64_t state = 88172645463325252u;
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return state;
}
inline float uniform(float low, float high) {
  return low + (high - low) * static_cast<float>(random_bits() >> 40) / 16777216.0f;
}
inline Floats32 random_row(int n, float size = 1.0f) {
  Floats32 row(n);
  for (float& x : row) x = uniform(-size, size);
  return row;
}

// x as the type holds it; appends its bytes.
inline float append(std::vector<uint8_t>& to, mlx_edge::Float type, float x) {
  using namespace mlx_edge;
  uint32_t bits = float_to_bits(x);
  size_t size = 4;
  if (type == Float::bf16) bits >>= 16, size = 2, x = bf16_to_float(static_cast<uint16_t>(bits));
  if (type == Float::f16) bits = float_to_f16(x), size = 2, x = f16_to_float(static_cast<uint16_t>(bits));
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(&bits);
  to.insert(to.end(), bytes, bytes + size);
  return x;
}

struct Weight {
  mlx_edge::Matrix matrix;            // .data points into packed, or for dense weights into `rows`
  std::vector<uint32_t> packs;        // MLX's layout
  std::vector<uint8_t> scales, offsets;
  std::vector<uint8_t> packed, rows;  // exactly as long as they must be, so that a read beyond them is seen
  std::vector<double> values, parts;  // (N, K): the weight, and |scale * code| + |offset|: what rounding is relative to
  Floats32 bias;

  double value(int n, int k) const { return values[static_cast<size_t>(n) * matrix.columns + k]; }
  double part(int n, int k) const { return parts[static_cast<size_t>(n) * matrix.columns + k]; }
};

inline void repack(Weight& w) {
  w.packed.resize(mlx_edge::packed_bytes(w.matrix));
  mlx_edge::pack(w.matrix, w.packs.data(), w.scales.data(), w.offsets.data(), w.packed.data(), 0, num_blocks(w.matrix));
  w.matrix.data = w.packed.data();
}

inline Weight random_packed(mlx_edge::Format format, int bits, int group, mlx_edge::Float type, int n, int k) {
  static constexpr double e2m1[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6};
  Weight w{{format, n, k, bits, group, type, nullptr, nullptr}, {}, {}, {}, {}, {}, {}, {}, random_row(n)};
  const size_t row_bits = static_cast<size_t>(k) * bits;
  w.packs.assign(n * row_bits / 32, 0);
  for (int row = 0; row < n; row++) {
    double scale = 0, offset = 0;
    for (int i = 0; i < k; i++) {
      if (i % group == 0 && format == mlx_edge::Format::affine) {
        scale = append(w.scales, type, uniform(0.001f, 0.02f) * (random_bits() % 4 ? 1.0f : -1.0f));
        offset = append(w.offsets, type, static_cast<float>(-scale * (1 << bits) / 2 * uniform(0.7f, 1.3f)));
      } else if (i % group == 0) {
        w.scales.push_back(static_cast<uint8_t>(115 + random_bits() % 10));
        scale = std::ldexp(1.0, w.scales.back() - 127);
      }
      const uint32_t code = static_cast<uint32_t>(random_bits() >> 32) & ((1u << bits) - 1);
      for (int bit = 0; bit < bits; bit++) {
        const size_t at = row * row_bits + static_cast<size_t>(i) * bits + bit;
        w.packs[at / 32] |= (code >> bit & 1) << (at % 32);
      }
      const double product = scale * (format == mlx_edge::Format::affine ? code : e2m1[code]);
      w.values.push_back(product + offset);
      w.parts.push_back(format == mlx_edge::Format::affine ? std::fabs(product) + std::fabs(offset) : 12 * std::fabs(scale));
    }
  }
  repack(w);
  return w;
}

inline Weight random_dense(mlx_edge::Float type, int n, int k) {
  Weight w{{mlx_edge::Format::dense, n, k, 0, 0, type, nullptr, nullptr}, {}, {}, {}, {}, {}, {}, {}, random_row(n)};
  for (int i = 0; i < n * k; i++) w.values.push_back(append(w.rows, type, uniform(-0.1f, 0.1f)));
  for (double v : w.values) w.parts.push_back(std::fabs(v));
  w.rows.shrink_to_fit();
  w.matrix.data = w.rows.data();
  return w;
}

}  // namespace check
