// Roundings that clang leaves to its runtime library, which a kernel is not linked with. A 16-bit float is passed in
// the low bits of a float register; it is written as `float` here, because older compilers have no type for it.
#include <cstring>

#include "interface.h"

static emu_u32 bits_of(float value) {
  emu_u32 bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
static float float_of(emu_u32 bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

EMU_EXTERN float __truncsfbf2(float value) {
  emu_u32 bits = bits_of(value);
  if ((bits & 0x7FFFFFFF) > 0x7F800000)
    bits |= 0x00400000;  // a NaN stays one
  else
    bits += 0x7FFF + (bits >> 16 & 1);  // to nearest, ties to even
  return float_of(bits >> 16);
}

EMU_EXTERN float __truncsfhf2(float value) {
  emu_u32 bits = bits_of(value), sign = bits >> 16 & 0x8000, half;
  bits &= 0x7FFFFFFF;
  if (bits > 0x7F800000) {
    half = 0x7E00;
  } else if (bits >= 0x477FF000) {  // 65520 and above
    half = 0x7C00;
  } else if (bits < 0x38800000) {  // subnormal: adding 0.5 puts the last bit where float rounds
    half = bits_of(float_of(bits) + 0.5f) - 0x3F000000;
  } else {
    half = (bits + (bits >> 13 & 1) + 0xFFF - 0x38000000) >> 13;
  }
  return float_of(half | sign);
}

EMU_EXTERN float __extendhfsf2(float value) {
  emu_u32 half = bits_of(value) & 0xFFFF, exponent = half >> 10 & 31, mantissa = half & 1023;
  emu_u32 sign = (half & 0x8000) << 16;
  if (exponent == 31) return float_of(sign | 0x7F800000 | mantissa << 13);
  if (exponent) return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
  return float_of(sign | bits_of((float)mantissa * 0x1p-24f));
}
