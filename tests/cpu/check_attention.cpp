// The KV store and attention of one instruction set against doubles. No MLX.
//
//   check_attention            all checks
//   check_attention quantized  rows and mx.quantize's packs of them on stdin: int32 bits, group, D, count; float32 rows;
//                              uint32 packs; float32 scales and offsets
//
// Compiled with the flags of the instruction set that MLX_EDGE_ISA names; ends with 1 at the first thing that is wrong.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention.h"
#include "check.h"
#include "half.h"

using namespace mlx_edge;
namespace isa = mlx_edge::MLX_EDGE_ISA;
using check::expect, check::random_row, check::Floats32;

namespace {

struct Form {
  KVFormat format;
  int dims, group;
};

const char* name_of(KVFormat format) {
  const char* names[] = {"f32", "f16", "int8", "int4"};
  return names[static_cast<int>(format)];
}

// What a stored row means, in doubles: written apart from the kernels.
std::vector<double> meaning(const Form& form, const Floats32& row) {
  std::vector<double> y(row.begin(), row.end());
  if (form.format == KVFormat::f32) return y;
  if (form.format == KVFormat::f16) {
    for (double& x : y) x = f16_to_float(float_to_f16(std::fmin(std::fmax(static_cast<float>(x), -65504.0f), 65504.0f)));
    return y;
  }
  const float levels = form.format == KVFormat::int8 ? 255.0f : 15.0f;
  for (int begin = 0; begin < form.dims; begin += form.group) {
    float low = INFINITY, high = -INFINITY;
    for (int i = begin; i < begin + form.group; i++) low = std::fmin(low, row[i]), high = std::fmax(high, row[i]);
    const bool is_low = std::fabs(low) > std::fabs(high);
    float scale = std::fmax((high - low) / levels, 1e-7f), offset = 0;
    if (!is_low) scale = -scale;
    const float edge = is_low ? low : high, steps = std::rint(edge / scale);
    if (steps != 0) scale = edge / steps, offset = edge;
    for (int i = begin; i < begin + form.group; i++) {
      const float code = std::fmin(std::fmax(std::rint((row[i] - offset) / scale), 0.0f), levels);
      y[i] = static_cast<double>(scale) * code + offset;
    }
  }
  return y;
}

// One row of the batch and one head beside the store: what was appended, in doubles.
struct Lane {
  std::vector<std::vector<double>> keys, values;
};

struct Bench {
  Form form;
  int window, keep;  // of the store
  int layer;         // the layer's own window
  float softcap = 0;
  bool has_sinks = false;  // of all queries, below and above most scores in turn
  KVStore kv;
  std::map<std::pair<int, int>, Lane> lanes;  // by (row, head)

  static constexpr int BATCH = 2, HEADS = 2;

  Bench(Form f, int w, int k, int l = 0)
      : form(f), window(w), keep(k), layer(l), kv(BATCH, HEADS, f.dims, f.format, f.group, w, k) {}

  void append(int row, int start, int count, float size = 1.0f) {
    kv.prepare(row, start, count);
    const int stride = form.dims + 3;
    for (int head = 0; head < HEADS; head++) {
      const Floats32 keys = random_row(count * stride, size), values = random_row(count * stride, size);
      isa::append(kv, row, head, start, count, keys.data(), values.data(), stride);
      Lane& lane = lanes[{row, head}];
      lane.keys.resize(start), lane.values.resize(start);
      for (int i = 0; i < count; i++) {
        const auto from = i * stride;
        lane.keys.push_back(meaning(form, {keys.begin() + from, keys.begin() + from + form.dims}));
        lane.values.push_back(meaning(form, {values.begin() + from, values.begin() + from + form.dims}));
      }
    }
  }

  static float sink_at(int position) { return position % 2 ? 3.0f : -1.0f; }

  std::vector<double> oracle(int row, int head, const Floats32& q, int position, float scale) {
    const Lane& lane = lanes[{row, head}];
    std::vector<double> y(form.dims, 0.0), weights;
    std::vector<int> seen;
    double top = -INFINITY, sum = 0;
    for (int p = 0; p <= position && p < static_cast<int>(lane.keys.size()); p++) {
      if (window > 0 && p <= position - window && p >= keep) continue;
      if (layer > 0 && p <= position - layer) continue;
      double score = 0;
      for (int d = 0; d < form.dims; d++) score += static_cast<double>(q[d]) * lane.keys[p][d];
      score *= scale;
      if (softcap > 0) score = softcap * std::tanh(score / softcap);
      weights.push_back(score), seen.push_back(p);
      top = std::fmax(top, score);
    }
    if (has_sinks) {
      const double sink = sink_at(position);
      top = std::fmax(top, sink), sum = std::exp(sink - top);
    }
    for (double& w : weights) sum += w = std::exp(w - top);
    for (size_t i = 0; i < seen.size(); i++)
      for (int d = 0; d < form.dims; d++) y[d] += weights[i] / sum * lane.values[seen[i]][d];
    return y;
  }

  // `count` queries at and before the newest position, one of them padding; each against the oracle and against itself alone.
  void attend(int row, int head, int end, int count, float size = 1.0f) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(form.dims)), canary = 12345.0f;
    std::vector<Floats32> q(count), y(count, Floats32(form.dims + 1, canary));
    std::vector<const float*> from(count);
    std::vector<float*> to(count);
    std::vector<int> positions(count);
    for (int i = 0; i < count; i++) {
      q[i] = random_row(form.dims, size);
      from[i] = q[i].data(), to[i] = y[i].data();
      positions[i] = i == 2 ? -1 : std::max(end - 1 - i / 2, i % 2 ? 0 : -1);
    }
    Floats32 sinks(count);
    for (int i = 0; i < count; i++) sinks[i] = sink_at(positions[i]);
    const ScoreRule rule{scale, layer, softcap};
    isa::attend(kv, row, head, count, from.data(), to.data(), positions.data(), rule, has_sinks ? sinks.data() : nullptr);
    for (int i = 0; i < count; i++) {
      const std::vector<double> truth = oracle(row, head, q[i], positions[i], scale);
      for (int d = 0; d < form.dims; d++) {
        expect(std::fabs(y[i][d] - truth[d]) < 4e-6 * size,
               "%s D=%d group=%d window=%d keep=%d layer=%d end=%d query %d of %d at %d: y[%d] = %.8g, not %.8g",
               name_of(form.format), form.dims, form.group, window, keep, layer, end, i, count, positions[i], d, y[i][d], truth[d]);
      }
      expect(y[i][form.dims] == canary, "D=%d: wrote beyond the head", form.dims);
      if (i > 4 && i < count - 1) continue;
      Floats32 alone(form.dims);
      float* alone_to = alone.data();
      isa::attend(kv, row, head, 1, &from[i], &alone_to, &positions[i], rule, has_sinks ? &sinks[i] : nullptr);
      expect(!std::memcmp(alone.data(), y[i].data(), form.dims * sizeof(float)),
             "%s D=%d window=%d end=%d: query %d of %d differs from itself alone", name_of(form.format), form.dims, window, end,
             i, count);
    }
  }
};

std::vector<Form> forms() {
  std::vector<Form> all;
  for (int dims : {16, 33, 64, 80, 128})
    for (KVFormat format : {KVFormat::f32, KVFormat::f16}) all.push_back({format, dims, 0});
  for (int dims : {64, 128, 96})
    for (int group : {32, 64, 128})
      if (dims % group == 0)
        for (KVFormat format : {KVFormat::int8, KVFormat::int4}) all.push_back({format, dims, group});
  return all;
}

// Appends in ragged steps and attends after each; trims; forks.
void check_attention() {
  const int counts[] = {1, 3, 4, 7, 33, 2, 5};
  struct Limits {
    int window, keep, layer;
  };
  const Limits sights[] = {{0, 0, 0},  {1, 0, 1},    {30, 0, 0},  {64, 3, 0},  {65, 0, 65},
                           {20, 4, 0}, {100, 70, 0}, {20, 4, 50}, {0, 0, 30}, {20, 70, 100}};
  int turn = 0, sight = 0;
  for (const Form& form : forms()) {
    for (int i = 0; i < 2; i++) {  // seeing all, and another in turn
      const auto& [window, keep, layer] = sights[i == 0 ? 0 : 1 + sight++ % 9];
      Bench bench(form, window, keep, layer);
      bench.attend(0, 1, 0, 3);
      int before = 0;
      for (int end : {1, 63, 64, 65, 200}) {
        bench.append(0, before, end - before);
        bench.append(1, before / 2, end / 2 - before / 2);  // ragged: the other row is half as long
        bench.attend(0, turn % 2, end, counts[turn % 7]);
        bench.attend(1, (turn + 1) % 2, end / 2, counts[(turn + 2) % 7]);
        turn++;
        before = end;
      }
      bench.append(0, 190, 15);  // ten were rejected
      bench.attend(0, 0, 205, counts[turn % 7]);
    }
  }
}

void check_many_queries() {
  Bench bench({KVFormat::f16, 64, 0}, 0, 0);
  bench.append(0, 0, 150);
  bench.attend(0, 1, 150, 130);
}

// Scores that reach the cap, and sinks.
void check_score_rules() {
  for (const auto& [softcap, has_sinks] : {std::pair{2.0f, false}, {0.0f, true}, {0.5f, true}}) {
    Bench bench({KVFormat::f16, 80, 0}, 0, 0, 70);
    bench.softcap = softcap, bench.has_sinks = has_sinks;
    bench.append(0, 0, 150, 2.0f);
    for (int count : {1, 3, 70}) bench.attend(0, 1, 150, count, 2.0f);
    bench.attend(0, 1, 1, 1, 2.0f);
  }
}

void check_large_scores() {
  Bench bench({KVFormat::f32, 64, 0}, 0, 0);
  bench.append(0, 0, 100);
  for (int d = 0; d < 64; d++) {
    float* keys = reinterpret_cast<float*>(bench.kv.plane(0, 0, 0, false));
    keys[d * PAGE + 7] = 1e4f;
    bench.lanes[{0, 0}].keys[7][d] = 1e4;
  }
  Floats32 q(64, 1.0f), y(64);
  const float* from = q.data();
  float* to = y.data();
  const int position = 99;
  isa::attend(bench.kv, 0, 0, 1, &from, &to, &position, {1.0f, 0}, nullptr);
  const auto truth = bench.oracle(0, 0, q, position, 1.0f);
  for (int d = 0; d < 64; d++) expect(std::fabs(y[d] - truth[d]) < 1e-6, "large scores: %g, not %g", y[d], truth[d]);
}

// Pages that fall out of the window come back; what was in them does not.
void check_recycling() {
  for (int keep : {0, 4}) {
    Bench bench({KVFormat::f32, 16, 0}, 30, keep);
    size_t most = 0;
    for (int start = 0; start < 1000; start += 10) {
      bench.append(0, start, 10);
      bench.append(1, start, 10);
      if (start >= keep && start < 500) {  // infinities in what later falls out of sight
        for (int d = 0; d < 16; d++)
          reinterpret_cast<float*>(bench.kv.plane(0, 0, start / PAGE, true))[(start % PAGE) * 16 + d] = INFINITY;
      }
      if (start == 500) most = bench.kv.bytes();
    }
    expect(bench.kv.bytes() == most, "a store with a window grows: %zu bytes, then %zu", most, bench.kv.bytes());
    expect(bench.kv.holds(0, 0) == (keep > 0), "keep = %d, but position 0 is %s", keep, keep ? "dropped" : "held");
    expect(!bench.kv.holds(0, 500), "position 500 is still held at 1000");
    expect(bench.kv.holds(0, 990 - 30 - PAGE), "the margin of a page is gone");
    bench.attend(0, 0, 1000, 7);
  }
}

Floats32 attend_once(const KVStore& kv, const Floats32& q, int position) {
  Floats32 y(kv.head_dim());
  const float* from = q.data();
  float* to = y.data();
  isa::attend(kv, 0, 1, 1, &from, &to, &position, {0.125f, 0}, nullptr);
  return y;
}

void check_forks() {
  for (const Form& form : forms()) {
    Bench bench(form, 0, 0);
    bench.append(0, 0, 100);
    const Floats32 q = random_row(form.dims);
    const Floats32 before = attend_once(bench.kv, q, 99);
    auto twin = bench.kv.fork({100, 0});
    expect(attend_once(*twin, q, 99) == before, "%s: a fork differs", name_of(form.format));
    expect(twin->bytes() == bench.kv.bytes() && twin->shared_bytes() == twin->bytes(), "%s: a fork shares all pages",
           name_of(form.format));
    const Floats32 rows = random_row(form.dims * 10);
    twin->prepare(0, 90, 10);
    isa::append(*twin, 0, 1, 90, 10, rows.data(), rows.data(), form.dims);
    expect(attend_once(bench.kv, q, 99) == before, "%s: writing a fork changed the original", name_of(form.format));
    expect(attend_once(*twin, q, 99) != before, "%s: a fork cannot be written", name_of(form.format));
    expect(bench.kv.shared_bytes() * 2 == bench.kv.bytes(), "%s: one page of two is shared", name_of(form.format));
    const auto shorter = bench.kv.fork({64, 0});
    expect(shorter->bytes() * 2 == bench.kv.bytes(), "%s: a fork of a page has two", name_of(form.format));
    twin.reset();
    expect(attend_once(bench.kv, q, 99) == before, "%s: dropping a fork changed the original", name_of(form.format));
  }
}

// What a window drops while a fork still sees it stays there for the fork, and is not used anew.
void check_forked_window() {
  Bench bench({KVFormat::f32, 16, 0}, 30, 4);
  bench.append(0, 0, 200);
  const Floats32 q = random_row(16);
  const auto twin = bench.kv.fork({200, 0});
  const Floats32 before = attend_once(*twin, q, 199);
  for (int start = 200; start < 900; start += 20) bench.append(0, start, 20);
  expect(attend_once(*twin, q, 199) == before, "a page that a fork sees was written%s", "");
  bench.attend(0, 0, 900, 5);
  const size_t held = bench.kv.bytes();
  for (int start = 900; start < 1600; start += 20) bench.append(0, start, 20);
  expect(bench.kv.bytes() == held, "a forked store with a window grows: %zu bytes, then %zu", held, bench.kv.bytes());
}

void check_reading() {
  for (const Form& form : forms()) {
    Bench bench(form, 0, 0);
    bench.append(0, 0, 70);
    const int start = 60, count = 8;
    for (bool values : {false, true}) {
      Floats32 read(Bench::HEADS * count * form.dims);
      bench.kv.read(0, start, count, values, read.data());
      for (int head = 0; head < Bench::HEADS; head++) {
        const Lane& lane = bench.lanes[{0, head}];
        for (int i = 0; i < count * form.dims; i++) {
          const auto& rows = values ? lane.values : lane.keys;
          const double truth = rows[start + i / form.dims][i % form.dims];
          expect(std::fabs(read[head * count * form.dims + i] - truth) < 1e-6, "%s D=%d: read %g, not %g",
                 name_of(form.format), form.dims, read[head * count * form.dims + i], truth);
        }
      }
    }
    if (!bench.kv.num_groups()) continue;
    const int bits = form.format == KVFormat::int8 ? 8 : 4, rows = Bench::HEADS * 70;
    KVStore other(1, Bench::HEADS, form.dims, form.format, form.group, 0, 0);
    other.prepare(0, 0, 70);
    for (bool values : {false, true}) {
      std::vector<uint32_t> packs(rows * form.dims * bits / 32);
      Floats32 scales(rows * bench.kv.num_groups()), offsets(scales.size());
      bench.kv.read_packed(0, 0, 70, values, packs.data(), scales.data(), offsets.data());
      other.write_packed(0, 0, 70, values, packs.data(), scales.data(), offsets.data());
    }
    const Floats32 q = random_row(form.dims);
    expect(attend_once(other, q, 69) == attend_once(bench.kv, q, 69), "%s D=%d: packs do not come back as they went",
           name_of(form.format), form.dims);
  }
}

void check_saturation() {
  KVStore kv(1, 1, 16, KVFormat::f16, 0, 0, 0);
  kv.prepare(0, 0, 1);
  const Floats32 rows(16, -1e6f);
  isa::append(kv, 0, 0, 0, 1, rows.data(), rows.data(), 16);
  Floats32 read(16);
  kv.read(0, 0, 1, true, read.data());
  expect(read[15] == -65504.0f, "a value too large for a half became %g", read[15]);
}

void check_sizes_refused() {
  const auto refuses = [](int dims, KVFormat format, int group) {
    try {
      KVStore kv(1, 1, dims, format, group, 0, 0);
      return false;
    } catch (const std::invalid_argument&) {
      return true;
    }
  };
  expect(refuses(80, KVFormat::int8, 64), "heads of 80 in groups of 64 were taken");
  expect(refuses(64, KVFormat::int4, 16), "groups of 16 were taken");
  expect(refuses(257, KVFormat::f32, 0), "heads of 257 were taken");
  expect(!refuses(256, KVFormat::int4, 128), "heads of 256 were not taken");
}

template <class T>
std::vector<T> take(size_t count) {
  std::vector<T> items(count);
  expect(std::fread(items.data(), sizeof(T), count, stdin) == count, "stdin ended early");
  return items;
}

void check_quantized() {
  const auto sizes = take<int32_t>(4);
  const int bits = sizes[0], group = sizes[1], dims = sizes[2], count = sizes[3];
  const auto rows = take<float>(static_cast<size_t>(dims) * count);
  const auto packs = take<uint32_t>(rows.size() * bits / 32);
  const auto scales = take<float>(rows.size() / group), offsets = take<float>(rows.size() / group);
  KVStore kv(1, 1, dims, bits == 8 ? KVFormat::int8 : KVFormat::int4, group, 0, 0);
  kv.prepare(0, 0, count);
  isa::append(kv, 0, 0, 0, count, rows.data(), rows.data(), dims);
  for (bool values : {false, true}) {
    std::vector<uint32_t> own_packs(packs.size());
    Floats32 own_scales(scales.size()), own_offsets(offsets.size());
    kv.read_packed(0, 0, count, values, own_packs.data(), own_scales.data(), own_offsets.data());
    expect(own_scales == scales && own_offsets == offsets, "%d bits, group %d: scales or offsets differ", bits, group);
    expect(own_packs == packs, "%d bits, group %d: codes differ", bits, group);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::string(argv[1]) == "quantized") {
    check_quantized();
  } else {
    check_attention();
    check_many_queries();
    check_score_rules();
    check_large_scores();
    check_recycling();
    check_forks();
    check_forked_window();
    check_reading();
    check_saturation();
    check_sizes_refused();
  }
  std::printf("%d checks\n", check::checks);
}
