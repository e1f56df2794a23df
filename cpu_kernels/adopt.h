// Pages of a file as an MLX array, without a copy. See adopt.cpp.
#pragma once

#include <cstdint>

#include "mlx/array.h"

namespace mlx_edge {

// The bytes [begin, begin + num_bytes) of an open file as a uint32 array of num_bytes / 4 elements. Both are whole
// pages; the last page may reach past the end of the file, where it reads as zero. The pages come from the disk at
// their first use, and are unmapped with the last array on them; the descriptor may be closed before. Throws
// std::runtime_error where this cannot be done.
mlx::core::array adopt_pages(int descriptor, int64_t begin, int64_t num_bytes);

}  // namespace mlx_edge
