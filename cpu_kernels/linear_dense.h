// Rows of floats times rows of floats, both as they lie in memory: dense weights, and packed ones that are multiplied
// with float activations (a chunk of their rows is turned into floats first).
//
// An output is a vector of WIDTH sums over a chunk of K, added up at the chunk's end, chunk after chunk. Every path goes
// through that order.
#pragma once

#include <algorithm>
#include <type_traits>

#include "codes.h"
#include "finish.h"
#include "kernels.h"

namespace mlx_edge::MLX_EDGE_ISA {

constexpr int DENSE_CHUNK = 1024;  // columns
constexpr int QUAD = 4;            // rows of the weight that share a pass over the activations

template <Float T>
using Element = std::conditional_t<T == Float::f32, float, uint16_t>;

template <Float T>
MLX_EDGE_INLINE Floats load_as(const Element<T>* p) {
  if constexpr (T == Float::f32)
    return load(p);
  else if constexpr (T == Float::f16)
    return load_f16(p);
  else
    return load_bf16(p);
}

// The last columns of a row that do not fill a vector, zeros behind them.
template <Float T>
inline Floats load_tail(const Element<T>* p, int count) {
  Element<T> padded[WIDTH] = {};
  std::copy(p, p + count, padded);
  return load_as<T>(padded);
}

// sums (R, ROWS) at [m][0..3] += R rows of x . four rows of the weight over one chunk of `columns`.
template <Float T, int R>
void add_quad(const Element<T>* const (&w)[QUAD], const float* x, ptrdiff_t stride, int columns, float* sums) {
  Floats sum[R][QUAD];
#pragma GCC unroll 8
  for (int m = 0; m < R; m++)
#pragma GCC unroll 4
    for (int c = 0; c < QUAD; c++) sum[m][c] = zeros();
  int k = 0;
  for (; k + WIDTH <= columns; k += WIDTH) {
    Floats row[R];
#pragma GCC unroll 8
    for (int m = 0; m < R; m++) row[m] = load(x + m * stride + k);
#pragma GCC unroll 4
    for (int c = 0; c < QUAD; c++) {
      const Floats weight = load_as<T>(w[c] + k);
#pragma GCC unroll 8
      for (int m = 0; m < R; m++) sum[m][c] = fma(weight, row[m], sum[m][c]);
    }
  }
  for (int m = 0; m < R; m++)
    for (int c = 0; c < QUAD; c++) {
      if (k < columns)
        sum[m][c] = fma(load_tail<T>(w[c] + k, columns - k), load_tail<Float::f32>(x + m * stride + k, columns - k), sum[m][c]);
      sums[m * ROWS + c] += sum_of(sum[m][c]);
    }
}

template <Float T, int R = DENSE_TILE>
void add_quad(int rows, const Element<T>* const (&w)[QUAD], const float* x, ptrdiff_t stride, int columns, float* sums) {
  if (rows == R)
    add_quad<T, R>(w, x, stride, columns, sums);
  else if constexpr (R > 1)
    add_quad<T, R - 1>(rows, w, x, stride, columns, sums);
}

// Few rows: the weight straight from memory, four rows of it side by side.
template <Float T>
void multiply_dense_few(const Matrix& w, const Rows& x, const Output& y, int begin, int end) {
  const Element<T>* data = reinterpret_cast<const Element<T>*>(w.data);
  for (int block = begin; block < end; block++) {
    float sums[DENSE_TILE * ROWS] = {};
    for (int quad = 0; quad < ROWS && block * ROWS + quad < w.rows; quad += QUAD)
      for (int k = 0; k < w.columns; k += DENSE_CHUNK) {
        const Element<T>* rows[QUAD];
        for (int c = 0; c < QUAD; c++) {  // rows beyond the weight repeat its last one; finish() drops them
          const ptrdiff_t n = std::min(block * ROWS + quad + c, w.rows - 1);
          rows[c] = data + n * w.columns + k;
        }
        add_quad<T>(x.count, rows, x.values + k, x.stride, std::min(DENSE_CHUNK, w.columns - k), sums + quad);
      }
    finish(w, y, block, 0, x.count, sums);
  }
}

// One chunk of a block's rows as floats, (ROWS, DENSE_CHUNK); rows beyond the weight are left alone.
template <Float T>
struct DenseRows {
  static void fill(const Matrix& w, int block, int k, int columns, float* to) {
    for (int r = 0; r < std::min(ROWS, w.rows - block * ROWS); r++, to += DENSE_CHUNK) {
      const Element<T>* from = reinterpret_cast<const Element<T>*>(w.data) + (static_cast<ptrdiff_t>(block) * ROWS + r) * w.columns + k;
      int i = 0;
      for (; i + WIDTH <= columns; i += WIDTH) store(to + i, load_as<T>(from + i));
      if (i < columns) store(to + i, load_tail<T>(from + i, columns - i));
    }
  }
};

template <class Code>
struct PackedRows {
  static void fill(const Matrix& w, int block, int k, int columns, float* to) {
    const size_t code_bytes = static_cast<size_t>(ROWS) * w.group_size * w.bits / 8, bytes = group_bytes(w);
    const int groups = w.columns / w.group_size;
    const uint8_t* group = w.data + (static_cast<size_t>(block) * groups + k / w.group_size) * bytes;
    for (int i = 0; i < columns; i += w.group_size, group += bytes) {
      alignas(64) float numbers[2][ROWS];
      for (int p = 0; p < PARTS; p++) {
        const Scales s = scales_of<Code>(group + code_bytes, w.float_type, p);
        store(numbers[0] + p * WIDTH, s.scale);
        store(numbers[1] + p * WIDTH, s.offset);
      }
      for (int u = 0; u < w.group_size / UNIT; u++)
        fill_unit(group + static_cast<size_t>(u) * SLICE * w.bits, numbers, to + i + u * UNIT);
    }
  }

  static void fill_unit(const uint8_t* unit, const float (&numbers)[2][ROWS], float* to) {
    alignas(64) uint8_t codes[SLICES * SLICE], rows[ROWS][UNIT];
    unroll<SLICES>([&](auto j) MLX_EDGE_ALWAYS_INLINE {
      for (int p = 0; p < PARTS; p++)
        store_bytes(codes + j * SLICE + p * sizeof(Bytes), Code::template slice<j>(unit + p * sizeof(Bytes)));
    });
    for (int j = 0; j < SLICES; j++)
      for (int r = 0; r < ROWS; r++) std::memcpy(rows[r] + 4 * j, codes + j * SLICE + 4 * r, 4);
    for (int r = 0; r < ROWS; r++)
      for (int i = 0; i < UNIT; i += WIDTH)
        store(to + r * DENSE_CHUNK + i, fma(splat(numbers[0][r]), load_u8(rows[r] + i), splat(numbers[1][r])));
  }
};

// Many rows, or a packed weight: a chunk of a block as floats once, all rows of x over it.
template <class Source>
void multiply_as_floats(const Matrix& w, const Rows& x, const Output& y, int begin, int end) {
  constexpr int in_flight = DENSE_TILE * 32;
  alignas(64) float sums[in_flight * ROWS];
  alignas(64) float panel[ROWS * DENSE_CHUNK];
  std::fill(panel, panel + ROWS * DENSE_CHUNK, 0.0f);
  for (int block = begin; block < end; block++)
    for (int first = 0; first < x.count; first += in_flight) {
      const int last = std::min(first + in_flight, x.count);
      std::fill(sums, sums + (last - first) * ROWS, 0.0f);
      for (int k = 0; k < w.columns; k += DENSE_CHUNK) {
        const int columns = std::min(DENSE_CHUNK, w.columns - k);
        Source::fill(w, block, k, columns, panel);
        for (int m = first; m < last; m += DENSE_TILE)
          for (int quad = 0; quad < ROWS; quad += QUAD) {
            const float* rows[QUAD];
            for (int c = 0; c < QUAD; c++) rows[c] = panel + (quad + c) * DENSE_CHUNK;
            add_quad<Float::f32>(std::min(DENSE_TILE, last - m), rows, x.values + m * x.stride + k, x.stride, columns,
                                 sums + (m - first) * ROWS + quad);
          }
      }
      finish(w, y, block, first, last, sums);
    }
}

template <Float T>
void multiply_dense(const Matrix& w, const Rows& x, const Output& y, int begin, int end) {
  if (x.count <= DENSE_TILE)
    multiply_dense_few<T>(w, x, y, begin, end);
  else
    multiply_as_floats<DenseRows<T>>(w, x, y, begin, end);
}

}  // namespace mlx_edge::MLX_EDGE_ISA
