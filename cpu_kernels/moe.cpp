// A mixture of experts over the pool: each row goes through the experts that its router scores highest.
//
//   y = x + end(sum over the chosen e of share_e * down_e(activation(gate_e h) * up_e h)),  h = norm(x)
//
// Rows are gathered by expert, so that an expert's weights are read once for all of a slice's rows; what a row gets is added up
// in the order of its own scores, whoever else is in the slice. The router meets floats: an expert that was confused with
// another is no rounding error.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

#include "blocks.h"
#include "pool.h"
#include "products.h"
#include "residual.h"

namespace mlx_edge {
namespace {

// The rows of one expert, among all that were gathered.
struct Run {
  int expert, first, count;
};

// Where the rows of a slice go: `top_k` places for each, in the order of its scores.
struct Routes {
  std::vector<int> experts, places;
  std::vector<float> shares;
  std::vector<Run> runs;
  std::vector<int> rows, run_of;  // of each place
};

Matrix expert_of(const Weight& w, int expert, int num_experts) {
  Matrix own = w.view();
  own.rows /= num_experts;
  own.data += packed_bytes(own) * expert;
  if (own.bias) own.bias += static_cast<ptrdiff_t>(own.rows) * expert;
  return own;
}

// The experts of one row and their shares, the likeliest first; of equals the first.
void choose(const MoELayer& layer, const float* scores, int* experts, float* shares) {
  int count = 0;
  for (int e = 0; e < layer.num_experts; e++) {
    if (count == layer.top_k && !(scores[e] > shares[count - 1])) continue;
    int at = count < layer.top_k ? count++ : count - 1;
    for (; at > 0 && scores[e] > shares[at - 1]; at--) experts[at] = experts[at - 1], shares[at] = shares[at - 1];
    experts[at] = e, shares[at] = scores[e];
  }
  const float top = shares[0];
  float total = 0.0f;
  for (int i = 0; i < count; i++) shares[i] = std::exp(shares[i] - top), total += shares[i];
  if (!layer.is_normalized) total = kernels().sum_exp(scores, top, layer.num_experts);
  for (int i = 0; i < count; i++) shares[i] /= total;
}

Routes route(Pool& pool, const MoELayer& layer, const float* scores, int num_rows) {
  const int top_k = layer.top_k, total = num_rows * top_k;
  Routes routes{std::vector<int>(total), std::vector<int>(total), std::vector<float>(total), {}, std::vector<int>(total),
                std::vector<int>(total)};
  pool.run(num_rows, piece_of(pool, num_rows), [&](int begin, int end) {
    for (int m = begin; m < end; m++)
      choose(layer, scores + static_cast<size_t>(m) * layer.num_experts, &routes.experts[m * top_k], &routes.shares[m * top_k]);
  });
  std::vector<int> counts(layer.num_experts);
  for (int expert : routes.experts) counts[expert]++;
  std::vector<int> run_of(layer.num_experts), next(layer.num_experts);
  for (int e = 0, first = 0; e < layer.num_experts; first += counts[e++]) {
    if (counts[e] == 0) continue;
    run_of[e] = static_cast<int>(routes.runs.size()), next[e] = first;
    routes.runs.push_back({e, first, counts[e]});
  }
  for (int i = 0; i < total; i++) {
    const int place = next[routes.experts[i]]++;
    routes.places[i] = place, routes.rows[place] = i / top_k, routes.run_of[place] = run_of[routes.experts[i]];
  }
  return routes;
}

// One slice of rows on its way through its experts.
class ExpertSlice {
 public:
  ExpertSlice(const MoELayer& layer, Pool& pool, Workspace& space, Precision precision, const Routes& routes)
      : layer_(layer), pool_(pool), routes_(routes), total_(static_cast<int>(routes.rows.size())),
        size_(layer.gate->matrix.columns), inner_(layer.gate->matrix.rows / layer.num_experts),
        gathered_(space.gathered.take(area(size_))), gate_(space.gate.take(area(inner_))), up_(space.up.take(area(inner_))),
        mixed_(space.mixed.take(area(size_))),
        input_(space.codes, gathered_, size_, total_, size_, precision, {layer.gate.get(), layer.up.get()}),
        product_(space.inner_codes, gate_, inner_, total_, inner_, precision, {layer.down.get()}) {}

  void run(const float* h) {
    gather(h);
    run_gates();
    run_downs();
  }

  // y (rows, E) = the sums of what the experts gave, and `add` where it is not null.
  void add_up(const float* add, float* y, int num_rows) const {
    pool_.run(num_rows, piece_of(pool_, num_rows), [&](int begin, int end) {
      for (int m = begin; m < end; m++) {
        float* to = y + static_cast<size_t>(m) * size_;
        std::fill(to, to + size_, 0.0f);
        for (int i = m * layer_.top_k; i < (m + 1) * layer_.top_k; i++) {
          const float* from = mixed_ + static_cast<size_t>(routes_.places[i]) * size_;
          for (int d = 0; d < size_; d++) to[d] += routes_.shares[i] * from[d];
        }
        if (!add) continue;
        for (int d = 0; d < size_; d++) to[d] += add[static_cast<size_t>(m) * size_ + d];
      }
    });
  }

 private:
  size_t area(int columns) const { return static_cast<size_t>(total_) * columns; }

  void gather(const float* h) const {
    pool_.run(total_, piece_of(pool_, total_), [&](int begin, int end) {
      for (int place = begin; place < end; place++) {
        const float* from = h + static_cast<size_t>(routes_.rows[place]) * size_;
        std::copy(from, from + size_, gathered_ + static_cast<size_t>(place) * size_);
        const Run& run = routes_.runs[routes_.run_of[place]];
        input_.quantize_part(run.first, run.count, place - run.first, place - run.first + 1, 0, size_);
      }
    });
  }

  void run_gates() const {
    const int units = (inner_ + COLUMNS - 1) / COLUMNS, total = static_cast<int>(routes_.runs.size()) * units;
    pool_.run(total, piece_of(pool_, total), [&](int begin, int end) {
      for (int i = begin; i < end; i++) {
        const Run& run = routes_.runs[i / units];
        const int first = i % units * COLUMNS, last = std::min(first + COLUMNS, inner_);
        float *gate = gate_ + static_cast<size_t>(run.first) * inner_, *up = up_ + static_cast<size_t>(run.first) * inner_;
        for (const auto& [weight, to] : {std::pair{&layer_.gate, gate}, std::pair{&layer_.up, up}}) {
          const Matrix w = expert_of(**weight, run.expert, layer_.num_experts);
          kernels().multiply(w, input_.part_for(w, run.first, run.count), nullptr, to, inner_, first / ROWS,
                             (last + ROWS - 1) / ROWS);
        }
        for (int m = 0; m < run.count; m++) {
          const size_t at = static_cast<size_t>(m) * inner_ + first;
          kernels().glu(layer_.activation, gate + at, up + at, gate + at, last - first);
        }
        product_.quantize_part(run.first, run.count, 0, run.count, first, last);
      }
    });
  }

  void run_downs() const {
    const int blocks = (size_ + ROWS - 1) / ROWS, total = static_cast<int>(routes_.runs.size()) * blocks;
    pool_.run(total, std::min(piece_of(pool_, total), blocks), [&](int begin, int end) {
      while (begin < end) {
        const Run& run = routes_.runs[begin / blocks];
        const int first = begin % blocks, last = std::min(blocks, first + end - begin);
        const Matrix w = expert_of(*layer_.down, run.expert, layer_.num_experts);
        kernels().multiply(w, product_.part_for(w, run.first, run.count), nullptr,
                           mixed_ + static_cast<size_t>(run.first) * size_, size_, first, last);
        begin += last - first;
      }
    });
  }

  const MoELayer& layer_;
  Pool& pool_;
  const Routes& routes_;
  const int total_, size_, inner_;
  float *gathered_, *gate_, *up_, *mixed_;
  const Input input_, product_;
};

}  // namespace

void check_experts(const MoELayer& layer) {
  const int x = layer.num_experts, size = layer.gate->matrix.columns, rows = layer.gate->matrix.rows;
  if (x < 1 || layer.top_k < 1 || layer.top_k > x || layer.router->matrix.rows != x || layer.router->matrix.columns != size ||
      rows % x || layer.up->matrix.rows != rows || layer.up->matrix.columns != size ||
      layer.down->matrix.rows != x * size || layer.down->matrix.columns != rows / x)
    throw std::invalid_argument("the weights of " + std::to_string(x) + " experts do not fit each other");
  for (const auto* weight : {&layer.gate, &layer.up, &layer.down})
    if ((*weight)->matrix.format != Format::dense && (*weight)->matrix.rows / x % ROWS)
      throw std::invalid_argument("packed experts of " + std::to_string((*weight)->matrix.rows / x) +
                                  " rows; multiples of " + std::to_string(ROWS) + " are served");
}

void moe_block(const MoELayer& layer, Precision precision, const float* x, float* y, int num_rows) {
  Pool& pool = Pool::of_process();
  const std::lock_guard turn(pool.turn());
  Workspace& space = shared_workspace();
  const int size = layer.gate->matrix.columns, num_experts = layer.num_experts;
  in_slices(num_rows, [&](int begin, int count) {
    const float* from = x + static_cast<size_t>(begin) * size;
    float* to = y + static_cast<size_t>(begin) * size;
    const float* h = norm_rows(pool, space, layer.norm, from, size, count);
    float* scores = space.scores.take(static_cast<size_t>(count) * num_experts);
    multiply(pool, Input(space.codes, h, size, count, size, Precision::floating, {layer.router.get()}),
             {{layer.router->view(), nullptr, scores, num_experts}});
    const Routes routes = route(pool, layer, scores, count);
    ExpertSlice slice(layer, pool, space, precision, routes);
    slice.run(h);
    slice.add_up(added_to(layer.ending, from), to, count);
    end_rows(pool, layer.ending, from, to, size, count);
  });
}

}  // namespace mlx_edge
