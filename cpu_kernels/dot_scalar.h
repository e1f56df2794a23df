// Integer dots in plain C++. They are not inlined: a hundred of them in a row are for vector sets.
#pragma once

namespace mlx_edge::MLX_EDGE_ISA {

constexpr int TILE = 2;        // rows of activations that meet one load of the weight's codes
constexpr int DENSE_TILE = 2;  // the same among floats, with four rows of the weight

struct Bytes {  // the codes of WIDTH rows x 4 columns
  uint8_t at[WIDTH * 4];
};
struct Ints {  // WIDTH sums of 32 bits
  int32_t at[WIDTH];
};
using Partial = Ints;

constexpr int depth(int) { return 8; }
constexpr bool SIGNED = false;  // codes are dotted as unsigned bytes

template <class F>
inline Bytes each_byte(F f) {
  Bytes y;
  for (int i = 0; i < WIDTH * 4; i++) y.at[i] = static_cast<uint8_t>(f(i));
  return y;
}
__attribute__((noinline)) inline Bytes load_bytes(const uint8_t* p) {
  return each_byte([&](int i) { return p[i]; });
}
__attribute__((noinline)) inline void store_bytes(uint8_t* p, Bytes x) { std::copy(x.at, x.at + WIDTH * 4, p); }
template <int LEFT>  // a negative shift goes right
__attribute__((noinline)) inline Bytes shift_and_mask(Bytes x, int mask) {
  return each_byte([&](int i) { return (LEFT > 0 ? x.at[i] << std::max(LEFT, 0) : x.at[i] >> std::max(-LEFT, 0)) & mask; });
}
__attribute__((noinline)) inline Bytes either(Bytes a, Bytes b) {
  return each_byte([&](int i) { return a.at[i] | b.at[i]; });
}
__attribute__((noinline)) inline Bytes minus_128(Bytes x) {
  return each_byte([&](int i) { return x.at[i] ^ 128; });
}
__attribute__((noinline)) inline Bytes look_up(const uint8_t* table, Bytes index) {
  return each_byte([&](int i) { return table[index.at[i]]; });
}
__attribute__((noinline)) inline Bytes four_codes(const int8_t* x) {
  return each_byte([&](int i) { return x[i % 4]; });
}

inline Partial no_partial() { return Partial{}; }
__attribute__((noinline)) inline Partial dot(Partial sum, Bytes w, Bytes x) {
  for (int i = 0; i < WIDTH * 4; i++) sum.at[i / 4] += w.at[i] * static_cast<int8_t>(x.at[i]);
  return sum;
}
inline Ints no_ints() { return Ints{}; }
template <int FACTOR>
__attribute__((noinline)) inline Ints widen(Ints sum, Partial p) {
  for (int i = 0; i < WIDTH; i++) sum.at[i] += FACTOR * p.at[i];
  return sum;
}
__attribute__((noinline)) inline Floats to_floats(Ints x) {
  return each([&](int i) { return static_cast<float>(x.at[i]); });
}

}  // namespace mlx_edge::MLX_EDGE_ISA
