// Attention inside runs over the pool: keys turned once, then tiles of queries of one head and one run.
#include <algorithm>
#include <stdexcept>

#include "blocks.h"
#include "pool.h"
#include "products.h"

namespace mlx_edge {
namespace {

constexpr size_t TURNED = 1 << 22;  // floats of turned keys at once, or those of one head

struct Run {
  int first, count, block;  // its first row, its rows, the first of its blocks of keys
};
struct Part {
  const Run* run;
  int first, count;  // rows of the run
};

std::vector<Part> parts_of(const std::vector<Run>& runs, int size) {
  std::vector<Part> parts;
  for (const Run& run : runs)
    for (int first = 0; first < run.count; first += size) parts.push_back({&run, first, std::min(size, run.count - first)});
  return parts;
}

// A head's values with rows of `stride`; only where they have not that stride by themselves.
void pad_rows(const float* from, int count, int dim, int stride, float* to) {
  for (int i = 0; i < count; i++, from += dim, to += stride) {
    std::copy(from, from + dim, to);
    std::fill(to + dim, to + stride, 0.0f);
  }
}

}  // namespace

void attention_within(const float* q, const float* k, const float* v, float* y, int num_heads, int length, int head_dim,
                      const std::vector<int>& lengths, float scale) {
  Pool& pool = Pool::of_process();
  const std::lock_guard turn(pool.turn());
  Workspace& space = shared_workspace();
  std::vector<Run> runs;
  int num_blocks = 0, row = 0;
  for (int count : lengths) {
    runs.push_back({row, count, num_blocks});
    row += count, num_blocks += (count + RUN_KEYS - 1) / RUN_KEYS;
  }
  const auto keys = parts_of(runs, RUN_KEYS), queries = parts_of(runs, RUN_QUERIES);
  const int num_keys = static_cast<int>(keys.size()), num_queries = static_cast<int>(queries.size());
  const int stride = (head_dim + DIMS - 1) / DIMS * DIMS;
  const size_t head_size = static_cast<size_t>(length) * head_dim, block_size = static_cast<size_t>(head_dim) * RUN_KEYS;
  const int at_once = static_cast<int>(std::clamp<size_t>(TURNED / (num_blocks * block_size + 1), 1, num_heads));
  float* turned = space.turned.take(at_once * num_blocks * block_size);
  const bool is_padded = stride != head_dim;
  float* padded = is_padded ? space.padded.take(static_cast<size_t>(at_once) * length * stride) : nullptr;
  for (int head = 0; head < num_heads; head += at_once) {
    const int heads = std::min(at_once, num_heads - head);
    pool.run(heads * num_keys, piece_of(pool, heads * num_keys), [&](int begin, int end) {
      for (int i = begin; i < end; i++) {
        const Part& part = keys[i % num_keys];
        const size_t at = (head + i / num_keys) * head_size + static_cast<size_t>(part.run->first + part.first) * head_dim;
        const size_t block = static_cast<size_t>(i / num_keys) * num_blocks + part.run->block + part.first / RUN_KEYS;
        kernels().turn_keys(k + at, part.count, head_dim, turned + block * block_size);
        if (is_padded)
          pad_rows(v + at, part.count, head_dim, stride,
                   padded + (static_cast<size_t>(i / num_keys) * length + part.run->first + part.first) * stride);
      }
    });
    pool.run(heads * num_queries, 1, [&](int begin, int end) {
      for (int i = begin; i < end; i++) {
        const Part& part = queries[i % num_queries];
        const Run& run = *part.run;
        const int own = i / num_queries;
        const size_t at = (head + own) * head_size + static_cast<size_t>(run.first + part.first) * head_dim;
        const float* values = is_padded ? padded + (static_cast<size_t>(own) * length + run.first) * stride
                                        : v + (head + own) * head_size + static_cast<size_t>(run.first) * head_dim;
        kernels().attend_run(q + at, part.count, turned + (static_cast<size_t>(own) * num_blocks + run.block) * block_size,
                             values, stride, run.count, head_dim, scale, y + at);
      }
    });
  }
}

}  // namespace mlx_edge
