// Memory for MLX's arrays that its own allocator does not give. See adopt.cpp.
//
// Pages of a file as an MLX array, without a copy. See adopt.cpp.
#pragma once

#include <cstdint>

#include "mlx/allocator.h"
#include "mlx/array.h"

namespace mlx_edge {

// The bytes [begin, begin + num_bytes) of an open file as a uint32 array of num_bytes / 4 elements. Both are whole
// pages; the last page may reach past the end of the file, where it reads as zero. The pages come from the disk at
// their first use, and are unmapped with the last array on them; the descriptor may be closed before. Throws
// std::runtime_error where this cannot be done.
mlx::core::array adopt_pages(int descriptor, int64_t begin, int64_t num_bytes);

// Memory for an array of this size. A large one has pages of its own, which go back to the system when it is dropped: MLX
// allocates what a whole prompt's steps write before the first of them runs, and the C library would keep it all.
mlx::core::allocator::Data allocate(size_t num_bytes);

}  // namespace mlx_edge
