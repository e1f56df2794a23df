#include "c_abi.h"

#include <memory>
#include <vector>

#include "blocks.h"

#define MLX_EDGE_EXPORT __attribute__((visibility("default")))

namespace {

using namespace mlx_edge;

Matrix matrix_of(const mlx_edge_matrix& sizes) {
  return {static_cast<Format>(sizes.format),
          sizes.rows,
          sizes.columns,
          sizes.bits,
          sizes.group_size,
          static_cast<Float>(sizes.float_type),
          nullptr,
          nullptr};
}

}  // namespace

extern "C" {

MLX_EDGE_EXPORT const char* mlx_edge_instruction_set(void) {
  const Kernels* found = find_kernels();
  return found ? found->name : nullptr;
}

MLX_EDGE_EXPORT const char* mlx_edge_refusal(const mlx_edge_matrix* sizes) { return refuse(matrix_of(*sizes)); }

MLX_EDGE_EXPORT size_t mlx_edge_packed_bytes(const mlx_edge_matrix* sizes) { return packed_bytes(matrix_of(*sizes)); }

MLX_EDGE_EXPORT void mlx_edge_pack(const mlx_edge_matrix* sizes, const uint32_t* packs, const void* scales,
                                   const void* offsets, uint8_t* to) {
  const Matrix w = matrix_of(*sizes);
  pack(w, packs, scales, offsets, to, 0, num_blocks(w));
}

MLX_EDGE_EXPORT void mlx_edge_linear(const mlx_edge_matrix* sizes, const uint8_t* data, const float* bias, int precision,
                                     const float* x, float* y, int num_rows) {
  Weight w{matrix_of(*sizes), {}, nullptr};
  w.matrix.data = data;
  if (bias) w.bias.assign(bias, bias + w.matrix.rows);
  linear(w, static_cast<Precision>(precision), x, y, num_rows);
}

}  // extern "C"
