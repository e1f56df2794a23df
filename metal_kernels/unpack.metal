// How a lane reads weights: affine codes of 2, 3, 4, 5, 6, 8 bits, mxfp4, and plain floats, which count as 32 bits.
//
//   affine  w = scale * code + offset      mxfp4  w = scale * e2m1      floats  w
//
// MLX's layout: value i of a row has its bits at i * BITS, the lowest first, across uint32 words. A lane takes a run of
// values that ends where a word does, and unpacks it by pieces of eight. Converting an integer to a float runs at a
// quarter of the multiply-add rate on Apple's GPUs, so codes are put into a mantissa instead: 0x6400 is 1024 in half,
// and its last bit is worth 1; 0x4b000000 is 2^23 in float. A code that lies higher up in the mantissa stays there:
// taking the bias off and scaling down is one multiply-add, and exact, so that every float here is the code itself.

#include <metal_stdlib>

#define UNROLL _Pragma("clang loop unroll(full)")

namespace mlx_edge {
using namespace metal;

template <int BITS, typename Packs>
inline uint read_word(Packs packs, uint index) {
  return BITS == 32 ? as_type<uint>(float(packs[index])) : uint(packs[index]);
}

// A group's scale and offset. That of mxfp4 is the exponent of a power of two (E8M0: 0 is 2^-127); floats have none.
template <int BITS, bool MXFP4, typename Scales, typename Offsets>
inline float2 read_scale(Scales scales, Offsets offsets, uint group) {
  if (BITS == 32) {
    return float2(1.0f, 0.0f);
  }
  if (MXFP4) {
    return float2(as_type<float>(max(uint(scales[group]) << 23, 0x00400000u)), 0.0f);
  }
  return float2(float(scales[group]), float(offsets[group]));
}

// Code `index` of a run of words, wherever it lies.
template <int BITS>
inline float unpack_code(const thread uint* words, int index) {
  const uint mask = (1u << BITS) - 1u;
  const int shift = index * BITS % 32;
  uint code = words[index * BITS / 32];
  if (shift + BITS <= 23) {
    const float unit = 1.0f / (1 << shift);
    return fma(as_type<float>((code & (mask << shift)) | 0x4b000000u), unit, -8388608.0f * unit);
  }
  code >>= shift;
  if (shift + BITS > 32) {
    code |= words[index * BITS / 32 + 1] << (32 - shift);
  }
  return as_type<float>((code & mask) | 0x4b000000u) - 8388608.0f;
}

// Pair `i` of the four in a piece of 2, 4 or 8 bits: two values that lie 16 bits apart in a word. An e2m1's exponent and
// mantissa lie in a half as they do in the code, 2^14 too low.
template <int BITS, bool MXFP4>
inline half2 unpack_pair(const thread uint* words, int piece, int i) {
  uint word = words[BITS == 8 ? piece * 2 + i / 2 : piece * BITS / 4];
  int shift = 0;
  if (MXFP4) {
    word >>= 4 * i;
    return as_type<half2>(((word & 0x00070007u) << 9) | ((word & 0x00080008u) << 12)) * half(16384.0f);
  }
  if (BITS == 2) {
    word >>= 16 * (piece % 2);
    word = (word & 0xffu) | ((word & 0xff00u) << 8);
    shift = 2 * i;
  } else if (BITS == 4) {
    word >>= i / 2 * 8;
    shift = i % 2 * 4;
  } else {
    word >>= i % 2 * 8;
  }
  const uint mask = ((1u << BITS) - 1u) << shift;
  const float unit = 1.0f / (1 << shift);
  return fma(as_type<half2>((word & (mask | mask << 16)) | 0x64006400u), half2(half(unit)), half2(half(-1024.0f * unit)));
}

// Writes values 8 * piece to 8 * piece + 7 of a run, as stored: scale and offset are the caller's.
template <int BITS, bool MXFP4>
inline void unpack_piece(const thread uint* words, int piece, thread float* values) {
  if constexpr (BITS == 2 || BITS == 4 || BITS == 8) {
    UNROLL for (int i = 0; i < 4; i++) {
      const half2 pair = unpack_pair<BITS, MXFP4>(words, piece, i);
      const int first = BITS == 8 ? i + i / 2 * 2 : i;  // 0, 1, 4, 5
      values[first] = pair.x;
      values[first + (BITS == 8 ? 2 : 4)] = pair.y;
    }
  } else {
    UNROLL for (int i = 0; i < 8; i++) {
      values[i] = BITS == 32 ? as_type<float>(words[8 * piece + i]) : unpack_code<BITS>(words, 8 * piece + i);
    }
  }
}

}  // namespace mlx_edge
