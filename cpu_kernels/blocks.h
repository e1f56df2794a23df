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
  std::vector<int> axes;  // of each pair: time, height or width (0, 1, 2), where a step has positions on three; or empty
};

// What becomes of a layer's output before the residual is added: y = x + scale * norm(output).
struct Ending {
  std::optional<Norm> norm;
  float scale = 1;

  bool is_plain() const { return !norm && scale == 1.0f; }
};

struct AttentionLayer {
  std::optional<Norm> norm;
  WeightPtr q, k, v, o;
  int num_heads = 0, num_kv_heads = 0, head_dim = 0;
  float scale = 0;
  std::optional<Norm> q_norm, k_norm;  // of each head, or of all together where they are as wide
  std::optional<Rope> rope;
  int window = 0;  // 0: sees all
  Ending ending;
  float softcap = 0;         // 0: none
  std::vector<float> sinks;  // of each head, or empty
};

struct MLPLayer {
  std::optional<Norm> norm;
  WeightPtr gate, up, down;
  Activation activation = Activation::silu;
  Ending ending;
};

// Experts lie in the rows of gate, up and down one after another; those of packed weights have whole blocks of rows.
struct MoELayer {
  std::optional<Norm> norm;
  WeightPtr router, gate, up, down;
  int num_experts = 0, top_k = 0;
  bool is_normalized = true;  // the shares of the chosen experts add up to 1
  Activation activation = Activation::silu;
  Ending ending;
};

struct HeadLayer {
  Norm norm;
  WeightPtr projection;
  float scale = 1;
  float softcap = 0;  // 0: none
};

// Where the rows of a step stand: sequence b brings lengths[b] positions, from starts[b] on. They stand in `width` rows each,
// padded, or when ragged one sequence after another in `width` rows together.
struct Step {
  std::vector<int> starts, lengths;
  int width = 0;
  bool is_ragged = false;
  std::vector<int> shifts = {};  // of each sequence, or empty: rope turns it to its positions + shift
  std::vector<int> turns = {};   // (3, rows) or empty: where rope turns each row in time, height and width, whatever the shifts

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
// Throws std::invalid_argument when the experts' weights do not fit each other, or do not begin with a block of rows.
void check_experts(const MoELayer& layer);
void moe_block(const MoELayer& layer, Precision precision, const float* x, float* y, int num_rows);
// Softmax attention of q over k and v (H, L, D), each run of `lengths`, which add up to L, over itself, both ways.
void attention_within(const float* q, const float* k, const float* v, float* y, int num_heads, int length, int head_dim,
                      const std::vector<int>& lengths, float scale);
void head(const HeadLayer& layer, Precision precision, const float* x, float* y, int num_rows);
void embed(const Weight& table, float scale, const int* tokens, float* y, int num_tokens);
void rms_norm(const Norm& norm, const float* x, float* y, int num_rows);
void glu(Activation activation, const float* gate, const float* up, float* y, size_t count);

// y = x - log(sum(exp(x))) and the index of the largest, per row of `size`.
void log_softmax(const float* x, float* y, int num_rows, int size);
void argmax(const float* x, int* y, int num_rows, int size);

// Stores keys and values (B, K, L, D), given with strides of elements, without attending.
void append(KVStore& kv, const Step& step, const float* keys, const float* values);

}  // namespace mlx_edge
