// qmv_norm, qmv_res, qmv_glu: the products of decoding, for 1 to 16 rows of x, lanes along K.
//
//   qmv_norm  y = norm(x) W^T + bias, W one to three matrices side by side; also without the norm
//   qmv_res   y = residual + x W^T + bias
//   qmv_glu   y = activation(norm(x) G^T) * (norm(x) U^T), with their biases
//
// x (M, K), W (N, K) packed, y (M, N): M is data, K and N are templates. The norm's 1 / rms is taken out of the sum:
// a lane sums x * weight against codes, and x^2 beside it.
//
// Grid: a threadgroup has TILE outputs of one matrix (qmv_glu: of both) for all M rows, and TILE is chosen so that no
// two share a 128-byte line of scales. A simdgroup has SPAN rows of W, and one of PARTS shares of K when N is small.
// A lane takes RUN values of each row at a time; the last block of a row is read by the lanes that still have one.
// Memory: weights once for all M rows; x once per simdgroup, from cache. Threadgroup memory: PARTS * M * (TILE + 1)
// floats, one barrier.
// Order: a lane adds its runs in order, lanes by simd_sum, parts in order; M, ROWS and SPAN do not show in it, so a row
// has the bits that it has alone.
// Tolerance: 0.51 ulp_T(y) + 2^-22 sqrt(K) |w_row| |x|, x after the norm; qmv_glu: carried through the activation.

#include "epilogue.metal"

namespace mlx_edge {

constant constexpr uint LANES = 32;
constant constexpr int PIECE = 8;

// PAIR: half of a simdgroup's rows of W are the gate's (`first`), half are up's (`second`); else both are one matrix.
template <int BITS, bool MXFP4, int RUN, int GROUP, int K, int ROWS, int SPAN, int TILE, int PARTS, bool PAIR,
          bool NORM, typename T, typename Norm, typename W>
struct Product {
  const device T* x;
  uint num_rows;
  Norm norm;
  W first, second;
  uint rows[SPAN];  // of W
  float sums[ROWS * SPAN], squares[ROWS];

  // Adds run `run` of x times the rows of W to sums[row of x][row of W], and of x^2 to squares[row of x].
  void add_run(uint run) thread {
    constexpr int WORDS = RUN * BITS / 32;
    uint words[SPAN][WORDS];
    float2 scales[SPAN];
    UNROLL for (int r = 0; r < SPAN; r++) {
      const W weight = r < SPAN / 2 ? first : second;
      UNROLL for (int i = 0; i < WORDS; i++) {
        words[r][i] = read_word<BITS>(weight.packs, (rows[r] * (K / RUN) + run) * WORDS + i);
      }
      const uint group = rows[r] * (K / GROUP) + run * RUN / GROUP;
      scales[r] = read_scale<BITS, MXFP4>(weight.scales, weight.offsets, group);
    }
    UNROLL for (int piece = 0; piece < RUN / PIECE; piece++) {
      const uint k = run * RUN + piece * PIECE;
      float w[SPAN][PIECE], gains[PIECE];
      UNROLL for (int r = 0; r < SPAN; r++) {
        unpack_piece<BITS, MXFP4>(words[r], piece, w[r]);
      }
      UNROLL for (int i = 0; i < PIECE; i++) {
        gains[i] = NORM ? float(norm[k + i]) : 1.0f;
      }
      UNROLL for (int m = 0; m < ROWS; m++) {
        const uint place = min(uint(m), num_rows - 1) * K + k;  // rows beyond repeat the last
        float values[PIECE];
        float total = 0.0f;
        UNROLL for (int i = 0; i < PIECE; i++) {
          const float value = float(x[place + i]);
          squares[m] = fma(value, value, squares[m]);
          values[i] = value * gains[i];
          total = fma(value, gains[i], total);
        }
        UNROLL for (int r = 0; r < SPAN; r++) {
          float dot = 0.0f;
          UNROLL for (int i = 0; i < PIECE; i++) {
            dot = fma(w[r][i], values[i], dot);
          }
          thread float& sum = sums[m * SPAN + r];
          if (BITS < 32 && !MXFP4) {
            sum = fma(scales[r].y, total, sum);
          }
          sum = fma(scales[r].x, dot, sum);
        }
      }
    }
  }

  // The simdgroup's rows of W for all rows of x, added up in threadgroup memory (see epilogue.metal). Ends with a
  // barrier.
  void multiply(Tile tile, threadgroup float* shared, uint simdgroup, uint lane) thread {
    constexpr int SLOTS = PAIR ? 2 * TILE : TILE;
    constexpr uint BLOCKS = SLOTS / SPAN;  // simdgroups beside each other along N
    constexpr uint WIDTH = PAIR ? SPAN / 2 : SPAN;
    const uint block = simdgroup % BLOCKS;
    const uint part = simdgroup / BLOCKS;
    UNROLL for (int r = 0; r < SPAN; r++) {
      rows[r] = min(tile.first + block * WIDTH + r % WIDTH, tile.rows - 1);  // rows beyond repeat the last
    }
    for (uint run = part * LANES + lane; run < K / RUN; run += LANES * PARTS) {
      add_run(run);
    }
    UNROLL for (int m = 0; m < ROWS; m++) {
      UNROLL for (int r = 0; r < SPAN; r++) {
        const float sum = simd_sum(sums[m * SPAN + r]);
        if (lane == 0) {
          shared[(part * ROWS + m) * SLOTS + r / WIDTH * TILE + block * WIDTH + r % WIDTH] = sum;
        }
      }
      if (NORM) {
        const float square = simd_sum(squares[m]);
        if (lane == 0 && block == 0) {
          shared[(PARTS * SLOTS + part) * ROWS + m] = square;
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
};

}  // namespace mlx_edge
