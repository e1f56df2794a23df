// packed_float3 and the like: the elements without padding, aligned as one element. They are storage: a calculation
// goes through the vector they convert to.
#pragma once

namespace metal {

template <class T, int N>
struct emu_packed_elements;
template <class T>
struct emu_packed_elements<T, 2> {
  T x, y;
};
template <class T>
struct emu_packed_elements<T, 3> {
  T x, y, z;
};
template <class T>
struct emu_packed_elements<T, 4> {
  T x, y, z, w;
};

template <class T, int N>
struct packed_vec : emu_packed_elements<T, N> {
  packed_vec() = default;
  EMU_FUNC packed_vec(vec<T, N> v) {
    for (int i = 0; i < N; i++) (&this->x)[i] = v[i];
  }
  EMU_FUNC packed_vec(T a, T b) : emu_packed_elements<T, N>{a, b} {}
  EMU_FUNC packed_vec(T a, T b, T c) : emu_packed_elements<T, N>{a, b, c} {}
  EMU_FUNC packed_vec(T a, T b, T c, T d) : emu_packed_elements<T, N>{a, b, c, d} {}
  EMU_FUNC operator vec<T, N>() const {
    vec<T, N> v;
    for (int i = 0; i < N; i++) v[i] = (&this->x)[i];
    return v;
  }
  EMU_FUNC operator vec<T, N>() const constant {
    vec<T, N> v;
    for (int i = 0; i < N; i++) v[i] = (&this->x)[i];
    return v;
  }
  EMU_FUNC T& operator[](int i) { return (&this->x)[i]; }
  EMU_FUNC T operator[](int i) const { return (&this->x)[i]; }
  EMU_FUNC T operator[](int i) const constant { return (&this->x)[i]; }
};

#define EMU_NAME_PACKED(T)               \
  using packed_##T##2 = packed_vec<T, 2>; \
  using packed_##T##3 = packed_vec<T, 3>; \
  using packed_##T##4 = packed_vec<T, 4>;
EMU_NAME_PACKED(char)
EMU_NAME_PACKED(uchar)
EMU_NAME_PACKED(short)
EMU_NAME_PACKED(ushort)
EMU_NAME_PACKED(int)
EMU_NAME_PACKED(uint)
EMU_NAME_PACKED(long)
EMU_NAME_PACKED(ulong)
EMU_NAME_PACKED(half)
EMU_NAME_PACKED(bfloat)
EMU_NAME_PACKED(float)
#undef EMU_NAME_PACKED

static_assert(sizeof(packed_float3) == 12 && alignof(packed_float3) == 4, "packed_float3");
static_assert(sizeof(packed_half3) == 6 && alignof(packed_half3) == 2, "packed_half3");
static_assert(sizeof(packed_uchar4) == 4 && alignof(packed_uchar4) == 1, "packed_uchar4");

}  // namespace metal
