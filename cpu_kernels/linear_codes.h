// Packed weights times int8 activations: integer dots inside a group, float32 from group to group.
//
//   y[m, n] = sum over groups g of  scale[n, g] * xscale[m, g] * (w_codes[n, g] . x_codes[m, g])  +  offset[n, g] * xsum[m, g]
//
// A tile of rows meets a block's codes as they lie, for the first tile in memory and for the others in the cache. Codes that
// were unpacked once for all tiles were tried: what is saved in shifts is lost in waiting for memory and in twice the bytes.
#pragma once

#include <algorithm>
#include <bit>

#include "codes.h"
#include "finish.h"
#include "kernels.h"

namespace mlx_edge::MLX_EDGE_ISA {

constexpr int AHEAD = 3072;  // bytes that the stream of codes is asked for in advance

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

// The activations of one tile: R rows side by side, four codes of each.
struct Tile {
  const int8_t* codes;
  const float *scales, *sums;
};

// total[m][part] += one unit of the weight . R rows of x, the sums of 16 bits emptied in time.
template <int R, class Code>
MLX_EDGE_INLINE void dot_unit(const Stream<Code>& w, int unit, const int8_t* x, Ints (&total)[R][PARTS]) {
  constexpr int holds = Stream<Code>::HOLDS;
  Partial sum[R][PARTS];
  unroll<SLICES>([&](auto j) MLX_EDGE_ALWAYS_INLINE {
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
template <int R, class Code>
MLX_EDGE_INLINE void dot_unit_in_halves(const Stream<Code>& w, int unit, const int8_t* x, Ints (&total)[R][PARTS]) {
#pragma GCC unroll 1
  for (int p = 0; p < PARTS; p++) {
    Partial low[R], high[R];
    unroll<SLICES>([&](auto j) MLX_EDGE_ALWAYS_INLINE {
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
template <int R, class Code>
MLX_EDGE_INLINE void add_groups(Stream<Code> w, Tile x, int groups, int units, Floats (&y)[R][PARTS]) {
  for (int g = 0; g < groups; g++) {
    w.ask_ahead();
    Ints total[R][PARTS];
#pragma GCC unroll 8
    for (int m = 0; m < R; m++)
#pragma GCC unroll 4
      for (int p = 0; p < PARTS; p++) total[m][p] = no_ints();
    for (int u = 0; u < units; u++) {
      if constexpr (Stream<Code>::HOLDS == 0)
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

// sums (rows, ROWS) = one block . a tile of that many rows of x.
template <int R, class Code>
void multiply_tile(const Stream<Code>& w, const Tile& x, int rows, int groups, int units, float* sums) {
  if constexpr (R > 1)
    if (rows < R) return multiply_tile<R - 1>(w, x, rows, groups, units, sums);
  Floats y[R][PARTS];
#pragma GCC unroll 8
  for (int m = 0; m < R; m++)
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; p++) y[m][p] = zeros();
  add_groups<R>(w, x, groups, units, y);
#pragma GCC unroll 8
  for (int m = 0; m < R; m++)
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; p++) store(sums + m * ROWS + p * WIDTH, y[m][p]);
}

// The tile that row m begins.
inline Tile tile_of(const Rows& x, int m) {
  const ptrdiff_t numbers = static_cast<ptrdiff_t>(m) * (x.columns / x.group_size);
  return {x.codes + static_cast<ptrdiff_t>(m) * x.columns, x.scales + numbers, x.sums + numbers};
}

template <class Code>
void multiply_codes(const Matrix& w, const Rows& x, const Output& y, int begin, int end) {
  const int groups = w.columns / w.group_size, units = w.group_size / UNIT;
  const size_t codes = static_cast<size_t>(ROWS) * w.group_size * w.bits / 8, bytes = group_bytes(w);
  for (int block = begin; block < end; block++) {
    const Stream<Code> stream{w.data + static_cast<size_t>(block) * groups * bytes, codes, bytes, w.float_type};
    for (int m = 0; m < x.count; m += TILE) {
      alignas(64) float sums[TILE * ROWS];
      const int last = std::min(m + TILE, x.count);
      multiply_tile<TILE>(stream, tile_of(x, m), last - m, groups, units, sums);
      finish(w, y, block, m, last, sums);
    }
  }
}

}  // namespace mlx_edge::MLX_EDGE_ISA
