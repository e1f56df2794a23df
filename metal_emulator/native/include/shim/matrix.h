// <metal_simdgroup_matrix>: 8x8 matrices spread over a simdgroup. A lane holds two neighbours of one row:
//   row = (lane / 4 & 4) + lane / 2 % 4, column = (lane / 4 & 2) * 2 + lane % 2 * 2
// which is Apple's layout as MLX's steel kernels rely on it. Products are summed in float, k ascending; what Apple
// does inside is not known.
#pragma once

namespace metal {

EMU_FUNC uint emu_matrix_row(uint lane) { return (lane / 4 & 4) + lane / 2 % 4; }
EMU_FUNC uint emu_matrix_column(uint lane) { return (lane / 4 & 2) * 2 + lane % 2 * 2; }
EMU_FUNC uint emu_matrix_lane(uint row, uint column) {
  return (row & 4) << 2 | (column & 4) << 1 | (row & 3) << 1 | (column >> 1 & 1);
}

template <class T, int Columns, int Rows>
struct simdgroup_matrix {
  static_assert(Columns == 8 && Rows == 8, "simdgroup matrices are 8x8");
  static_assert(is_floating_point_v<T>, "simdgroup matrices hold half, bfloat or float");
  vec<T, 2> emu_elements;

  EMU_FUNC simdgroup_matrix() {}
  EMU_FUNC explicit simdgroup_matrix(T diagonal) {
    uint row = emu_matrix_row(emu_lane()), column = emu_matrix_column(emu_lane());
    for (uint j = 0; j < 2; j++) emu_elements[j] = row == column + j ? diagonal : T(0);
  }
  EMU_FUNC thread vec<T, 2>& thread_elements() thread { return emu_elements; }
  EMU_FUNC const thread vec<T, 2>& thread_elements() const thread { return emu_elements; }
};
using simdgroup_float8x8 = simdgroup_matrix<float, 8, 8>;
using simdgroup_half8x8 = simdgroup_matrix<half, 8, 8>;
using simdgroup_bfloat8x8 = simdgroup_matrix<bfloat, 8, 8>;

template <class T>
EMU_FUNC simdgroup_matrix<T, 8, 8> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, 8, 8> m;
  m.emu_elements = value;
  return m;
}
template <class T, int Columns, int Rows = Columns, class U>
EMU_FUNC simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(U value) {
  return make_filled_simdgroup_matrix<T>(T(value));
}
template <class T, int Columns, int Rows = Columns, class U>
EMU_FUNC simdgroup_matrix<T, Columns, Rows> make_diagonal_simdgroup_matrix(U value) {
  return simdgroup_matrix<T, Columns, Rows>(T(value));
}

template <class A, class B>
struct emu_factors {
  vec<A, 2> a;
  vec<B, 2> b;
};

// The two elements of this lane of A * B + sum.
template <class A, class B>
EMU_OUTLINE float2 emu_multiply_matrices(const thread emu_slots* slots, uint lane, float2 sum) {
  using Factors = const thread emu_factors<A, B>;
  uint row = emu_matrix_row(lane), column = emu_matrix_column(lane);
  for (uint k = 0; k < 8; k++) {
    float a = (float)((Factors*)slots->value[emu_matrix_lane(row, k)])->a[k & 1];
    vec<B, 2> b = ((Factors*)slots->value[emu_matrix_lane(k, column)])->b;
    sum[0] += a * (float)b[0];
    sum[1] += a * (float)b[1];
  }
  return sum;
}

template <class D, class A, class B>
EMU_FUNC vec<D, 2> emu_multiply_accumulate(vec<A, 2> a, vec<B, 2> b, float2 sum, emu_site site) {
  emu_factors<A, B> factors = {a, b};
  thread emu_slots* slots =
      emu_exchange(EMU_MATRIX_MULTIPLY, site, (const thread void*)&factors, sizeof(factors));
  if (slots->active != 0xFFFFFFFFu) emu_misused(EMU_MATRIX_INACTIVE, site, 0, slots->active);
  float2 r = emu_multiply_matrices<A, B>(slots, emu_lane(), sum);
  vec<D, 2> d;
  d[0] = (D)r[0];
  d[1] = (D)r[1];
  return d;
}

template <class D, class A, class B, class C>
EMU_FUNC void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, 8, 8>& d, thread simdgroup_matrix<A, 8, 8>& a,
                                            thread simdgroup_matrix<B, 8, 8>& b, thread simdgroup_matrix<C, 8, 8>& c,
                                            EMU_HERE) {
  float2 sum = {(float)c.emu_elements[0], (float)c.emu_elements[1]};
  d.emu_elements = emu_multiply_accumulate<D>(a.emu_elements, b.emu_elements, sum, site);
}
template <class D, class A, class B>
EMU_FUNC void simdgroup_multiply(thread simdgroup_matrix<D, 8, 8>& d, thread simdgroup_matrix<A, 8, 8>& a,
                                 thread simdgroup_matrix<B, 8, 8>& b, EMU_HERE) {
  float2 sum = {0.0f, 0.0f};
  d.emu_elements = emu_multiply_accumulate<D>(a.emu_elements, b.emu_elements, sum, site);
}

// Where element `j` of this lane lies in memory.
EMU_FUNC ulong emu_matrix_index(uint j, ulong elements_per_row, ulong2 origin, bool transpose) {
  ulong row = emu_matrix_row(emu_lane()), column = emu_matrix_column(emu_lane()) + j;
  return transpose ? (origin[1] + column) * elements_per_row + origin[0] + row
                   : (origin[1] + row) * elements_per_row + origin[0] + column;
}

#define EMU_MATRIX_LOAD(space)                                                                             \
  template <class T>                                                                                       \
  EMU_FUNC void simdgroup_load(thread simdgroup_matrix<T, 8, 8>& m, const space T* from,                   \
                               ulong elements_per_row = 8, ulong2 origin = ulong2{0, 0},                   \
                               bool transpose = false, EMU_HERE) {                                         \
    for (uint j = 0; j < 2; j++)                                                                           \
      m.emu_elements[j] = from[emu_matrix_index(j, elements_per_row, origin, transpose)];                  \
    emu_barrier(EMU_MATRIX_MEMORY, site, EMU_MEM_NONE);                                                    \
  }
#define EMU_MATRIX_STORE(space)                                                                            \
  template <class T>                                                                                       \
  EMU_FUNC void simdgroup_store(const thread simdgroup_matrix<T, 8, 8>& m, space T* to,                    \
                                ulong elements_per_row = 8, ulong2 origin = ulong2{0, 0},                  \
                                bool transpose = false, EMU_HERE) {                                        \
    for (uint j = 0; j < 2; j++)                                                                           \
      to[emu_matrix_index(j, elements_per_row, origin, transpose)] = m.emu_elements[j];                    \
    emu_barrier(EMU_MATRIX_MEMORY, site, EMU_MEM_NONE);                                                    \
  }
EMU_MATRIX_LOAD(device)
EMU_MATRIX_LOAD(constant)
EMU_MATRIX_LOAD(threadgroup)
EMU_MATRIX_STORE(device)
EMU_MATRIX_STORE(threadgroup)
#undef EMU_MATRIX_LOAD
#undef EMU_MATRIX_STORE

}  // namespace metal
