// The kernels of one instruction set: this file is compiled once for each, with MLX_EDGE_ISA naming it (simd.h).
#include "attention.h"
#include "attention_run.h"
#include "linear.h"
#include "softmax.h"
#include "vector.h"

namespace mlx_edge::MLX_EDGE_ISA {

#define MLX_EDGE_QUOTED(name) #name
#define MLX_EDGE_NAME(name) MLX_EDGE_QUOTED(name)

extern const Kernels kernels;
const Kernels kernels = {
    .name = MLX_EDGE_NAME(MLX_EDGE_ISA),
    .codes_bytes = codes_bytes,
    .scales_count = scales_count,
    .quantize = quantize,
    .multiply = multiply,
    .rms_norm = rms_norm,
    .glu = glu,
    .rotate = rotate,
    .cap = cap,
    .argmax = argmax,
    .largest = largest,
    .sum_exp = sum_exp,
    .append = append,
    .attend = attend,
    .turn_keys = turn_keys,
    .attend_run = attend_run,
};

}  // namespace mlx_edge::MLX_EDGE_ISA
