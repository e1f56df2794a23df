// The blocks of a model over one instruction set's kernels and the pool: what one MLX primitive each computes.
//
// All activations are float32, x and y are (M, E) rows one after another; long prompts go through in slices of rows, so
// that scratch memory stays small and no score matrix exists. Knows no MLX.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "kernels.h"
#include "kv_store.h"

namespace mlx_edge {

// A matrix and whatever keeps its memory.
struct Weight {
  Matrix matrix;
  std::vector<float> bias;
  std::shared_ptr<const void> memory;

  Matrix view() const {
    Matrix w = matrix;
    w.bias = bias.empty() ? nullptr : bias.data();
    return w;
  }
};
using WeightPtr = std::shared_ptr<const Weight>;

struct Norm {
  std::vector<float> weight;
  float eps = 0;
};

struct Rope {
  std::vector<float> periods;  // pair i turns by position / periods[i] radians
  int dims = 0;
  bool is_interleaved = false;
  float magnitude = 1;
};

struct AttentionLayer {
  Norm norm;
  WeightPtr q, k, v, o;
  int num_heads = 0, num_kv_heads = 0, head_dim = 0;
  float scale = 0;
  std::optional<Norm> q_norm, k_norm;
  std::optional<Rope> rope;
  int window = 0;  // 0: sees all
};

struct MLPLayer {
  Norm norm;
  WeightPtr gate, up, down;
  Activation activation = Activation::silu;
};

struct HeadLayer {
  Norm norm;
  WeightPtr projection;
};

// Where the rows of a step stand: sequence b brings lengths[b] positions, from starts[b] on. They stand in `width` rows each,
// padded, or when ragged one sequence after another in `width` rows together.
struct Step {
  std::vector<int> starts, lengths;
  int width = 0;
  bool is_ragged = false;

  int num_rows() const { return (is_ragged ? 1 : static_cast<int>(starts.size())) * width; }
};

// What a step's sequences store in: one store with a row for each, or when the step is ragged a store of one row for each.
using Stores = std::vector<KVStore*>;

void linear(const Weight& w, Precision precision, const float* x, float* y, int num_rows);
// Throws std::invalid_argument when the step, its stores and the layer do not fit each other.
void check_step(const AttentionLayer& layer, const Stores& stores, const Step& step);
void attention_block(const AttentionLayer& layer, Precision precision, const Stores& stores, const Step& step,
                     const float* x, float* y);
void mlp_block(const MLPLayer& layer, Precision precision, const float* x, float* y, int num_rows);
void head(const HeadLayer& layer, Precision precision, const float* x, float* y, int num_rows);
void embed(const Weight& table, const int* tokens, float* y, int num_tokens);
void rms_norm(const Norm& norm, const float* x, float* y, int num_rows);
void glu(Activation activation, const float* gate, const float* up, float* y, size_t count);

// y = x - log(sum(exp(x))) and the index of the largest, per row of `size`.
void log_softmax(const float* x, float* y, int num_rows, int size);
void argmax(const float* x, int* y, int num_rows, int size);

// Stores keys and values (B, K, L, D), given with strides of elements, without attending.
void append(KVStore& kv, const Step& step, const float* keys, const float* values);

}  // namespace mlx_edge
