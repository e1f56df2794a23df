// What a product begins and ends with: its tile of outputs; parts joined, norm, bias, residual or activation.
//
//   y = sum / sqrt(squares / K + eps) + bias (+ residual)        y = activation(gate) * up, both of them such a y
//
// `sums` lies in threadgroup memory as [part][row of x][slot] floats and, behind them, the parts' sums of squares as
// [part][row of x]; a tile's slots are the gate's TILE rows and then up's. All was written before a barrier. A result is
// rounded once. Multiply-adds are spelled out: no compiler's choice lets the kernel around it decide a row's bits.
//
// Pointers are template parameters: dtypes vary, and MLX passes inputs of fewer than eight elements as `constant`.

#include "unpack.metal"

namespace mlx_edge {
using namespace metal;

// The outputs of a threadgroup, among up to three matrices that lie side by side in y.
struct Tile {
  uint first;   // row of the matrix
  uint matrix;
  uint rows;    // of the matrix
  uint column;  // of y, where the matrix begins
};

template <int TILE, int N0, int N1, int N2>
inline Tile find_tile(uint index) {
  const uint sizes[3] = {N0, N1, N2};
  Tile tile = {index * TILE, 0, N0, 0};
  while (tile.first >= tile.rows) {
    tile.first -= (tile.rows + TILE - 1) / TILE * TILE;
    tile.column += tile.rows;
    tile.rows = sizes[++tile.matrix];
  }
  return tile;
}

// One matrix. What it has not is any pointer, and not read.
template <typename Packs, typename Scales, typename Offsets, typename Bias>
struct Weight {
  Packs packs;
  Scales scales;
  Offsets offsets;
  Bias bias;
};

// 0: z * sigmoid(z). 1: z * (1 + tanh(u)) / 2 with u = sqrt(2 / pi) * (z + 0.044715 z^3), which is z * sigmoid(2u).
template <int ACTIVATION>
inline float activate(float z) {
  const float exponent = ACTIVATION == 0 ? z : 1.5957691216f * z * fma(0.044715f * z, z, 1.0f);
  return z / (1.0f + precise::exp(-exponent));
}

// Writes the tile of y (num_rows, COLUMNS); PAIR: of gate `first` and up `second`.
template <int ROWS, int TILE, int PARTS, int THREADS, int K, int COLUMNS, bool PAIR, bool NORM, bool BIAS,
          bool RESIDUAL, int ACTIVATION, typename T, typename Params, typename W, typename Residual>
inline void finish(const threadgroup float* sums, uint num_rows, Tile tile, Params params, W first, W second,
                   Residual residual, device T* y, uint thread_index) {
  constexpr int SLOTS = PAIR ? 2 * TILE : TILE;
  for (uint i = thread_index; i < num_rows * TILE; i += THREADS) {
    const uint m = i / TILE;
    const uint row = tile.first + i % TILE;
    if (row >= tile.rows) {
      continue;
    }
    float factor = 1.0f;
    if (NORM) {
      float squares = 0.0f;
      for (int part = 0; part < PARTS; part++) {
        squares += sums[(PARTS * SLOTS + part) * ROWS + m];
      }
      factor = precise::rsqrt(squares / K + float(params[0]));
    }
    float values[2];
    UNROLL for (int w = 0; w < 1 + PAIR; w++) {
      float sum = 0.0f;
      for (int part = 0; part < PARTS; part++) {
        sum += sums[(part * ROWS + m) * SLOTS + w * TILE + i % TILE];
      }
      const W weight = w == 0 ? first : second;
      values[w] = fma(sum, factor, BIAS ? float(weight.bias[row]) : 0.0f);
    }
    const uint place = m * COLUMNS + tile.column + row;
    float value = PAIR ? activate<ACTIVATION>(values[0]) * values[1] : values[0];
    if (RESIDUAL) {
      value += float(residual[place]);
    }
    y[place] = T(value);
  }
}

}  // namespace mlx_edge
