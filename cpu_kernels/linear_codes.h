// Packed weights times int8 activations: integer dots inside a group, float32 from group to group.
//
//   y[m, n] = sum over groups g of  scale[n, g] * xscale[m, g] * (w_codes[n, g] . x_codes[m, g])  +  offset[n, g] * xsum[m, g]
//
// Few rows meet the codes as they come from memory. For many, a chunk of a block is unpacked once and all rows pass over
// it. Either way an output goes through the same sums in the same order.
#pragma once

#include <algorithm>
#include <bit>

#include "codes.h"
#include "finish.h"
#include "kernels.h"

namespace mlx_edge::MLX_EDGE_ISA {

constexpr int FEW = 2;             // rows of x that meet the codes as they come
constexpr int CHUNK = 512;         // columns unpacked at a time: 8 KiB
constexpr int ROWS_IN_FLIGHT = 128;  // rows of x whose sums wait while a block's chunks pass
constexpr int AHEAD = 3072;        // bytes that the stream of codes is asked for in advance

// Slices that are added up in a Partial before it is emptied, for codes up to `largest`: a power of two, or none.
constexpr int holds(int largest) {
  return std::min(static_cast<int>(std::bit_floor(static_cast<unsigned>(depth(largest)))), SLICES);
}

// Codes as they lie in memory.
template <class Code>
struct Stream {
  static constexpr int HOLDS = holds(Code::LARGEST);
  static constexpr bool CENTRED = SIGNED && Code::LARGEST > 127;  // codes are code - 128, the offset makes up for it
  static constexpr size_t UNIT_BYTES = static_cast<size_t>(SLICE) * Code::BITS;
  const uint8_t* at;
  size_t code_bytes, group_bytes;
  Float type;

  template <int J>
  MLX_EDGE_INLINE Bytes slice(int unit, int part) const {
    const Bytes codes = Code::template slice<J>(at + unit * UNIT_BYTES + part * sizeof(Bytes));
    return CENTRED ? minus_128(codes) : codes;
  }
  MLX_EDGE_INLINE Scales scales(int part) const {
    const Scales s = scales_of<Code>(at + code_bytes, type, part);
    return {s.scale, CENTRED ? fma(splat(128.0f), s.scale, s.offset) : s.offset};
  }
  MLX_EDGE_INLINE void next() { at += group_bytes; }
  MLX_EDGE_INLINE void ask_ahead() const {
    for (size_t i = 0; i < group_bytes; i += 64) __builtin_prefetch(at + AHEAD + i);
  }
};

// The same unpacked: a code a byte, scales and offsets as floats.
template <int H>
struct Unpacked {
  static constexpr int HOLDS = H;
  const uint8_t* codes;
  const float* numbers;  // 16 scales, 16 offsets
  size_t group_bytes;

  template <int J>
  MLX_EDGE_INLINE Bytes slice(int unit, int part) const {
    return load_bytes(codes + (unit * SLICES + J) * SLICE + part * sizeof(Bytes));
  }
  MLX_EDGE_INLINE Scales scales(int part) const {
    return {load(numbers + part * WIDTH), load(numbers + ROWS + part * WIDTH)};
  }
  MLX_EDGE_INLINE void next() { codes += group_bytes, numbers += 2 * ROWS; }
  MLX_EDGE_INLINE void ask_ahead() const {}
};

// The activations of one tile: R rows side by side, four codes of each.
struct Tile {
  const int8_t* codes;
  const float *scales, *sums;
};

// total[m][part] += one unit of the weight . R rows of x, the sums of 16 bits emptied in time.
template <int R, class Source>
MLX_EDGE_INLINE void dot_unit(const Source& w, int unit, const int8_t* x, Ints (&total)[R][PARTS]) {
  constexpr int holds = Source::HOLDS;
  Partial sum[R][PARTS];
  unroll<SLICES>([&](auto j) __attribute__((always_inline)) {
    Bytes codes[PARTS];
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; p++) codes[p] = w.template slice<j>(unit, p);
#pragma GCC unroll 8
    for (int m = 0; m < R; m++) {
      const Bytes four = four_codes(x + (j * R + m) * 4);
#pragma GCC unroll 4
      for (int p = 0; p < PARTS; p++) {
        sum[m][p] = dot(j % holds == 0 ? no_partial() : sum[m][p], codes[p], four);
        if (j % holds == holds - 1) total[m][p] = widen<1>(total[m][p], sum[m][p]);
      }
    }
  });
}

// The same where a code is too large for 16-bit sums: its low and its high half apart.
template <int R, class Source>
MLX_EDGE_INLINE void dot_unit_in_halves(const Source& w, int unit, const int8_t* x, Ints (&total)[R][PARTS]) {
#pragma GCC unroll 1
  for (int p = 0; p < PARTS; p++) {
    Partial low[R], high[R];
    unroll<SLICES>([&](auto j) __attribute__((always_inline)) {
      const Bytes codes = w.template slice<j>(unit, p);
      const Bytes low_codes = shift_and_mask<0>(codes, 15), high_codes = shift_and_mask<-4>(codes, 15);
#pragma GCC unroll 8
      for (int m = 0; m < R; m++) {
        const Bytes four = four_codes(x + (j * R + m) * 4);
        low[m] = dot(j == 0 ? no_partial() : low[m], low_codes, four);
        high[m] = dot(j == 0 ? no_partial() : high[m], high_codes, four);
      }
    });
#pragma GCC unroll 8
    for (int m = 0; m < R; m++) total[m][p] = widen<16>(widen<1>(total[m][p], low[m]), high[m]);
  }
}

// y[m][part] += `groups` groups of a block . R rows of x.
template <int R, class Source>
MLX_EDGE_INLINE void add_groups(Source w, Tile x, int groups, int units, Floats (&y)[R][PARTS]) {
  for (int g = 0; g < groups; g++) {
    w.ask_ahead();
    Ints total[R][PARTS];
#pragma GCC unroll 8
    for (int m = 0; m < R; m++)
#pragma GCC unroll 4
      for (int p = 0; p < PARTS; p++) total[m][p] = no_ints();
    for (int u = 0; u < units; u++) {
      if constexpr (Source::HOLDS == 0)
        dot_unit_in_halves(w, u, x.codes, total);
      else
        dot_unit(w, u, x.codes, total);
      x.codes += R * UNIT;
    }
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; p++) {
      const Scales s = w.scales(p);
#pragma GCC unroll 8
      for (int m = 0; m < R; m++) {
        y[m][p] = fma(to_floats(total[m][p]), mul(s.scale, splat(x.scales[m])), y[m][p]);
        y[m][p] = fma(s.offset, splat(x.sums[m]), y[m][p]);
      }
    }
    x.scales += R, x.sums += R;
    w.next();
  }
}

// sums (R, ROWS) += `groups` groups of a block . R rows of x.
template <int R, class Source>
void add_groups_to(float* sums, const Source& w, const Tile& x, int groups, int units) {
  Floats y[R][PARTS];
#pragma GCC unroll 8
  for (int m = 0; m < R; m++)
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; p++) y[m][p] = load(sums + m * ROWS + p * WIDTH);
  add_groups<R>(w, x, groups, units, y);
#pragma GCC unroll 8
  for (int m = 0; m < R; m++)
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; p++) store(sums + m * ROWS + p * WIDTH, y[m][p]);
}

template <int R, class Source>
void add_groups_to(float* sums, const Source& w, const Tile& x, int rows, int groups, int units) {
  if (rows == R)
    add_groups_to<R>(sums, w, x, groups, units);
  else if constexpr (R > 1)
    add_groups_to<R - 1>(sums, w, x, rows, groups, units);
}

// The tile that row m begins, from group g on.
inline Tile tile_of(const Rows& x, int m, int g) {
  const ptrdiff_t groups = x.columns / x.group_size, rows = std::min(TILE, x.count - m);
  const ptrdiff_t numbers = m * groups + g * rows;
  return {x.codes + static_cast<ptrdiff_t>(m) * x.columns + g * rows * x.group_size, x.scales + numbers, x.sums + numbers};
}

// Groups of one block, unpacked.
template <class Code>
void unpack(Stream<Code> w, int groups, int units, uint8_t* codes, float* numbers) {
  for (int g = 0; g < groups; g++, numbers += 2 * ROWS, w.next()) {
    for (int u = 0; u < units; u++, codes += SLICES * SLICE)
      unroll<SLICES>([&](auto j) __attribute__((always_inline)) {
        for (int p = 0; p < PARTS; p++) store_bytes(codes + j * SLICE + p * sizeof(Bytes), w.template slice<j>(u, p));
      });
    for (int p = 0; p < PARTS; p++) {
      const Scales s = w.scales(p);
      store(numbers + p * WIDTH, s.scale);
      store(numbers + ROWS + p * WIDTH, s.offset);
    }
  }
}

template <class Code>
Stream<Code> stream_of(const Matrix& w, int block, int group) {
  const size_t codes = static_cast<size_t>(ROWS) * w.group_size * w.bits / 8, bytes = group_bytes(w);
  const size_t index = static_cast<size_t>(block) * (w.columns / w.group_size) + group;
  return {w.data + index * bytes, codes, bytes, w.float_type};
}

template <class Code>
void multiply_few(const Matrix& w, const Rows& x, const Output& y, int begin, int end) {
  const int groups = w.columns / w.group_size, units = w.group_size / UNIT;
  for (int block = begin; block < end; block++) {
    float sums[FEW * ROWS] = {};
    add_groups_to<FEW>(sums, stream_of<Code>(w, block, 0), tile_of(x, 0, 0), x.count, groups, units);
    finish(w, y, block, 0, x.count, sums);
  }
}

template <class Code>
void multiply_many(const Matrix& w, const Rows& x, const Output& y, int begin, int end) {
  alignas(64) uint8_t codes[CHUNK * ROWS];
  alignas(64) float numbers[CHUNK / UNIT * 2 * ROWS];
  alignas(64) float sums[ROWS_IN_FLIGHT * ROWS];
  const int groups = w.columns / w.group_size, units = w.group_size / UNIT, step = CHUNK / w.group_size;
  for (int block = begin; block < end; block++)
    for (int first = 0; first < x.count; first += ROWS_IN_FLIGHT) {
      const int last = std::min(first + ROWS_IN_FLIGHT, x.count);
      std::fill(sums, sums + (last - first) * ROWS, 0.0f);
      for (int g = 0; g < groups; g += step) {
        const int count = std::min(step, groups - g);
        unpack(stream_of<Code>(w, block, g), count, units, codes, numbers);
        const Unpacked<holds(Code::LARGEST)> unpacked{codes, numbers, static_cast<size_t>(w.group_size) * ROWS};
        for (int m = first; m < last; m += TILE)
          add_groups_to<TILE>(sums + (m - first) * ROWS, unpacked, tile_of(x, m, g), std::min(TILE, last - m), count, units);
      }
      finish(w, y, block, first, last, sums);
    }
}

template <class Code>
void multiply_codes(const Matrix& w, const Rows& x, const Output& y, int begin, int end) {
  if (x.count <= FEW)
    multiply_few<Code>(w, x, y, begin, end);
  else
    multiply_many<Code>(w, x, y, begin, end);
}

}  // namespace mlx_edge::MLX_EDGE_ISA
