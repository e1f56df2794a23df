/* The matrix products for callers without C++ and without MLX: exported by the extension's shared object.
 *
 * A matrix is packed once and multiplied as often as one likes, from any thread; calls take turns. Numbers mean what they mean
 * in matrix.h: format 0 affine, 1 mxfp4, 2 dense; float type 0 float32, 1 float16, 2 bfloat16; precision 0 int8 activations,
 * 1 floats. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  int format, rows, columns, bits, group_size, float_type;
} mlx_edge_matrix;

/* The instruction set in use; a null pointer when MLX_EDGE_CPU_ISA names one that is not here. */
const char* mlx_edge_instruction_set(void);

/* Why these sizes cannot be served, or a null pointer. The other functions want sizes that can. */
const char* mlx_edge_refusal(const mlx_edge_matrix* sizes);

/* Bytes of the packed matrix; 64-byte aligned memory is best. */
size_t mlx_edge_packed_bytes(const mlx_edge_matrix* sizes);

/* From MLX's layout: uint32 packs (rows, columns * bits / 32), scales and offsets (rows, columns / group_size). */
void mlx_edge_pack(const mlx_edge_matrix* sizes, const uint32_t* packs, const void* scales, const void* offsets, uint8_t* to);

/* y (num_rows, rows) = x (num_rows, columns) . W^T + bias (rows, or null); `data` is packed, or a dense matrix's own rows. */
void mlx_edge_linear(const mlx_edge_matrix* sizes, const uint8_t* data, const float* bias, int precision, const float* x,
                     float* y, int num_rows);

#ifdef __cplusplus
}
#endif
