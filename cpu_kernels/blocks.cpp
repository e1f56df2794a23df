#include "blocks.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <set>
#include <stdexcept>
#include <string>

#include "half.h"
#include "pool.h"
#include "products.h"
#include "residual.h"

namespace mlx_edge {
namespace {

constexpr int ELEMENTS = 8192;  // of a long vector shared out at once
constexpr int QUERY_TILE = 64;  // queries that attend together: what a page is converted for

// A run of positions of one sequence inside a slice.
struct Span {
  KVStore* kv;
  int row;       // of the store
  int first;     // row of the slice it begins at
  int position;  // of that row
  int count;     // rows, padding included
  int stored;    // of them, those that are real
  int shift;     // from positions to where rope turns
  int step_row;  // of the whole step, that it begins at
};

std::vector<Span> spans_of(const Stores& stores, const Step& step, int begin, int count) {
  std::vector<Span> spans;
  const int num_sequences = static_cast<int>(step.starts.size());
  for (int b = 0, at = 0; b < num_sequences && at < begin + count; b++) {  // `at`: the sequence's first row
    const int width = step.is_ragged ? step.lengths[b] : step.width;
    const int first = std::max(at, begin), end = std::min(at + width, begin + count), column = first - at;
    if (first < end)
      spans.push_back({step.is_ragged ? stores[b] : stores[0], step.is_ragged ? 0 : b, first - begin,
                       step.starts[b] + column, end - first, std::clamp(step.lengths[b] - column, 0, end - first),
                       step.shifts.empty() ? 0 : step.shifts[b], first});
    at += width;
  }
  return spans;
}

// One slice of rows on its way through an attention layer: q, k and v heads side by side in a row of `heads`.
class AttentionSlice {
 public:
  AttentionSlice(const AttentionLayer& layer, Pool& pool, Workspace& space, const Step& step, std::vector<Span> spans,
                 float* heads, float* attended)
      : layer_(layer), pool_(pool), space_(space), step_(step), spans_(std::move(spans)), heads_(heads),
        attended_(attended) {}

  void run() {
    for (const Span& span : spans_)
      if (span.stored) span.kv->prepare(span.row, span.position, span.stored);
    make_angles();
    if (is_wide(layer_.q_norm) || is_wide(layer_.k_norm)) norm_all_heads();
    const int num_heads = layer_.num_kv_heads, total = static_cast<int>(spans_.size()) * num_heads;
    const bool is_decode = std::all_of(spans_.begin(), spans_.end(), [](const Span& span) { return span.count == 1; });
    pool_.run(total, 1, [&](int begin, int end) {
      for (int i = begin; i < end; i++) {
        store(spans_[i / num_heads], i % num_heads);
        if (is_decode) attend(spans_[i / num_heads], i % num_heads, 0, 1);
      }
    });
    if (!is_decode) attend_in_tiles();
  }

 private:
  int group() const { return layer_.num_heads / layer_.num_kv_heads; }
  float* row(int m) const {
    return heads_ + static_cast<size_t>(m) * (layer_.num_heads + 2 * layer_.num_kv_heads) * layer_.head_dim;
  }
  float* query(int m, int head) const { return row(m) + head * layer_.head_dim; }
  float* key(int m, int head) const { return query(m, layer_.num_heads + head); }
  float* value(int m, int head) const { return key(m, layer_.num_kv_heads + head); }

  bool is_wide(const std::optional<Norm>& norm) const {
    return norm && norm->weight.size() > static_cast<size_t>(layer_.head_dim);
  }

  // Norms that are as wide as all heads together.
  void norm_all_heads() const {
    const int count = spans_.back().first + spans_.back().count;
    pool_.run(count, piece_of(pool_, count), [&](int begin, int end) {
      for (int m = begin; m < end; m++)
        for (const auto& [norm, to] : {std::pair{&layer_.q_norm, query(m, 0)}, std::pair{&layer_.k_norm, key(m, 0)}})
          if (is_wide(*norm))
            kernels().rms_norm(to, (*norm)->weight.data(), (*norm)->eps, to, static_cast<int>((*norm)->weight.size()));
    });
  }

  // Where rope turns a pair of row i of a span.
  double turn_of(const Span& span, int i, size_t pair) const {
    if (step_.turns.empty()) return span.position + i + span.shift;
    const int axis = layer_.rope->axes.empty() ? 0 : layer_.rope->axes[pair];
    return step_.turns[static_cast<size_t>(axis) * step_.num_rows() + span.step_row + i];
  }

  // Cosines and sines of every row's position; the angle in double, since a float has 1e-4 left at position 2000.
  void make_angles() {
    if (!layer_.rope) return;
    const Rope& rope = *layer_.rope;
    const size_t half = rope.periods.size();
    const int count = spans_.back().first + spans_.back().count;
    cosines_ = space_.cosines.take(count * half);
    sines_ = space_.sines.take(count * half);
    pool_.run(static_cast<int>(spans_.size()), 1, [&](int begin, int end) {
      for (int s = begin; s < end; s++)
        for (int i = 0; i < spans_[s].stored; i++) {
          const size_t at = (spans_[s].first + i) * half;
          for (size_t pair = 0; pair < half; pair++) {
            const double angle = turn_of(spans_[s], i, pair) / static_cast<double>(rope.periods[pair]);
            cosines_[at + pair] = static_cast<float>(std::cos(angle)) * rope.magnitude;
            sines_[at + pair] = static_cast<float>(std::sin(angle)) * rope.magnitude;
          }
        }
    });
  }

  void turn(float* head, int m, const std::optional<Norm>& norm) const {
    if (norm && !is_wide(norm)) kernels().rms_norm(head, norm->weight.data(), norm->eps, head, layer_.head_dim);
    if (!layer_.rope) return;
    const Rope& rope = *layer_.rope;
    const size_t at = static_cast<size_t>(m) * rope.periods.size();
    kernels().rotate(head, cosines_ + at, sines_ + at, rope.dims, rope.is_interleaved);
  }

  // Norm and turn of one kv head's keys and queries; the keys and values enter the store.
  void store(const Span& span, int head) const {
    for (int m = span.first; m < span.first + span.stored; m++) {
      turn(key(m, head), m, layer_.k_norm);
      for (int g = 0; g < group(); g++) turn(query(m, head * group() + g), m, layer_.q_norm);
    }
    if (span.stored)
      kernels().append(*span.kv, span.row, head, span.position, span.stored, key(span.first, head),
                       value(span.first, head), row(1) - row(0));
  }

  void attend_in_tiles() const {
    const int tile = std::max(1, QUERY_TILE / group()), num_heads = layer_.num_kv_heads;
    struct Task {
      const Span* span;
      int head, first, count;
    };
    std::vector<Task> tasks;
    for (const Span& span : spans_)
      for (int first = 0; first < span.count; first += tile)
        for (int head = 0; head < num_heads; head++)
          tasks.push_back({&span, head, first, std::min(tile, span.count - first)});
    pool_.run(static_cast<int>(tasks.size()), 1, [&](int begin, int end) {
      for (int i = begin; i < end; i++) attend(*tasks[i].span, tasks[i].head, tasks[i].first, tasks[i].count);
    });
  }

  // The queries of one kv head at `count` positions of a span.
  void attend(const Span& span, int head, int first, int count) const {
    thread_local std::vector<const float*> queries;
    thread_local std::vector<float*> results;
    thread_local std::vector<int> positions;
    thread_local std::vector<float> sinks;
    queries.clear(), results.clear(), positions.clear(), sinks.clear();
    const int width = layer_.num_heads * layer_.head_dim;
    for (int i = first; i < first + count; i++)
      for (int g = 0; g < group(); g++) {
        const int m = span.first + i, h = head * group() + g;
        queries.push_back(query(m, h));
        results.push_back(attended_ + static_cast<size_t>(m) * width + h * layer_.head_dim);
        positions.push_back(i < span.stored ? span.position + i : -1);
        if (!layer_.sinks.empty()) sinks.push_back(layer_.sinks[h]);
      }
    kernels().attend(*span.kv, span.row, head, static_cast<int>(queries.size()), queries.data(), results.data(),
                     positions.data(), {layer_.scale, layer_.window, layer_.softcap},
                     sinks.empty() ? nullptr : sinks.data());
  }

  const AttentionLayer& layer_;
  Pool& pool_;
  Workspace& space_;
  const Step& step_;
  std::vector<Span> spans_;
  float *heads_, *attended_;
  float *cosines_ = nullptr, *sines_ = nullptr;
};

}  // namespace

void linear(const Weight& w, Precision precision, const float* x, float* y, int num_rows) {
  Pool& pool = Pool::of_process();
  const std::lock_guard turn(pool.turn());
  const size_t columns = w.matrix.columns, rows = w.matrix.rows;
  in_slices(num_rows, [&](int begin, int count) {
    const Input input(shared_workspace().codes, x + begin * columns, columns, count, columns, precision, {&w});
    input.quantize_all(pool);
    multiply(pool, input, {{w.view(), nullptr, y + begin * rows, static_cast<ptrdiff_t>(rows)}});
  });
}

void check_step(const AttentionLayer& layer, const Stores& stores, const Step& step) {
  const int count = static_cast<int>(step.starts.size());
  if (step.lengths.size() != step.starts.size() || stores.size() != (step.is_ragged ? step.starts.size() : 1))
    throw std::invalid_argument("a step of " + std::to_string(count) + " sequences with " +
                                std::to_string(step.lengths.size()) + " lengths and " + std::to_string(stores.size()) +
                                " stores");
  for (int b = 0; b < count; b++)
    if (step.starts[b] < 0 || step.lengths[b] < 0 || step.lengths[b] > step.width)
      throw std::invalid_argument(std::to_string(step.lengths[b]) + " positions from " + std::to_string(step.starts[b]) +
                                  " on in a step of width " + std::to_string(step.width));
  if ((!step.shifts.empty() && step.shifts.size() != step.starts.size()) ||
      (!step.turns.empty() && step.turns.size() != 3 * static_cast<size_t>(step.num_rows())))
    throw std::invalid_argument("a step of " + std::to_string(count) + " sequences and " + std::to_string(step.num_rows()) +
                                " rows with " + std::to_string(step.shifts.size()) + " shifts and " +
                                std::to_string(step.turns.size()) + " turns on three axes");
  if (step.is_ragged && std::accumulate(step.lengths.begin(), step.lengths.end(), 0) != step.width)
    throw std::invalid_argument("the lengths of a ragged step do not add up to its width of " + std::to_string(step.width));
  for (const KVStore* kv : stores)
    if (kv->batch() != (step.is_ragged ? 1 : count) || kv->num_heads() != layer.num_kv_heads ||
        kv->head_dim() != layer.head_dim)
      throw std::invalid_argument("a store of " + std::to_string(kv->batch()) + " rows, " +
                                  std::to_string(kv->num_heads()) + " heads of " + std::to_string(kv->head_dim()) +
                                  " does not fit the step and its layer");
  if (std::set<const KVStore*>(stores.begin(), stores.end()).size() != stores.size())
    throw std::invalid_argument("one store stands for two sequences of a ragged step");
}

void attention_block(const AttentionLayer& layer, Precision precision, const Stores& stores, const Step& step,
                     const float* x, float* y) {
  Pool& pool = Pool::of_process();
  const std::lock_guard turn(pool.turn());
  Workspace& space = shared_workspace();
  const int size = layer.q->matrix.columns, width = layer.num_heads * layer.head_dim;
  const ptrdiff_t stride = (layer.num_heads + 2 * layer.num_kv_heads) * layer.head_dim;
  in_slices(step.num_rows(), [&](int begin, int count) {
    const float* from = x + static_cast<size_t>(begin) * size;
    float* to = y + static_cast<size_t>(begin) * size;
    const float* h = norm_rows(pool, space, layer.norm, from, size, count);
    float* heads = space.heads.take(count * stride);
    {
      const Input input(space.codes, h, size, count, size, precision, {layer.q.get(), layer.k.get(), layer.v.get()});
      input.quantize_all(pool);
      multiply(pool, input,
               {{layer.q->view(), nullptr, heads, stride},
                {layer.k->view(), nullptr, heads + width, stride},
                {layer.v->view(), nullptr, heads + width + layer.num_kv_heads * layer.head_dim, stride}});
    }
    float* attended = space.attended.take(static_cast<size_t>(count) * width);
    AttentionSlice(layer, pool, space, step, spans_of(stores, step, begin, count), heads, attended).run();
    const Input input(space.codes, attended, width, count, width, precision, {layer.o.get()});
    input.quantize_all(pool);
    multiply(pool, input, {{layer.o->view(), added_to(layer.ending, from), to, size}});
    end_rows(pool, layer.ending, from, to, size, count);
  });
}

void mlp_block(const MLPLayer& layer, Precision precision, const float* x, float* y, int num_rows) {
  Pool& pool = Pool::of_process();
  const std::lock_guard turn(pool.turn());
  Workspace& space = shared_workspace();
  const int size = layer.gate->matrix.columns, inner = layer.gate->matrix.rows;
  in_slices(num_rows, [&](int begin, int count) {
    const float* from = x + static_cast<size_t>(begin) * size;
    float* to = y + static_cast<size_t>(begin) * size;
    const float* h = norm_rows(pool, space, layer.norm, from, size, count);
    float* gate = space.gate.take(static_cast<size_t>(count) * inner);
    float* up = space.up.take(static_cast<size_t>(count) * inner);
    const Input input(space.codes, h, size, count, size, precision, {layer.gate.get(), layer.up.get()});
    input.quantize_all(pool);
    const Input product(space.inner_codes, gate, inner, count, inner, precision, {layer.down.get()});
    const int units = (inner + COLUMNS - 1) / COLUMNS;
    pool.run(units, piece_of(pool, units), [&](int first_unit, int last_unit) {
      const int first = first_unit * COLUMNS, last = std::min(last_unit * COLUMNS, inner);
      for (const auto& [weight, to] : {std::pair{&layer.gate, gate}, std::pair{&layer.up, up}}) {
        const Matrix w = (*weight)->view();
        kernels().multiply(w, input.rows_for(w), nullptr, to, inner, first / ROWS, (last + ROWS - 1) / ROWS);
      }
      for (int m = 0; m < count; m++) {
        float* row = gate + static_cast<size_t>(m) * inner + first;
        kernels().glu(layer.activation, row, up + static_cast<size_t>(m) * inner + first, row, last - first);
      }
      product.quantize(0, count, first, last);
    });
    multiply(pool, product, {{layer.down->view(), added_to(layer.ending, from), to, size}});
    end_rows(pool, layer.ending, from, to, size, count);
  });
}

void head(const HeadLayer& layer, Precision precision, const float* x, float* y, int num_rows) {
  Pool& pool = Pool::of_process();
  const std::lock_guard turn(pool.turn());
  Workspace& space = shared_workspace();
  const int size = layer.projection->matrix.columns, rows = layer.projection->matrix.rows;
  const bool is_plain = layer.scale == 1.0f && layer.softcap == 0.0f;
  in_slices(num_rows, [&](int begin, int count) {
    float* logits = y + static_cast<size_t>(begin) * rows;
    const float* h = norm_rows(pool, space, layer.norm, x + static_cast<size_t>(begin) * size, size, count);
    const Input input(space.codes, h, size, count, size, precision, {layer.projection.get()});
    input.quantize_all(pool);
    multiply(pool, input, {{layer.projection->view(), nullptr, logits, rows}});
    if (is_plain) return;
    const int pieces = (rows + ELEMENTS - 1) / ELEMENTS;
    pool.run(count * pieces, 1, [&](int first, int last) {
      for (int i = first; i < last; i++) {
        const int at = i % pieces * ELEMENTS;
        kernels().cap(logits + static_cast<size_t>(i / pieces) * rows + at, layer.scale, layer.softcap,
                      std::min(ELEMENTS, rows - at));
      }
    });
  });
}

void embed(const Weight& table, float scale, const int* tokens, float* y, int num_tokens) {
  const Matrix& w = table.matrix;
  const float factor = round_to(w.float_type, scale);  // as it was in training
  for (int i = 0; i < num_tokens; i++) {
    float* row = y + static_cast<size_t>(i) * w.columns;
    if (tokens[i] >= 0 && tokens[i] < w.rows)
      unpack_row(w, tokens[i], row);
    else
      std::fill(row, row + w.columns, std::numeric_limits<float>::quiet_NaN());
    if (factor != 1.0f)
      for (int k = 0; k < w.columns; k++) row[k] *= factor;
  }
}

void rms_norm(const Norm& norm, const float* x, float* y, int num_rows) {
  const size_t size = norm.weight.size();
  for (int m = 0; m < num_rows; m++)
    kernels().rms_norm(x + m * size, norm.weight.data(), norm.eps, y + m * size, static_cast<int>(size));
}

void glu(Activation activation, const float* gate, const float* up, float* y, size_t count) {
  Pool& pool = Pool::of_process();
  const std::lock_guard turn(pool.turn());
  const int pieces = static_cast<int>((count + ELEMENTS - 1) / ELEMENTS);
  pool.run(pieces, 1, [&](int begin, int end) {
    const size_t first = static_cast<size_t>(begin) * ELEMENTS, last = std::min<size_t>(count, static_cast<size_t>(end) * ELEMENTS);
    kernels().glu(activation, gate + first, up + first, y + first, static_cast<int>(last - first));
  });
}

void log_softmax(const float* x, float* y, int num_rows, int size) {
  Pool& pool = Pool::of_process();
  const std::lock_guard turn(pool.turn());
  const int pieces = (size + ELEMENTS - 1) / ELEMENTS;
  std::vector<float> highest(static_cast<size_t>(num_rows) * pieces), sums(highest.size());
  const auto each_piece = [&](auto&& work) {
    pool.run(num_rows * pieces, 1, [&](int begin, int end) {
      for (int i = begin; i < end; i++) {
        const int first = i % pieces * ELEMENTS;
        work(i, static_cast<size_t>(i / pieces) * size + first, std::min(ELEMENTS, size - first));
      }
    });
  };
  each_piece([&](int i, size_t at, int count) { highest[i] = kernels().largest(x + at, count); });
  for (int m = 0; m < num_rows; m++) {
    float* row = &highest[static_cast<size_t>(m) * pieces];
    std::fill(row, row + pieces, *std::max_element(row, row + pieces));
  }
  each_piece([&](int i, size_t at, int count) { sums[i] = kernels().sum_exp(x + at, highest[i], count); });
  for (int m = 0; m < num_rows; m++) {
    float *row = &highest[static_cast<size_t>(m) * pieces], *sum = &sums[static_cast<size_t>(m) * pieces];
    std::fill(row, row + pieces, row[0] + std::log(std::accumulate(sum, sum + pieces, 0.0f)));
  }
  each_piece([&](int i, size_t at, int count) {
    for (int j = 0; j < count; j++) y[at + j] = x[at + j] - highest[i];
  });
}

void argmax(const float* x, int* y, int num_rows, int size) {
  for (int m = 0; m < num_rows; m++) y[m] = kernels().argmax(x + static_cast<size_t>(m) * size, size);
}

void append(KVStore& kv, const Step& step, const float* keys, const float* values) {
  const int num_heads = kv.num_heads(), dim = kv.head_dim();
  for (size_t row = 0; row < step.starts.size(); row++) {
    if (step.lengths[row] == 0) continue;
    kv.prepare(static_cast<int>(row), step.starts[row], step.lengths[row]);
    for (int head = 0; head < num_heads; head++) {
      const size_t at = (row * num_heads + head) * step.width * dim;
      kernels().append(kv, static_cast<int>(row), head, step.starts[row], step.lengths[row], keys + at, values + at, dim);
    }
  }
}

}  // namespace mlx_edge
