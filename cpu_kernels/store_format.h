// How each format of the KV store is read, a vector at a time, and written, a position at a time. Included by isa.cpp, once
// for each instruction set. kv_store.h draws the planes.
#pragma once

#include <cmath>

#include "kv_store.h"
#include "simd.h"

namespace mlx_edge::MLX_EDGE_ISA {

// Reading: `at(k, j)` is the vector of columns from j on in row k; rows are dims for keys and positions for values.

struct FloatPlane {
  const float* data;
  int stride;

  FloatPlane(const void* plane, int stride) : data(static_cast<const float*>(plane)), stride(stride) {}
  Floats at(int k, int j) const { return load(data + k * stride + j); }
};

struct HalfPlane {
  const uint16_t* data;
  int stride;

  HalfPlane(const void* plane, int stride) : data(static_cast<const uint16_t*>(plane)), stride(stride) {}
  Floats at(int k, int j) const { return load_f16(data + k * stride + j); }
};

// Codes with a scale and an offset per group of 1 << group_bits dims.
struct PackedPlane {
  const uint8_t* codes;
  const float *scales, *offsets;
  int group_bits, num_groups, stride;

  PackedPlane(const KVStore& kv, const uint8_t* plane)
      : codes(plane),
        scales(reinterpret_cast<const float*>(plane + kv.scales_at())),
        offsets(reinterpret_cast<const float*>(plane + kv.offsets_at())),
        group_bits(kv.group_size() == 32 ? 5 : kv.group_size() == 64 ? 6 : 7),
        num_groups(kv.num_groups()),
        stride(kv.value_stride()) {}

  // For 4 bits: the byte that holds a dim's code, and the bit at which it begins there.
  int byte_of(int dim) const {
    const int half = 1 << (group_bits - 1);
    return ((dim >> group_bits) << (group_bits - 1)) + (dim & (half - 1));
  }
  int shift_of(int dim) const { return (dim >> (group_bits - 1) & 1) * 4; }
  Floats key(Floats codes, int dim, int slot) const {
    const int group = (dim >> group_bits) * PAGE + slot;
    return fma(codes, load(scales + group), load(offsets + group));
  }
  Floats value(Floats codes, int slot, int dim) const {
    const int group = slot * num_groups + (dim >> group_bits);
    return fma(codes, splat(scales[group]), splat(offsets[group]));
  }
};
struct ByteKeys : PackedPlane {
  using PackedPlane::PackedPlane;
  Floats at(int dim, int slot) const { return key(load_u8(codes + dim * PAGE + slot), dim, slot); }
};
struct ByteValues : PackedPlane {
  using PackedPlane::PackedPlane;
  Floats at(int slot, int dim) const { return value(load_u8(codes + slot * stride + dim), slot, dim); }
};
struct NibbleKeys : PackedPlane {
  using PackedPlane::PackedPlane;
  Floats at(int dim, int slot) const {
    return key(load_u4(codes + byte_of(dim) * PAGE + slot, shift_of(dim)), dim, slot);
  }
};
struct NibbleValues : PackedPlane {
  using PackedPlane::PackedPlane;
  Floats at(int slot, int dim) const {
    return value(load_u4(codes + slot * stride + byte_of(dim), shift_of(dim)), slot, dim);
  }
};

// Writing.

// Elements of one position, `step` apart in a plane.
template <class T>
void scatter(const T* from, int count, int step, T* to) {
  for (int i = 0; i < count; i++) to[i * step] = from[i];
}

inline void store_halves(const float* x, int n, int step, uint16_t* to) {
  alignas(64) float padded[MAX_HEAD_DIM] = {};
  alignas(64) uint16_t halves[MAX_HEAD_DIM];
  std::memcpy(padded, x, n * sizeof(float));
  for (int i = 0; i < n; i += WIDTH) store_f16(halves + i, load(padded + i));
  scatter(halves, n, step, to);
}

// MLX's affine rounding of one group: the end of the range that is farther from zero is met exactly.
inline void quantize_group(const float* x, int n, float levels, uint8_t* codes, float* scale, float* offset) {
  Floats high = load(x), low = high;
  for (int i = WIDTH; i < n; i += WIDTH) {
    high = max(high, load(x + i));
    low = min(low, load(x + i));
  }
  const float largest = max_of(high), smallest = -max_of(sub(zeros(), low));
  const bool is_low_edge = std::fabs(smallest) > std::fabs(largest);
  const float edge = is_low_edge ? smallest : largest;
  const float width = (largest - smallest) / levels;
  const float spacing = width > 1e-7f ? width : 1e-7f;
  *scale = is_low_edge ? spacing : -spacing;
  *offset = 0.0f;
  const float steps = std::nearbyint(edge / *scale);
  if (steps != 0.0f) {
    *scale = edge / steps;
    *offset = edge;
  }
  float rounded[WIDTH];
  for (int i = 0; i < n; i += WIDTH) {
    const Floats code = round(div(sub(load(x + i), splat(*offset)), splat(*scale)));
    store(rounded, max(min(code, splat(levels)), zeros()));
    for (int j = 0; j < WIDTH; j++) codes[i + j] = rounded[j] > 0.0f ? static_cast<uint8_t>(rounded[j]) : 0;
  }
}

// One position of a packed plane; the codes of a position are `step` apart, and so are the groups' scales by their own step.
inline void store_codes(const KVStore& kv, const float* x, int slot, bool values, uint8_t* plane) {
  const int group = kv.group_size(), half = group / 2, is_half = kv.format() == KVFormat::int4;
  float* scales = reinterpret_cast<float*>(plane + kv.scales_at());
  float* offsets = reinterpret_cast<float*>(plane + kv.offsets_at());
  uint8_t* to = plane + (values ? slot * kv.value_stride() : slot);
  const int step = values ? 1 : PAGE;
  uint8_t codes[MAX_HEAD_DIM];
  for (int g = 0; g < kv.num_groups(); g++) {
    const int at = values ? slot * kv.num_groups() + g : g * PAGE + slot;
    quantize_group(x + g * group, group, is_half ? 15.0f : 255.0f, codes, scales + at, offsets + at);
    if (is_half)
      for (int i = 0; i < half; i++) codes[i] = static_cast<uint8_t>(codes[i] | codes[i + half] << 4);
    const int num_bytes = is_half ? half : group;
    scatter(codes, num_bytes, step, to + g * num_bytes * step);
  }
}

inline void store_position(const KVStore& kv, const float* x, int slot, bool values, uint8_t* plane) {
  const int dims = kv.head_dim(), step = values ? 1 : PAGE, at = values ? slot * kv.value_stride() : slot;
  switch (kv.format()) {
    case KVFormat::f32: return scatter(x, dims, step, reinterpret_cast<float*>(plane) + at);
    case KVFormat::f16: return store_halves(x, dims, step, reinterpret_cast<uint16_t*>(plane) + at);
    default: return store_codes(kv, x, slot, values, plane);
  }
}

inline void append(KVStore& kv, int row, int head, int start, int count, const float* keys, const float* values,
                   ptrdiff_t stride) {
  for (int i = 0; i < count; i++) {
    const int page = (start + i) / PAGE, slot = (start + i) % PAGE;
    store_position(kv, keys + i * stride, slot, false, kv.plane(row, head, page, false));
    store_position(kv, values + i * stride, slot, true, kv.plane(row, head, page, true));
  }
}

}  // namespace mlx_edge::MLX_EDGE_ISA
