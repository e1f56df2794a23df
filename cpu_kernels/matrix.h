// How a weight lies in memory. Knows no instruction set and no MLX.
//
// A packed matrix is cut into blocks of ROWS rows; a block is a run of groups along K, and a group is what the kernels
// stream: the codes of ROWS rows x group_size columns, then ROWS scales, then ROWS offsets (none for mxfp4).
// README.md draws the bytes. Rows beyond the matrix are zeros.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mlx_edge {

constexpr int ROWS = 16;  // rows in a block of a packed matrix

enum class Format : int { affine = 0, mxfp4 = 1, dense = 2 };
enum class Float : int { f32 = 0, f16 = 1, bf16 = 2 };

inline size_t float_size(Float type) { return type == Float::f32 ? 4 : 2; }

struct Matrix {
  Format format;
  int rows;            // N, of the weight itself
  int columns;         // K
  int bits;            // of a code; 4 for mxfp4; unused for dense
  int group_size;      // columns that share a scale; unused for dense
  Float float_type;    // of scales and offsets (affine) or of the elements (dense)
  const uint8_t* data; // packed blocks; for dense the rows as the checkpoint has them, (N, K)
  const float* bias;   // (N), or null
};

// What a 4-bit float (e2m1) is as an unsigned byte: twice its value plus 12.
constexpr uint8_t MXFP4_TABLE[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

// Blocks that a matrix's work is shared out in: ROWS rows each, the last one may be ragged.
inline int num_blocks(const Matrix& w) { return (w.rows + ROWS - 1) / ROWS; }

// Bytes of one group of a block, and of all that `data` points to: the packed matrix, or a dense one's rows.
size_t group_bytes(const Matrix& w);
size_t packed_bytes(const Matrix& w);

// From MLX's layout (uint32 packs (N, K * bits / 32), scales and offsets (N, K / group_size)) into `to`, blocks
// [begin, end). For mxfp4 the scales are e8m0 bytes and there are no offsets. Needs nothing but w's sizes.
void pack(const Matrix& w, const uint32_t* packs, const void* scales, const void* offsets, uint8_t* to, int begin, int end);

// Row `row` as floats (K): the embedding's lookup, and a test's oracle of the layout.
void unpack_row(const Matrix& w, int row, float* to);

// Why the kernels cannot serve these sizes, or null: bits, group and columns that do not fit.
const char* refuse(const Matrix& w);

}  // namespace mlx_edge
