// MLX's own float products, made to run in OpenBLAS. See blas.cpp.
#pragma once

#include <cstdint>
#include <string>

namespace mlx_edge {

// Makes libmlx (the path of a loaded library) call OpenBLAS (a library of the package scipy-openblas32) for its float
// products and its LAPACK functions, for the rest of the process. Returns "" or why it does not. A second call repeats
// the first answer.
std::string connect_blas(const std::string& libmlx, const std::string& openblas);

// How many float32 products MLX has asked for since.
int64_t blas_products();

}  // namespace mlx_edge
