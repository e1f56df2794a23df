// Attention of the newest rows of a sequence over its cache, and the cache's next tail, however rows are stored.
//
//   q, k    = rotate(norm(heads of qkv)), v as it is; k and v are used as they are stored
//   norm      y[d] = x[d] / sqrt(mean(x^2) + eps) * weight[d]
//   rotate    the pair i at position p turns by (p + shift) / periods[i], and is scaled by `magnitude`
//   next    = rows of the tail, then the new k and v: slots [0, end - tail) and no other
//   heads   = softmax(scale * q k^T) v over the keys that a query sees (README.md, Positions)
//
// Grid: (K, B, parts) threadgroups of 8 simdgroups. A part is 8 chunks of 32 positions, and a simdgroup has one chunk:
// in the scores four lanes share a key, and a lane ends with the score of its own; in the mix of values all lanes share
// a key. A threadgroup takes its G * L query rows ROWS at a time. What a row's sum is depends on positions alone:
// masked keys add exact zeros, and every product in a sum is an explicit fma.
//
// Reads: each line of keys and values by one simdgroup of one threadgroup, ROWS query rows at a time (again, from the
// L1 cache, for more rows); the heads of qkv once a part. Writes: the next tail; heads, or D + 2 floats a row and part.
// Threadgroup memory: 8 KB and 16 * ROWS floats. Live: 4 * ROWS + 40 floats a lane for the scores,
// ROWS * (D / 32 + 1) + 16 for the values.
// Tolerance: 2^-8 relative for half and bfloat, 2^-18 for float, plus 2^-18 of the largest value.
//
// `Rows` and `NewRows` are rows as stored, to be read and to be written: `at(row)`, `read<N>(d, values)`;
// `copy(row, lane)`, `write(row, lane)`.

#include "rows.metal"

namespace mlx_edge {

// DIMS of a head turn, in pairs (i, i + DIMS / 2), or (2i, 2i + 1) when PAIRED. NORM: 1 for queries, plus 2 for
// keys. Out: T, or float for sums that attn_combine joins.
template <class T, class Out, class Rows, class NewRows, int D, int G, int ROWS, int DIMS, bool PAIRED, int NORM>
struct Attention {
  const device T *qkv, *q_norm, *k_norm;  // (B, L, (G + 2) * K, D); (D,)
  Rows body, tail, prefix, written;
  NewRows next;  // the same as `written`
  Span span;
  Sizes sizes;
  const device float *params, *periods, *sinks;  // scale, eps of q_norm, of k_norm, magnitude; (DIMS / 2,); (H,)
  device Out* out;                               // (M, H, D) or (M, H, parts, D)
  device float* sums;                            // (M, H, 2, parts): tops and totals
  threadgroup float *room, *tops;                // CHUNKS * JOINED * D, at most 8 KB; ROWS * 2 * CHUNKS
  uint3 group, groups;
  int simd, lane;
  int end;                           // of the row's positions
  int part, first, low, high, turn;  // this simdgroup's chunk, what some query sees of it, and where its slots are

  enum : int {
    WIDTH = D % 128 == 0 ? 4 : D % 64 == 0 ? 2 : 1,  // neighbours that a lane has in each piece of a value
    PIECES = (D + LANES * WIDTH - 1) / (LANES * WIDTH),
    COUNT = WIDTH * PIECES,
    RUN = D % 32 == 0 ? 8 : 4,  // neighbours that a lane has of each of four keys
    AHEAD = D > 128 ? 2 : 4,    // values that are loaded together
    FIT = D > 128 ? 1 : D > 64 ? 2 : 4,
    JOINED = ROWS < FIT ? ROWS : FIT,  // rows whose chunks are joined together
  };

  // A slot of this kv head in a plane: of keys (kind 0) or of values (kind 1).
  uint row_of(uint kind, int slots, int slot) {
    return ((kind * groups.y + group.y) * groups.x + group.x) * slots + slot;
  }

  // The row of position p, or of the nearest in [low, high).
  Rows stored(int kind, int p) {
    p = clamp(p, low, high - 1);
    return p >= span.tail  ? written.at(row_of(kind, sizes.next, p - span.tail))
           : p < span.keep ? prefix.at(row_of(kind, sizes.prefix, p))
                           : body.at(row_of(kind, sizes.body, p + turn));
  }

  // Puts a new head into this simdgroup's room, as floats. Kind: 0 query, 1 key, 2 value.
  void prepare(int kind, int row, int head) {
    const device T* x = qkv + ((group.y * sizes.width + row) * (G + 2) * groups.x + head) * D;
    threadgroup float* y = room + simd * D;
    float shrink = kind ? 1 : params[0];
    if (NORM >> kind & 1) {
      float squares = 0.0f;
      for (int d = lane; d < D; d += LANES) {
        float e = x[d];
        squares = fma(e, e, squares);
      }
      shrink *= precise::rsqrt(simd_sum(squares) / D + params[1 + kind]);
    }
    for (int i = lane; i < D / 2; i += LANES) {
      bool is_turned = kind < 2 && 2 * i < DIMS;
      bool is_apart = is_turned && !PAIRED;
      int j = is_apart ? i : 2 * i;
      int k = is_apart ? i + DIMS / 2 : 2 * i + 1;
      float a = shrink * x[j];
      float b = shrink * x[k];
      if (NORM >> kind & 1) {
        a *= kind ? k_norm[j] : q_norm[j];
        b *= kind ? k_norm[k] : q_norm[k];
      }
      if (is_turned) {
        float position = span.start + row + span.shift;
        float angle = position / periods[i];
        // What the quotient lost. A period may be infinite: such a pair does not turn.
        float rest = angle > 0 ? fma(-angle, periods[i], position) / periods[i] : 0;
        float c = precise::cos(angle);
        float s = precise::sin(angle);
        float cosine = params[3] * fma(-rest, s, c);
        float sine = params[3] * fma(rest, c, s);
        float turned = fma(a, cosine, -b * sine);
        b = fma(a, sine, b * cosine);
        a = turned;
      }
      y[j] = a;
      y[k] = b;
    }
  }

  // The next tail, as far as it lies in this part: the tail's rows, then the new ones.
  void write_tail() {
    // Even simdgroups have keys, odd ones values, of every fourth position.
    int kind = simd % 2;
    for (int p = max(span.tail, part * PART) + simd / 2; p < min(end, (part + 1) * PART); p += CHUNKS / 2) {
      NewRows row = next.at(row_of(kind, sizes.next, p - span.tail));
      if (p < span.start) {
        row.copy(tail.at(row_of(kind, sizes.tail, p - span.tail)), lane);
        continue;
      }
      prepare(1 + kind, p - span.start, (G + kind) * groups.x + group.x);
      simdgroup_barrier(mem_flags::mem_threadgroup);
      row.write(room + simd * D, lane);
      simdgroup_barrier(mem_flags::mem_threadgroup);
    }
  }

  // scores[row] = q[row] . k[first + lane]; a key outside [low, high) is some other.
  void score(thread float* scores) {
    Rows keys[4];
    float sums[ROWS][4] = {};
    for (int i = 0; i < 4; i++) {
      keys[i] = stored(0, first + lane / 4 * 4 + i);
    }
    for (int d = lane % 4 * RUN; d < D; d += 4 * RUN) {
      float k[4][RUN];
      for (int i = 0; i < 4; i++) {
        keys[i].template read<RUN>(d, k[i]);
      }
      UNROLL
      for (int i = 0; i < ROWS * RUN; i++) {
        float q = room[i / RUN * D + d + i % RUN];
        for (int j = 0; j < 4; j++) {
          sums[i / RUN][j] = fma(q, k[j][i % RUN], sums[i / RUN][j]);
        }
      }
    }
    // Lane l keeps key l % 4 of its four, and gives the others away.
    UNROLL
    for (int row = 0; row < ROWS; row++) {
      thread float* s = sums[row];
      float even = (lane & 2 ? s[2] : s[0]) + simd_shuffle_xor(lane & 2 ? s[0] : s[2], 2);
      float odd = (lane & 2 ? s[3] : s[1]) + simd_shuffle_xor(lane & 2 ? s[1] : s[3], 2);
      scores[row] = (lane & 1 ? odd : even) + simd_shuffle_xor(lane & 1 ? even : odd, 1);
    }
  }

  // mixed[row] += weights[row] of lane l * v[first + l], over [low, high).
  void mix(thread float* weights, thread float (*mixed)[COUNT]) {
    for (int j = (low - first) / AHEAD * AHEAD; j < high - first; j += AHEAD) {
      float v[AHEAD][COUNT];
      UNROLL
      for (int i = 0; i < AHEAD * PIECES; i++) {
        int d = min((i % PIECES * LANES + lane) * WIDTH, D - WIDTH);
        stored(1, first + j + i / PIECES).template read<WIDTH>(d, v[i / PIECES] + i % PIECES * WIDTH);
      }
      UNROLL
      for (int i = 0; i < AHEAD * ROWS; i++) {
        float weight = simd_shuffle(weights[i % ROWS], j + i / ROWS);
        for (int d = 0; d < COUNT; d++) {
          mixed[i % ROWS][d] = fma(weight, v[i / ROWS][d], mixed[i % ROWS][d]);
        }
      }
    }
  }

  // Joins the chunks of a row's number d, and writes what comes of it: the result if there is one part.
  void write(int row, int d, threadgroup float* tops, threadgroup float* values) {
    float3 sum = join(tops, values, JOINED * D, CHUNKS);
    uint head = group.x * G + row % G;
    uint i = ((group.y * sizes.width + row / G) * G * groups.x + head) * groups.z + group.z;
    out[i * D + d] = Out(groups.z > 1 ? sum.z : finish(sum, sinks[head]));
    if (groups.z > 1 && d == 0) {
      sums[2 * i - group.z] = sum.x;
      sums[2 * i - group.z + groups.z] = sum.y;
    }
  }

  void run() {
    end = span.start + span.length;
    int oldest = span.window ? span.start - span.window + 1 : 0;
    // With `keep` the positions of the prefix are in part 0, before the others.
    part = span.keep && !group.z ? 0 : sizes.first + group.z - (span.keep > 0);
    first = part * PART + simd * LANES;
    turn = span.ring ? first % span.ring - first : 0;
    low = first < span.keep ? first : max(first, oldest);
    high = min(first + LANES, oldest < first + LANES ? end : min(span.keep, end));
    write_tail();
    for (int block = 0; block < G * sizes.width; block += ROWS) {
      threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);
      if (simd < ROWS) {
        int row = min(block + simd, G * sizes.width - 1);
        prepare(0, row / G, group.x * G + row % G);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      float weights[ROWS] = {};
      float mixed[ROWS][COUNT] = {};
      if (low < high) {
        score(weights);
      }
      UNROLL
      for (int row = 0; row < ROWS; row++) {
        int query = span.start + (block + row) / G;
        int key = first + lane;
        int window = key < span.keep ? span.keep_window : span.window;
        bool seen = key <= query && query < end && (!window || key > query - window);
        float top = simd_max(seen ? weights[row] : NOTHING);
        weights[row] = seen ? fast::exp2(weights[row] - top) : 0.0f;
        float total = simd_sum(weights[row]);
        if (lane == 0) {
          tops[row * 2 * CHUNKS + simd] = top;
          tops[(row * 2 + 1) * CHUNKS + simd] = total;
        }
      }
      if (low < high) {
        mix(weights, mixed);
      }
      UNROLL
      for (int slice = 0; slice < ROWS; slice += JOINED) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        UNROLL
        for (int i = 0; i < JOINED * COUNT; i++) {
          int d = (i % COUNT / WIDTH * LANES + lane) * WIDTH + i % WIDTH;
          if (d < D) {
            room[(simd * JOINED + i / COUNT) * D + d] = mixed[slice + i / COUNT][i % COUNT];
          }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        int i = simd * LANES + lane;
        int row = slice + i / D;
        if (i < JOINED * D && block + row < G * sizes.width) {
          write(block + row, i % D, tops + row * 2 * CHUNKS, room + i);
        }
      }
    }
  }
};

}  // namespace mlx_edge
