#include "residual.h"

#include "products.h"

namespace mlx_edge {

const float* norm_rows(Pool& pool, Workspace& space, const std::optional<Norm>& norm, const float* x, int size, int count) {
  if (!norm) return x;
  float* h = space.normed.take(static_cast<size_t>(count) * size);
  pool.run(count, piece_of(pool, count), [&](int begin, int end) {
    for (int m = begin; m < end; m++)
      kernels().rms_norm(x + static_cast<size_t>(m) * size, norm->weight.data(), norm->eps,
                         h + static_cast<size_t>(m) * size, size);
  });
  return h;
}

void end_rows(Pool& pool, const Ending& ending, const float* x, float* y, int size, int count) {
  if (ending.is_plain()) return;
  pool.run(count, piece_of(pool, count), [&](int begin, int end) {
    for (int m = begin; m < end; m++) {
      const float* from = x + static_cast<size_t>(m) * size;
      float* to = y + static_cast<size_t>(m) * size;
      if (ending.norm) kernels().rms_norm(to, ending.norm->weight.data(), ending.norm->eps, to, size);
      for (int i = 0; i < size; i++) to[i] = from[i] + ending.scale * to[i];
    }
  });
}

}  // namespace mlx_edge
