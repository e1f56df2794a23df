// attn_decode_q: attend.metal over packed keys and values, MLX's affine layout with groups along the head.
//
//   x       = scale * code + offset: BITS bits a code, one scale and offset for GROUP neighbours (cache/quantized.py)
//   scale   = (max - min) / (2^BITS - 1), then moved so that zero has a code; negative when |max| is the larger
//   offset  = min or max, whichever has the larger magnitude; 0 where that is nearer to zero than a step
//   code    = rint((x - offset) / scale), before scale and offset are rounded to T: all as mx.quantize on a CPU
//
// Grid, order, tolerance: attend.metal's. Traffic: BITS / 8 + 2 * sizeof(T) / GROUP bytes a number, in three planes. A
// new row is packed by one simdgroup: a lane has the numbers of a word, and the lanes of a group find its ends by shuffles.

#include "attend.metal"

namespace mlx_edge {

// Words and Floats: pointers to const, or to what is to be written.
template <class T, int D, int BITS, int GROUP, class Words, class Floats>
struct PackedRows {
  Words codes;             // D / COUNT a row
  Floats scales, offsets;  // D / GROUP a row

  enum : int {
    COUNT = 32 / BITS,      // codes of a word
    SHARE = GROUP / COUNT,  // words of a group
    LAST = (1 << BITS) - 1,
  };

  PackedRows at(uint row) {
    return {codes + ulong(row) * D / COUNT, scales + ulong(row) * D / GROUP, offsets + ulong(row) * D / GROUP};
  }

  // N numbers from d: whole words, or a part of one.
  template <int N>
  void read(int d, thread float* values) {
    float scale = scales[d / GROUP];
    float offset = offsets[d / GROUP];
    UNROLL
    for (int i = 0; i < N; i += COUNT) {
      uint word = codes[(d + i) / COUNT] >> d % COUNT * BITS;
      UNROLL
      for (int j = 0; j < (N < COUNT ? N : COUNT); j++) {
        // 2^23 + code has the code in its last bits: no conversion.
        values[i + j] = fma(scale, as_type<float>(word >> j * BITS & LAST | 0x4b000000) - 8388608.0f, offset);
      }
    }
  }

  template <class From>
  void copy(From row, int lane) {
    for (int i = lane; i < D / COUNT; i += LANES) {
      codes[i] = row.codes[i];
    }
    if (lane < D / GROUP) {
      scales[lane] = row.scales[lane];
      offsets[lane] = row.offsets[lane];
    }
  }

  void write(threadgroup float* row, int lane) {
    for (int word = lane; word - lane < D / COUNT; word += LANES) {
      float x[COUNT], low = INFINITY, high = -INFINITY;
      for (int i = 0; i < COUNT; i++) {
        x[i] = T(row[(word * COUNT + i) % D]);
        low = min(low, x[i]);
        high = max(high, x[i]);
      }
      for (int step = 1; step < SHARE; step *= 2) {
        low = min(low, simd_shuffle_xor(low, step));
        high = max(high, simd_shuffle_xor(high, step));
      }
      bool is_low = abs(low) > abs(high);
      float edge = is_low ? low : high;
      float scale = max((high - low) / LAST, 1e-7f) * (is_low ? 1 : -1);
      float steps = rint(edge / scale);  // from the edge to zero
      scale = steps == 0.0f ? scale : edge / steps;
      float offset = steps == 0.0f ? 0.0f : edge;
      uint packed = 0;
      for (int i = 0; i < COUNT; i++) {
        packed |= uint(clamp(rint((x[i] - offset) / scale), 0.0f, float(LAST))) << i * BITS;
      }
      if (word < D / COUNT) {
        codes[word] = packed;
        if (word % SHARE == 0) {
          scales[word / SHARE] = T(scale);
          offsets[word / SHARE] = T(offset);
        }
      }
    }
  }
};

}  // namespace mlx_edge
