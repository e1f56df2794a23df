// qmm_norm, qmm_res, qmm_glu: qmv.metal's three products for 4 to 16 rows of x, on 8x8 matrices.
//
// A matrix product is W (8 rows, 8 of K) times x^T (8 of K, 8 rows). Which eight of K meet in one is free, so each lane
// takes what lies together: of a row of W four lanes read RUN values each, and unpack them 16 at a time; element 2j of
// product t is value t of lane j's 16, element 2j + 1 is value t + 8. The lanes that hold row e of x^T's tile read the
// eight values that belong to it. So nothing is staged: x goes from memory to a matrix as W does.
//
// Grid: a threadgroup has TILE outputs (qmv_glu: of both matrices) for all M rows; it is 2 simdgroups along N, each with
// two tiles of 8 rows of W, times PARTS = 4 along K, which take blocks of 4 * RUN values in turn.
// Memory: weights once for all M rows, a line of them at a time; x twice per threadgroup, from cache. Threadgroup
// memory: 4 * ROWS * 33 floats, 8.25 KiB for 16 rows; one barrier.
// Order: products in order of K, then parts in order; rows of x never meet, so M does not show in a row. It is not
// qmv.metal's order. Weights are scaled before the product, in float32.
// Tolerance: as qmv.metal's.

#include <metal_simdgroup_matrix>
#include "epilogue.metal"

namespace mlx_edge {

constant constexpr int EDGE = 8;
constant constexpr int TILES = 2;  // of W, a simdgroup

// The lane's two elements, which lie side by side in a row.
inline thread float2& elements(thread simdgroup_float8x8& matrix) {
  return reinterpret_cast<thread float2&>(matrix.thread_elements());
}

// PAIR: one tile of a simdgroup's W is the gate's (`first`), one is up's (`second`); else both are of one matrix.
template <int BITS, bool MXFP4, int RUN, int GROUP, int K, int ROWS, int SPAN, int TILE, int PARTS, bool PAIR,
          bool NORM, typename T, typename Norm, typename W>
struct Product {
  static constant constexpr int BANDS = ROWS / EDGE;  // tiles of x
  const device T* x;
  uint num_rows;
  Norm norm;
  W first, second;
  uint row, column;  // the lane's place in a matrix
  uint rows[TILES];  // of W
  float squares[2 * BANDS];

  // Adds block `block` of W x^T to sums[tile of W][tile of x], and of x^2 to squares: the lane's two rows of each tile.
  void add_block(uint block, thread simdgroup_float8x8* sums) thread {
    constexpr int WORDS = RUN * BITS / 32;
    constexpr uint RUNS = K / RUN;
    const uint run = min(block * 4 + column / 2, RUNS - 1);
    uint words[TILES][WORDS];
    UNROLL for (int t = 0; t < TILES; t++) {
      UNROLL for (int i = 0; i < WORDS; i++) {
        words[t][i] = read_word<BITS>(t == 0 ? first.packs : second.packs, (rows[t] * RUNS + run) * WORDS + i);
      }
    }
    const uint other = block * 4 + row / 2;
    const uint start = min(other, RUNS - 1) * RUN + row % 2 * EDGE;
    UNROLL for (int step = 0; step < RUN / 16; step++) {
      float values[2 * BANDS][EDGE];
      UNROLL for (int q = 0; q < 2 * BANDS; q++) {
        const uint m = min(q / 2 * EDGE + column + q % 2, num_rows - 1);  // rows beyond repeat the last
        UNROLL for (int i = 0; i < EDGE; i++) {
          const uint k = start + step * 16 + i;
          const float value = other < RUNS ? float(x[m * K + k]) : 0.0f;
          squares[q] = fma(value, value, squares[q]);
          values[q][i] = NORM ? value * float(norm[k]) : value;
        }
      }
      UNROLL for (int t = 0; t < TILES; t++) {
        const W weight = t == 0 ? first : second;
        const uint group = rows[t] * (K / GROUP) + (run * RUN + step * 16) / GROUP;
        const float2 scale = read_scale<BITS, MXFP4>(weight.scales, weight.offsets, group);
        float w[2 * EDGE];
        unpack_piece<BITS, MXFP4>(words[t], 2 * step, w);
        unpack_piece<BITS, MXFP4>(words[t], 2 * step + 1, w + EDGE);
        UNROLL for (int i = 0; i < EDGE; i++) {
          simdgroup_float8x8 left, right;
          elements(left) = float2(fma(scale.x, w[i], scale.y), fma(scale.x, w[i + EDGE], scale.y));
          UNROLL for (int band = 0; band < BANDS; band++) {
            elements(right) = float2(values[2 * band][i], values[2 * band + 1][i]);
            simdgroup_multiply_accumulate(sums[t * BANDS + band], left, right, sums[t * BANDS + band]);
          }
        }
      }
    }
  }

  // The simdgroup's rows of W for all rows of x, added up in threadgroup memory (see epilogue.metal). Ends with a
  // barrier.
  void multiply(Tile tile, threadgroup float* shared, uint simdgroup, uint lane) thread {
    constexpr int SLOTS = PAIR ? 2 * TILE : TILE;
    constexpr uint BLOCKS = SLOTS / SPAN;  // simdgroups beside each other along N
    constexpr uint WIDTH = PAIR ? EDGE : SPAN;
    const uint block = simdgroup % BLOCKS;
    const uint part = simdgroup / BLOCKS;
    row = (lane / 4 & 4) + lane / 2 % 4;
    column = (lane / 4 & 2) * 2 + lane % 2 * 2;
    simdgroup_float8x8 sums[TILES * BANDS];
    UNROLL for (int t = 0; t < TILES; t++) {
      rows[t] = min(tile.first + block * WIDTH + t * EDGE % WIDTH + row, tile.rows - 1);  // rows beyond repeat the last
    }
    UNROLL for (int i = 0; i < TILES * BANDS; i++) {
      sums[i] = simdgroup_float8x8(0.0f);
    }
    for (uint i = part; i * 4 < K / RUN; i += PARTS) {
      add_block(i, sums);
    }
    UNROLL for (int i = 0; i < TILES * BANDS; i++) {
      const uint r = i / BANDS * EDGE;
      const uint slot = r / WIDTH * TILE + block * WIDTH + r % WIDTH + row;
      const uint m = part * ROWS + i % BANDS * EDGE + column;
      shared[m * SLOTS + slot] = elements(sums[i]).x;
      shared[(m + 1) * SLOTS + slot] = elements(sums[i]).y;
    }
    UNROLL for (int q = 0; q < 2 * BANDS && NORM; q++) {
      float square = squares[q];
      for (uint bit = 2; bit < 32; bit *= bit) {  // 2, 4, 16: the lanes of the same column
        square += simd_shuffle_xor(square, bit);
      }
      if (block == 0 && row == 0) {
        shared[(PARTS * SLOTS + part) * ROWS + q / 2 * EDGE + column + q % 2] = square;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
};

}  // namespace mlx_edge
