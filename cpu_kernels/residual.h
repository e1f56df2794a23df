// How a layer begins and ends: the norm of what goes in, and what comes out on its way to the residual.
#pragma once

#include <optional>

#include "blocks.h"
#include "pool.h"
#include "workspace.h"

namespace mlx_edge {

// Rows (count, size) of x, normed into scratch memory; as they are when there is no norm.
const float* norm_rows(Pool& pool, Workspace& space, const std::optional<Norm>& norm, const float* x, int size, int count);

// What is added to the products of a layer's last weight: x, where nothing comes between the two.
inline const float* added_to(const Ending& ending, const float* x) { return ending.is_plain() ? x : nullptr; }
// y (count, size) = x + scale * norm(y), where something does.
void end_rows(Pool& pool, const Ending& ending, const float* x, float* y, int size, int count);

}  // namespace mlx_edge
