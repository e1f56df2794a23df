// What an instruction set provides: a table of kernels, each over a range of its work, without threads and without MLX.
//
// `blocks.cpp` puts them together and shares ranges out to the pool. Everything between kernels is float32.
// M rows of activations, K columns, N rows of a weight; H query heads, D head dim.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kv_store.h"
#include "matrix.h"

namespace mlx_edge {

enum class Precision : int { int8 = 0, floating = 1 };
enum class Activation : int { silu = 0, gelu_tanh = 1, swiglu_oai = 2 };

constexpr int RUN_KEYS = 64;     // of attention inside runs: keys that a tile of queries meets together
constexpr int RUN_QUERIES = 48;  // the most queries of a call

// What becomes of a score, and who is seen.
struct ScoreRule {
  float scale;
  int window;         // the layer's; 0 or less: all
  float softcap = 0;  // scores become softcap * tanh(score / softcap); 0: they stay
};

// The rows that are multiplied: as floats, and as int8 codes per group when a quantized weight takes them so.
// The codes' layout is private to the instruction set (linear.h): tiles of rows side by side.
struct Rows {
  const float* values;  // (M, K), row m at values + m * stride
  ptrdiff_t stride;
  int count;            // M
  int columns;          // K
  int group_size;       // of the codes
  int8_t* codes;        // null when only floats are wanted
  float* scales;        // value = scale * code
  float* sums;          // scale * (sum of a group's codes): what an offset is multiplied with
};

struct Kernels {
  const char* name;

  // Bytes that codes, scales and sums of M rows take (64-byte aligned parts).
  size_t (*codes_bytes)(int rows, int columns);
  size_t (*scales_count)(int rows, int columns, int group_size);
  // Fills codes, scales and sums of rows [begin, end) x groups [first_group, last_group) from values.
  void (*quantize)(const Rows& x, int begin, int end, int first_group, int last_group);

  // y[m * stride + n] = add + x . w[n] + bias[n] for all M rows and the weight's blocks [begin, end). `add` may be null
  // and may be y. Uses x.codes for quantized weights when they are there and x.values otherwise.
  void (*multiply)(const Matrix& w, const Rows& x, const float* add, float* y, ptrdiff_t stride, int begin, int end);

  // y = x / sqrt(mean(x^2) + eps) * weight over n elements; y may be x.
  void (*rms_norm)(const float* x, const float* weight, float eps, float* y, int n);
  // y = activation(gate) * up over n elements; y may be gate.
  void (*glu)(Activation activation, const float* gate, const float* up, float* y, int n);
  // Turns one head of `dims` (of D) in place by cos and sin (dims / 2 each); pairs (i, i + dims / 2) or (2i, 2i + 1).
  void (*rotate)(float* head, const float* cos, const float* sin, int dims, bool is_interleaved);
  // x = scale * x over n elements, then softcap * tanh(x / softcap) where softcap is not 0.
  void (*cap)(float* x, float scale, float softcap, int n);
  // Index of the largest of n; the first one when several are equal, NaN never wins.
  int (*argmax)(const float* x, int n);

  // The largest of n numbers.
  float (*largest)(const float* x, int n);
  // The sum of exp(x - shift) over n.
  float (*sum_exp)(const float* x, float shift, int n);

  // Stores `count` positions of one row of the batch and one kv head, from `start` on: keys and values (count, D) with
  // `stride` between positions.
  void (*append)(KVStore& kv, int row, int head, int start, int count, const float* keys, const float* values,
                 ptrdiff_t stride);
  // Attention of `count` queries (D) of one row of the batch that share one kv head: query i stands at positions[i] and
  // sees positions p with positions[i] - window < p <= positions[i], as far as the store has them: those in kv.window(), and
  // those below kv.keep(). A position of -1 sees nothing and gives zeros. `sinks` (count), or null: a score more for each
  // query, of a value of zeros. A query's result does not depend on its neighbours in the call.
  void (*attend)(const KVStore& kv, int row, int head, int count, const float* const* q, float* const* y,
                 const int* positions, const ScoreRule& rule, const float* sinks);

  // Turns at most RUN_KEYS keys (count, D) into (D, RUN_KEYS), zeros behind them.
  void (*turn_keys)(const float* keys, int count, int dim, float* to);
  // Attention of at most RUN_QUERIES queries (count, D) over all keys of a run, in blocks that were turned, and its values
  // (num_keys, stride), stride a multiple of DIMS: y (count, D).
  void (*attend_run)(const float* q, int count, const float* turned, const float* values, int stride, int num_keys, int dim,
                     float scale, float* y);
};

// The best table for this machine, or the one named by MLX_EDGE_CPU_ISA; null when the named one cannot run here.
const Kernels* find_kernels(const char* name = nullptr);

}  // namespace mlx_edge
