// Joins the parts of a long context, as attn_decode would have joined them had there been one.
//
//   joint = the largest of the parts' tops, and of the sink
//   heads = sum over parts of 2^(top - joint) value / (sum of 2^(top - joint) total + 2^(sink - joint))
//
// Grid: (D, H, M) threads, a threadgroup for each row and head. Reads every part once, D + 2 floats; writes D numbers.
// No threadgroup memory. Parts are added in the order of their positions; one that has seen nothing adds zeros.
// Tolerance: a rounding to T, and 2^-23 relative for each part.

#include "rows.metal"

namespace mlx_edge {

// `values` (M, H, parts, D), `sums` (M, H, 2, parts): tops and totals.
template <int D, class T>
void attn_combine(const device float* values, const device float* sums, float sink, int parts, device T* heads,
                  uint row, uint d) {
  values += ulong(row) * parts * D + d;
  heads[row * D + d] = T(finish(join(sums + ulong(row) * 2 * parts, values, D, parts), sink));
}

}  // namespace mlx_edge
