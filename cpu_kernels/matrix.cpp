#include "matrix.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "half.h"

namespace mlx_edge {
namespace {

constexpr int UNIT = 32;   // columns whose codes lie together: eight slices
constexpr int SLICE = 64;  // bytes of 16 rows x 4 columns, a code a byte

// Calls f(width, shift) for each plane of a code: the binary digits of `bits`, the largest first; a plane holds the
// code's bits [shift, shift + width) and begins SLICE * shift bytes into its unit.
template <class F>
void for_each_plane(int bits, F f) {
  for (int width = 8, shift = 0; width > 0; width /= 2)
    if (bits & width) {
      f(width, shift);
      shift += width;
    }
}

// Where slice j of a plane lies in its unit, and at which bit of the bytes there.
size_t slice_offset(int j, int width, int shift) { return static_cast<size_t>(SLICE * shift + SLICE * (j * width / 8)); }
int slice_bit(int j, int width) { return j * width % 8; }

size_t code_bytes(const Matrix& w) { return static_cast<size_t>(ROWS) * w.group_size * w.bits / 8; }

float element(const uint8_t* p, Float type, size_t i) {
  if (type == Float::f32) {
    float x;
    std::memcpy(&x, p + i * 4, sizeof x);
    return x;
  }
  uint16_t h;
  std::memcpy(&h, p + i * 2, sizeof h);
  return type == Float::f16 ? f16_to_float(h) : bf16_to_float(h);
}

// 32 columns of one row, a little-endian stream of codes, into the planes of its unit.
template <int BITS>
void pack_unit(const uint8_t* from, uint8_t* unit, int row) {
  uint8_t stream[4 * BITS + 8] = {};
  std::memcpy(stream, from, 4 * BITS);
  for (int j = 0; j < 8; j++) {
    uint64_t window;
    std::memcpy(&window, stream + j * 4 * BITS / 8, sizeof window);
    window >>= j * 4 * BITS % 8;
    uint32_t four = 0;  // a code a byte
    for (int c = 0; c < 4; c++) four |= static_cast<uint32_t>(window >> (c * BITS) & ((1u << BITS) - 1)) << (8 * c);
    for_each_plane(BITS, [&](int width, int shift) {
      const uint32_t mask = 0x01010101u * ((1u << width) - 1);
      uint8_t* to = unit + slice_offset(j, width, shift) + row * 4;
      uint32_t had = 0;
      const int bit = slice_bit(j, width);
      if (bit > 0) std::memcpy(&had, to, sizeof had);
      had |= (four >> shift & mask) << bit;
      std::memcpy(to, &had, sizeof had);
    });
  }
}

template <int BITS>
void pack_codes(const Matrix& w, const uint8_t* packs, uint8_t* to, int begin, int end) {
  const size_t row_bytes = static_cast<size_t>(w.columns) * BITS / 8, stride = group_bytes(w);
  const int groups = w.columns / w.group_size, units = w.group_size / UNIT;
  for (int block = begin; block < end; block++)
    for (int g = 0; g < groups; g++) {
      uint8_t* group = to + (static_cast<size_t>(block) * groups + g) * stride;
      if ((block + 1) * ROWS > w.rows) std::memset(group, 0, stride);
      for (int r = 0; r < std::min(ROWS, w.rows - block * ROWS); r++) {
        const uint8_t* from = packs + (static_cast<size_t>(block) * ROWS + r) * row_bytes;
        for (int u = 0; u < units; u++)
          pack_unit<BITS>(from + (static_cast<size_t>(g) * units + u) * 4 * BITS, group + u * SLICE * BITS, r);
      }
    }
}

}  // namespace

size_t group_bytes(const Matrix& w) {
  const size_t scales = w.format == Format::mxfp4 ? ROWS : 2 * ROWS * float_size(w.float_type);
  return code_bytes(w) + scales;
}

size_t packed_bytes(const Matrix& w) {
  if (w.format == Format::dense) return static_cast<size_t>(w.rows) * w.columns * float_size(w.float_type);
  return static_cast<size_t>(num_blocks(w)) * (w.columns / w.group_size) * group_bytes(w);
}

void pack(const Matrix& w, const uint32_t* packs, const void* scales, const void* offsets, uint8_t* to, int begin, int end) {
  const uint8_t* codes = reinterpret_cast<const uint8_t*>(packs);
  switch (w.bits) {
    case 2: pack_codes<2>(w, codes, to, begin, end); break;
    case 3: pack_codes<3>(w, codes, to, begin, end); break;
    case 4: pack_codes<4>(w, codes, to, begin, end); break;
    case 5: pack_codes<5>(w, codes, to, begin, end); break;
    case 6: pack_codes<6>(w, codes, to, begin, end); break;
    default: pack_codes<8>(w, codes, to, begin, end);
  }
  const size_t size = w.format == Format::mxfp4 ? 1 : float_size(w.float_type);
  const int groups = w.columns / w.group_size;
  for (int row = begin * ROWS; row < std::min(end * ROWS, w.rows); row++)
    for (int g = 0; g < groups; g++) {
      const size_t from = (static_cast<size_t>(row) * groups + g) * size;
      uint8_t* group = to + (static_cast<size_t>(row / ROWS) * groups + g) * group_bytes(w) + code_bytes(w);
      std::memcpy(group + row % ROWS * size, static_cast<const uint8_t*>(scales) + from, size);
      if (w.format == Format::affine)
        std::memcpy(group + (ROWS + row % ROWS) * size, static_cast<const uint8_t*>(offsets) + from, size);
    }
}

void unpack_row(const Matrix& w, int row, float* to) {
  if (w.format == Format::dense) {
    for (int k = 0; k < w.columns; k++) to[k] = element(w.data, w.float_type, static_cast<size_t>(row) * w.columns + k);
    return;
  }
  const int groups = w.columns / w.group_size, r = row % ROWS;
  for (int k = 0; k < w.columns; k++) {
    const int column = k % w.group_size, j = column % UNIT / 4;
    const uint8_t* group = w.data + (static_cast<size_t>(row / ROWS) * groups + k / w.group_size) * group_bytes(w);
    const uint8_t* unit = group + column / UNIT * SLICE * w.bits;
    int code = 0;
    for_each_plane(w.bits, [&](int width, int shift) {
      const int byte = unit[slice_offset(j, width, shift) + r * 4 + k % 4];
      code |= (byte >> slice_bit(j, width) & ((1 << width) - 1)) << shift;
    });
    const uint8_t* scales = group + code_bytes(w);
    if (w.format == Format::mxfp4)
      to[k] = std::ldexp(static_cast<float>(MXFP4_TABLE[code] - 12) / 2, scales[r] - 127);
    else
      to[k] = std::fma(element(scales, w.float_type, r), static_cast<float>(code), element(scales, w.float_type, ROWS + r));
  }
}

const char* refuse(const Matrix& w) {
  if (w.rows < 1 || w.columns < 1) return "the matrix is empty";
  if (w.format == Format::dense) return nullptr;
  if (w.format == Format::mxfp4 && (w.bits != 4 || w.group_size != 32)) return "mxfp4 has 4 bits and groups of 32";
  if (w.bits < 2 || w.bits > 8 || w.bits == 7) return "codes have 2, 3, 4, 5, 6 or 8 bits";
  if (w.group_size != 32 && w.group_size != 64 && w.group_size != 128) return "groups have 32, 64 or 128 columns";
  if (w.columns % w.group_size != 0) return "the columns are no multiple of the group";
  return nullptr;
}

}  // namespace mlx_edge
