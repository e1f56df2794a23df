// Attention inside a run of one instruction set against doubles: ragged lengths and head sizes, a query as if it were alone. No
// MLX.
//
// Compiled with the flags of the instruction set that MLX_EDGE_ISA names; ends with 1 at the first thing that is wrong.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "attention_run.h"
#include "check.h"

using namespace mlx_edge;
namespace isa = mlx_edge::MLX_EDGE_ISA;
using check::expect, check::random_row, check::Floats32;

namespace {

std::vector<double> oracle(const float* q, const Floats32& keys, const Floats32& values, int num_keys, int dim, double scale) {
  std::vector<double> weights(num_keys, 0.0), y(dim, 0.0);
  double top = -INFINITY, sum = 0;
  for (int p = 0; p < num_keys; p++) {
    for (int d = 0; d < dim; d++) weights[p] += scale * q[d] * keys[p * dim + d];
    top = std::fmax(top, weights[p]);
  }
  for (double& w : weights) sum += w = std::exp(w - top);
  for (int p = 0; p < num_keys; p++)
    for (int d = 0; d < dim; d++) y[d] += weights[p] / sum * values[p * dim + d];
  return y;
}

void check_run(int dim, int num_keys, int count, float size) {
  const Floats32 keys = random_row(num_keys * dim, size), values = random_row(num_keys * dim), q = random_row(count * dim, size);
  const int stride = (dim + DIMS - 1) / DIMS * DIMS, num_blocks = (num_keys + RUN_KEYS - 1) / RUN_KEYS;
  const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
  Floats32 turned(num_blocks * dim * RUN_KEYS, 7.0f), rows(num_keys * stride), y(count * dim + 1, 12345.0f);
  for (int b = 0; b < num_blocks; b++)
    isa::turn_keys(&keys[b * RUN_KEYS * dim], std::min(RUN_KEYS, num_keys - b * RUN_KEYS), dim, &turned[b * dim * RUN_KEYS]);
  for (int p = 0; p < num_keys; p++) std::copy(&values[p * dim], &values[p * dim] + dim, &rows[p * stride]);
  isa::attend_run(q.data(), count, turned.data(), rows.data(), stride, num_keys, dim, scale, y.data());
  expect(y[count * dim] == 12345.0f, "D=%d: wrote beyond the queries", dim);
  for (int i = 0; i < count; i++) {
    const auto truth = oracle(&q[i * dim], keys, values, num_keys, dim, scale);
    for (int d = 0; d < dim; d++)
      expect(std::fabs(y[i * dim + d] - truth[d]) < 4e-6 * size, "D=%d, %d keys, query %d of %d: y[%d] = %.8g, not %.8g", dim,
             num_keys, i, count, d, y[i * dim + d], truth[d]);
    Floats32 alone(dim);
    isa::attend_run(&q[i * dim], 1, turned.data(), rows.data(), stride, num_keys, dim, scale, alone.data());
    expect(!std::memcmp(alone.data(), &y[i * dim], dim * sizeof(float)), "D=%d, %d keys: query %d of %d differs from itself alone",
           dim, num_keys, i, count);
  }
}

}  // namespace

int main() {
  const int counts[] = {1, 2, 5, 6, 7, 48};
  int turn = 0;
  for (int dim : {33, 64, 80, 128, 256})
    for (int num_keys : {1, 2, 63, 64, 65, 131}) {
      check_run(dim, num_keys, counts[turn % 6], turn % 4 ? 1.0f : 6.0f);
      turn++;
    }
  std::printf("%d checks\n", check::checks);
}
