// What the attention kernels share: the step's numbers, and how sums of a softmax join.
//
// A sum over keys is kept as (top, total, value): the largest score, the sum of 2^(score - top), and that of
// 2^(score - top) v. Scores carry a factor of log2(e), so that exp2 serves for exp. A sink is one more score, without a
// value; where a layer has none it is -inf.

#include <metal_stdlib>

#define UNROLL _Pragma("clang loop unroll(full)")

namespace mlx_edge {
using namespace metal;

enum : int {
  LANES = 32,   // of a simdgroup, and positions of a chunk: a simdgroup takes one
  CHUNKS = 8,   // of a part, and simdgroups of a threadgroup
  PART = 256,   // positions of a part, and threads of a threadgroup
};
constant constexpr float NOTHING = -3e38f;  // the largest of no scores

// A line of `meta`: where a row of the batch stands.
struct Span {
  int start, length, tail, ring, window, keep, keep_window, shift;
};

// `sizes`: slots of the planes, then the grid's first part and its parts, and L.
struct Sizes {
  int body, tail, prefix, next, first, parts, width;
};

// What a sum with this top counts for, when the largest of all scores is `joint`. One of nothing counts as exact zeros.
inline float weigh(float top, float joint) {
  return top > NOTHING ? fast::exp2(top - joint) : 0.0f;
}

// `count` sums as one: their tops, then their totals, and their values `stride` apart.
template <class Floats>
float3 join(Floats tops, Floats values, int stride, int count) {
  float3 sum = float3(NOTHING, 0, 0);
  for (int i = 0; i < count; i++) {
    sum.x = max(sum.x, tops[i]);
  }
  for (int i = 0; i < count; i++) {
    float weight = weigh(tops[i], sum.x);
    sum.y = fma(weight, tops[count + i], sum.y);
    sum.z = fma(weight, values[i * stride], sum.z);
  }
  return sum;
}

// The softmax's result: 0 where nothing was seen.
inline float finish(float3 sum, float sink) {
  sink *= M_LOG2E_F;
  float joint = max(sum.x, sink);
  float weight = weigh(sum.x, joint);
  float total = fma(weight, sum.y, weigh(sink, joint));
  return total > 0.0f ? weight * sum.z / total : 0.0f;
}

}  // namespace mlx_edge
