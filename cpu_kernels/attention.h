// Attention over the pages of a KV store, and storing into them. Included by isa.cpp, once for each instruction set.
//
//   y = sum_p softmax_p(scale * q . k_p) v_p over the positions p that a query sees; scores may be capped, and a sink may be
//   one score more, without a value
//
// Pages are met in order; each query carries its own running maximum, sum of weights and weighted sum of values, so that no
// score matrix exists. Per page two small products, tiles of queries x vectors: scores from turned keys, results from values.
// An element of either is one chain of fmas, over the dims or the positions in order, whatever the tile's shape: a query's
// bits do not depend on its neighbours.
#pragma once

#include <cmath>

#include "kernels.h"
#include "simd.h"
#include "store_format.h"
#include "vector.h"

namespace mlx_edge::MLX_EDGE_ISA {

constexpr int QUERIES = 64;   // that meet a page together
constexpr int LINE = 64;      // bytes
constexpr int TILE_ROWS = 4;  // queries that share what is loaded of a page

// Vectors side by side in a tile of `rows`: enough independent chains to hide an fma's latency, few enough for the registers.
constexpr int MIN_VECTORS = DIMS / WIDTH;
constexpr int tile_vectors(int rows) {
  const int wanted = rows == 1 ? 8 : rows == 2 ? 4 : 2;
  return wanted > MIN_VECTORS ? wanted : MIN_VECTORS;
}

// The page that is met next: brought near in even steps while this one is worked on, so that memory is never idle.
struct Ahead {
  const uint8_t *at, *end;
  int pace;  // bytes a step

  void step() {
    __builtin_prefetch(at);
    at = at + pace < end ? at + pace : at;
  }
};
struct Still {
  void step() {}
};

// c[r][j] = c[r][j] * factors[r] + sum_k a[r][k] b[k][j] for V vectors from column j on and k in [begin, end); c starts from
// zero when there are no factors.
template <int R, int V, class Plane, class Next>
void multiply_tile(const float* a, int a_stride, const Plane& b, int begin, int end, int j, const float* factors, float* c,
                   int c_stride, Next& next_page) {
  Next next = next_page;
  Floats sums[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++)
      sums[r][v] = factors ? mul(load(c + r * c_stride + j + v * WIDTH), splat(factors[r])) : zeros();
  for (int k = begin; k < end; k++) {
    for (int i = 0; i < V; i += MIN_VECTORS) next.step();
    Floats loaded[V];
    for (int v = 0; v < V; v++) loaded[v] = b.at(k, j + v * WIDTH);
    for (int r = 0; r < R; r++) {
      const Floats x = splat(a[r * a_stride + k]);
      for (int v = 0; v < V; v++) sums[r][v] = fma(x, loaded[v], sums[r][v]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) store(c + r * c_stride + j + v * WIDTH, sums[r][v]);
  next_page = next;
}

// The same for columns [first, last), multiples of DIMS.
template <int R, int V, class Plane, class Next>
void multiply_columns(const float* a, int a_stride, const Plane& b, int begin, int end, int first, int last,
                      const float* factors, float* c, int c_stride, Next& next) {
  for (; first + V * WIDTH <= last; first += V * WIDTH)
    multiply_tile<R, V>(a, a_stride, b, begin, end, first, factors, c, c_stride, next);
  if constexpr (V > MIN_VECTORS)
    if (first < last) multiply_columns<R, MIN_VECTORS>(a, a_stride, b, begin, end, first, last, factors, c, c_stride, next);
}

template <int R, class Plane, class Next>
void multiply_rows(int rows, const float* a, int a_stride, const Plane& b, int begin, int end, int first, int last,
                   const float* factors, float* c, int c_stride, Next& next) {
  if (rows == R)
    multiply_columns<R, tile_vectors(R)>(a, a_stride, b, begin, end, first, last, factors, c, c_stride, next);
  else if constexpr (R > 1)
    multiply_rows<R - 1>(rows, a, a_stride, b, begin, end, first, last, factors, c, c_stride, next);
}

inline int clamp_to_page(int position) { return position < 0 ? 0 : position > PAGE ? PAGE : position; }

// The slots of one page that a query sees: [first kept, kept) and [begin, end).
struct Slots {
  int first_kept, kept, begin, end;

  bool none() const { return first_kept >= kept && begin >= end; }
  int first() const { return first_kept < kept ? first_kept : begin; }
  int last() const { return begin < end && end > kept ? end : kept; }
};

// The positions that a query sees: [first kept, kept) and [begin, end). The layer's window hides kept ones, too; the store's
// does not.
struct Sight {
  int first_kept, kept, begin, end;

  Sight() = default;
  Sight(int position, int window, int store_window, int keep) {
    end = position + 1;
    first_kept = window > 0 && end > window ? end - window : 0;
    kept = keep < end ? keep : end;
    if (kept < first_kept) kept = first_kept;
    const int stored = store_window > 0 && end > store_window ? end - store_window : 0;
    begin = stored > first_kept ? stored : first_kept;
  }
  Slots in(int page) const {
    const int start = page * PAGE;
    return {clamp_to_page(first_kept - start), clamp_to_page(kept - start), clamp_to_page(begin - start),
            clamp_to_page(end - start)};
  }
};

// At most QUERIES queries on their way through the pages.
class Attention {
 public:
  Attention(const KVStore& kv, int row, int head, int count, const float* const* q, const int* positions,
            const ScoreRule& rule, const float* sinks)
      : kv_(kv), row_(row), head_(head), count_(count), softcap_(rule.softcap), stride_((kv.head_dim() + DIMS - 1) / DIMS * DIMS) {
    for (int i = 0; i < count; i++) {
      sights_[i] = Sight(positions[i], rule.window, kv.window(), kv.keep());
      largest_[i] = sinks ? sinks[i] : -INFINITY;  // a sink is a score that was met before all others
      weight_sums_[i] = sinks ? 1.0f : 0.0f;
      for (int d = 0; d < kv.head_dim(); d++) queries_[i * stride_ + d] = q[i][d] * rule.scale;
      for (int d = 0; d < stride_; d++) results_[i * stride_ + d] = 0.0f;
    }
  }

  void run() {
    Sight all = sights_[0];  // what any of them sees
    for (int i = 1; i < count_; i++) {
      if (sights_[i].end == 0) continue;
      if (all.end == 0 || sights_[i].begin < all.begin) all.begin = sights_[i].begin;
      if (sights_[i].first_kept < sights_[i].kept && sights_[i].kept > all.kept) all.kept = sights_[i].kept;
      if (sights_[i].end > all.end) all.end = sights_[i].end;
    }
    for (int page = 0; page * PAGE < all.end; page++) {
      if (page * PAGE >= all.kept && page < all.begin / PAGE) page = all.begin / PAGE;
      const uint8_t* keys = kv_.plane(row_, head_, page, false);
      const uint8_t* values = kv_.plane(row_, head_, page, true);
      if (!keys) continue;
      look_ahead(kv_.plane(row_, head_, page + 1, false), values - keys);
      meet(page, keys, values);
    }
  }

  void finish(float* const* y) {
    for (int i = 0; i < count_; i++) {
      float* result = results_ + i * stride_;
      const Floats sum = splat(weight_sums_[i] > 0.0f ? weight_sums_[i] : 1.0f);
      // Adding zero makes a negative zero positive: whether one arises depends on how much of a page was met.
      for (int d = 0; d < stride_; d += WIDTH) store(result + d, add(div(load(result + d), sum), zeros()));
      for (int d = 0; d < kv_.head_dim(); d++) y[i][d] = result[d];
    }
  }

 private:
  void look_ahead(const uint8_t* next, ptrdiff_t plane_bytes) {
    const int num_steps = 2 * PAGE * stride_ / DIMS;
    const int bytes = next ? static_cast<int>(2 * plane_bytes) : 0;
    ahead_ = {next, next + bytes, (bytes + num_steps - 1) / num_steps};
  }

  void meet(int page, const uint8_t* keys, const uint8_t* values) {
    const int stride = kv_.value_stride();
    switch (kv_.format()) {
      case KVFormat::f32: return meet_tiles(page, FloatPlane(keys, PAGE), FloatPlane(values, stride));
      case KVFormat::f16: return meet_stored(page, HalfPlane(keys, PAGE), HalfPlane(values, stride));
      case KVFormat::int8: return meet_stored(page, ByteKeys(kv_, keys), ByteValues(kv_, values));
      case KVFormat::int4: return meet_stored(page, NibbleKeys(kv_, keys), NibbleValues(kv_, values));
    }
  }

  template <class Keys, class Values>
  void meet_stored(int page, const Keys& keys, const Values& values) {
    if (count_ <= TILE_ROWS) return meet_tiles(page, keys, values);
    // Several tiles meet this page: it is worth turning into floats once.
    for (int d = 0; d < kv_.head_dim(); d++)
      for (int p = 0; p < PAGE; p += WIDTH) store(keys_ + d * PAGE + p, keys.at(d, p));
    for (int p = 0; p < PAGE; p++)
      for (int d = 0; d < stride_; d += WIDTH) store(values_ + p * stride_ + d, values.at(p, d));
    meet_tiles(page, FloatPlane(keys_, PAGE), FloatPlane(values_, stride_));
  }

  // The first tile of queries brings the next page near.
  template <class Keys, class Values>
  void meet_tiles(int page, const Keys& keys, const Values& values) {
    Still still;
    meet_tile(page, 0, keys, values, ahead_);
    for (int i = TILE_ROWS; i < count_; i += TILE_ROWS) meet_tile(page, i, keys, values, still);
  }

  template <class Keys, class Values, class Next>
  void meet_tile(int page, int i, const Keys& keys, const Values& values, Next& next) {
    const int rows = count_ - i < TILE_ROWS ? count_ - i : TILE_ROWS;
    Slots slots[TILE_ROWS];
    int first = PAGE, last = 0;
    for (int r = 0; r < rows; r++) {
      slots[r] = sights_[i + r].in(page);
      if (slots[r].none()) continue;
      if (slots[r].first() < first) first = slots[r].first();
      if (slots[r].last() > last) last = slots[r].last();
    }
    if (first >= last) return;
    const int begin = first / DIMS * DIMS, end = (last + DIMS - 1) / DIMS * DIMS;
    float factors[TILE_ROWS];
    multiply_rows<TILE_ROWS>(rows, queries_ + i * stride_, stride_, keys, 0, kv_.head_dim(), begin, end, nullptr, weights_,
                             PAGE, next);
    for (int r = 0; r < rows; r++) factors[r] = weigh(i + r, slots[r], begin, end, weights_ + r * PAGE);
    multiply_rows<TILE_ROWS>(rows, weights_, PAGE, values, first, last, 0, stride_, factors, results_ + i * stride_, stride_,
                             next);
  }

  // Scores of slots [begin, end) become weights, relative to the query's largest score so far; returns the factor for all that
  // was gathered before.
  float weigh(int query, const Slots& seen, int begin, int end, float* scores) {
    if (softcap_ > 0.0f)
      for (int p = begin; p < end; p += WIDTH) store(scores + p, cap_of(load(scores + p), softcap_));
    hide(scores, begin, seen.first_kept);
    hide(scores, seen.kept > begin ? seen.kept : begin, seen.begin);
    hide(scores, seen.last(), end);
    Floats top = load(scores + begin);
    for (int p = begin + WIDTH; p < end; p += WIDTH) top = max(top, load(scores + p));
    const float before = largest_[query], highest = max_of(top), largest = highest > before ? highest : before;
    if (largest == -INFINITY) {
      for (int p = begin; p < end; p++) scores[p] = 0.0f;
      return 1.0f;
    }
    Floats sum = zeros();
    for (int p = begin; p < end; p += WIDTH) {
      const Floats weight = exp(sub(load(scores + p), splat(largest)));
      store(scores + p, weight);
      sum = add(sum, weight);
    }
    const float factor = largest == before ? 1.0f : first_of(exp(splat(before - largest)));
    largest_[query] = largest;
    weight_sums_[query] = weight_sums_[query] * factor + sum_of(sum);
    return factor;
  }

  static void hide(float* scores, int begin, int end) {
    for (int p = begin; p < end; p++) scores[p] = -INFINITY;
  }

  static float first_of(Floats x) {
    float lanes[WIDTH];
    store(lanes, x);
    return lanes[0];
  }

  const KVStore& kv_;
  const int row_, head_, count_;
  const float softcap_;
  const int stride_;
  Ahead ahead_{};
  Sight sights_[QUERIES];
  float largest_[QUERIES], weight_sums_[QUERIES];
  alignas(64) float weights_[TILE_ROWS * PAGE];
  alignas(64) float queries_[QUERIES * MAX_HEAD_DIM];
  alignas(64) float results_[QUERIES * MAX_HEAD_DIM];
  alignas(64) float keys_[MAX_HEAD_DIM * PAGE];
  alignas(64) float values_[PAGE * MAX_HEAD_DIM];
};

inline void attend(const KVStore& kv, int row, int head, int count, const float* const* q, float* const* y,
                   const int* positions, const ScoreRule& rule, const float* sinks) {
  for (int i = 0; i < count; i += QUERIES) {
    const int num = count - i < QUERIES ? count - i : QUERIES;
    Attention attention(kv, row, head, num, q + i, positions + i, rule, sinks ? sinks + i : nullptr);
    attention.run();
    attention.finish(y + i);
  }
}

}  // namespace mlx_edge::MLX_EDGE_ISA
