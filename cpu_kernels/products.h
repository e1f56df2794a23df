// Rows times weights over the pool: activations made ready once, several weights in one region.
#pragma once

#include <vector>

#include "blocks.h"
#include "pool.h"
#include "workspace.h"

namespace mlx_edge {

constexpr int SLICE = 256;  // rows that go through a block at once

const Kernels& kernels();       // of this machine, or those of MLX_EDGE_CPU_ISA
Workspace& shared_workspace();  // of whoever holds the pool's turn

// Rows as floats, and as codes for each group size that one of the weights asks for.
class Input {
 public:
  Input(std::vector<Codes>& memory, const float* values, ptrdiff_t stride, int count, int columns, Precision precision,
        const std::vector<const Weight*>& weights);

  // Makes the codes of rows [begin, end), columns [first, last); whole groups. Any thread.
  void quantize(int begin, int end, int first, int last) const;
  // All rows, shared out.
  void quantize_all(Pool& pool) const;

  const Rows& rows_for(const Matrix& w) const;
  int count() const { return plain_.count; }

 private:
  Rows plain_;
  std::vector<Rows> coded_;
};

struct Product {
  Matrix weight;
  const float* add;  // or null
  float* y;
  ptrdiff_t stride;
};

// All products of one input, their blocks shared out together.
void multiply(Pool& pool, const Input& input, const std::vector<Product>& products);

// The piece to share `total` out in: several a thread, so that a slow core holds up little.
int piece_of(const Pool& pool, int total, int pieces_per_thread = 6);

}  // namespace mlx_edge
