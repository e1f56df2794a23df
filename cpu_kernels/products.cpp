#include "products.h"

#include <algorithm>
#include <stdexcept>

namespace mlx_edge {

const Kernels& kernels() {
  static const Kernels& found = [] () -> const Kernels& {
    const Kernels* table = find_kernels();
    if (!table) throw std::runtime_error("MLX_EDGE_CPU_ISA names an instruction set that this machine or build lacks");
    return *table;
  }();
  return found;
}

// Never destroyed, as the pool is not.
Workspace& shared_workspace() {
  static Workspace& it = *new Workspace;
  return it;
}

int piece_of(const Pool& pool, int total, int pieces_per_thread) {
  return std::max(1, total / (pool.num_threads() * pieces_per_thread));
}

Input::Input(std::vector<Codes>& memory, const float* values, ptrdiff_t stride, int count, int columns, Precision precision,
             const std::vector<const Weight*>& weights)
    : plain_{values, stride, count, columns, 0, nullptr, nullptr, nullptr} {
  if (precision == Precision::floating) return;
  for (const Weight* weight : weights) {
    const Matrix& w = weight->matrix;
    const bool is_known = std::any_of(coded_.begin(), coded_.end(),
                                      [&](const Rows& rows) { return rows.group_size == w.group_size; });
    if (w.format == Format::dense || is_known) continue;
    const size_t index = coded_.size();
    if (memory.size() <= index) memory.resize(index + 1);
    Codes& codes = memory[index];
    const size_t num_scales = kernels().scales_count(count, columns, w.group_size);
    Rows rows = plain_;
    rows.group_size = w.group_size;
    rows.codes = codes.codes.take(kernels().codes_bytes(count, columns));
    rows.scales = codes.scales.take(num_scales);
    rows.sums = codes.sums.take(num_scales);
    coded_.push_back(rows);
  }
}

void Input::quantize(int begin, int end, int first, int last) const {
  for (const Rows& rows : coded_)
    kernels().quantize(rows, begin, end, first / rows.group_size, last / rows.group_size);
}

void Input::quantize_all(Pool& pool) const {
  if (coded_.empty()) return;
  pool.run(plain_.count, piece_of(pool, plain_.count),
           [&](int begin, int end) { quantize(begin, end, 0, plain_.columns); });
}

const Rows& Input::rows_for(const Matrix& w) const {
  if (w.format != Format::dense)
    for (const Rows& rows : coded_)
      if (rows.group_size == w.group_size) return rows;
  return plain_;
}

namespace {

// Codes of a part begin where those of its first row would: all of a row's numbers are as many, whatever the tile.
Rows part_of(Rows rows, int first, int count) {
  rows.values += first * rows.stride;
  rows.count = count;
  if (!rows.codes) return rows;
  const ptrdiff_t numbers = static_cast<ptrdiff_t>(first) * (rows.columns / rows.group_size);
  rows.codes += static_cast<ptrdiff_t>(first) * rows.columns;
  rows.scales += numbers, rows.sums += numbers;
  return rows;
}

}  // namespace

Rows Input::part_for(const Matrix& w, int first, int count) const { return part_of(rows_for(w), first, count); }

void Input::quantize_part(int first, int count, int begin, int end, int first_column, int last_column) const {
  for (const Rows& rows : coded_)
    kernels().quantize(part_of(rows, first, count), begin, end, first_column / rows.group_size,
                       last_column / rows.group_size);
}

void multiply(Pool& pool, const Input& input, const std::vector<Product>& products) {
  int total = 0;
  for (const Product& product : products) total += num_blocks(product.weight);
  pool.run(total, piece_of(pool, total), [&](int begin, int end) {
    int first = 0;  // block of the product at hand
    for (const Product& product : products) {
      const int count = num_blocks(product.weight);
      const int from = std::max(begin - first, 0), to = std::min(end - first, count);
      if (from < to)
        kernels().multiply(product.weight, input.rows_for(product.weight), product.add, product.y, product.stride, from,
                           to);
      first += count;
    }
  });
}

}  // namespace mlx_edge
