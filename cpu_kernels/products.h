// Rows times weights over the pool: activations made ready once, several weights in one region.
#pragma once

#include <algorithm>
#include <vector>

#include "blocks.h"
#include "pool.h"
#include "workspace.h"

namespace mlx_edge {

constexpr int SLICE = 256;    // rows that go through a block at once
constexpr int COLUMNS = 128;  // of an MLP shared out at once: whole groups of any size

// Calls work(first row, count) for slices of `num_rows`.
template <class Work>
void in_slices(int num_rows, Work&& work) {
  for (int begin = 0; begin < num_rows; begin += SLICE) work(begin, std::min(SLICE, num_rows - begin));
}

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
  // The same for a part of the rows that are codes by themselves, which `quantize_part` makes.
  Rows part_for(const Matrix& w, int first, int count) const;
  // Codes of rows [begin, end) of the part, columns [first_column, last_column); whole groups. Any thread.
  void quantize_part(int first, int count, int begin, int end, int first_column, int last_column) const;
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
