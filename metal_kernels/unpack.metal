// Affine packs to floats: the loads that every quantized kernel shares.
//
// A uint32 holds 32 / BITS values, the first in the lowest bits (MLX's layout). Integer-to-float conversion runs at
// a quarter of the multiply-add rate on Apple's GPUs, so 4-bit values become halves by setting mantissa bits:
// 0x6400 is 1024.0h, whose last mantissa bit is worth 1; the 1024 is taken off once, together with the offset.
//
// Pointers are template parameters, because MLX passes inputs of fewer than eight elements as `constant`.

#include <metal_stdlib>

namespace mlx_edge {

constant constexpr float HALF_BIAS = 1024.0f;

// Values i and i + 4 of eight packed nibbles, each plus HALF_BIAS, for i from 0 to 3.
inline half2 biased_nibbles(uint packs, uint i) {
  return metal::as_type<half2>(((packs >> (4 * i)) & 0x000f000fu) | 0x64006400u);
}

// One value of BITS bits at `index`, for widths that do not divide 32 (3, 5, 6) as well as those that do.
template <int BITS, typename Packs>
inline uint packed_value(Packs packs, uint index) {
  const uint bit = index * BITS;
  const uint word = bit / 32;
  const uint shift = bit % 32;
  uint value = packs[word] >> shift;
  if (shift + BITS > 32) {
    value |= packs[word + 1] << (32 - shift);
  }
  return value & ((1u << BITS) - 1u);
}

}  // namespace mlx_edge
