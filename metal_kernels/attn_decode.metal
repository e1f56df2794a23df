// attn_decode: attention of the newest rows over keys and values stored as T; attend.metal says all of it.

#include "attend.metal"

namespace mlx_edge {

// N neighbours, loaded at once.
template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Run {
  T values[N];
};

// Pointer: `const device T*`, or `device T*` for rows to be written.
template <class T, int D, class Pointer>
struct PlainRows {
  Pointer data;

  PlainRows at(uint row) {
    return {data + ulong(row) * D};
  }

  template <int N>
  void read(int d, thread float* values) {
    Run<T, N> run = *(const device Run<T, N>*)(data + d);
    UNROLL
    for (int i = 0; i < N; i++) {
      values[i] = float(run.values[i]);
    }
  }

  template <class From>
  void copy(From row, int lane) {
    for (int d = lane; d < D; d += LANES) {
      data[d] = row.data[d];
    }
  }

  void write(threadgroup float* row, int lane) {
    for (int d = lane; d < D; d += LANES) {
      data[d] = T(row[d]);
    }
  }
};

}  // namespace mlx_edge
