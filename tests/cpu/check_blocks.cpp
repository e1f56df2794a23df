// The blocks over the pool: the same bits for any number of threads, for a row alone, in a batch and in a ragged step, for a
// prompt at once and in pieces; two callers at a time, over pages that they share; a forked child. Built with the thread sanitizer, or with those of addresses and
// undefined behaviour, by test_blocks.py. Whether the numbers are right is tests/ops' question.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "blocks.h"
#include "pool.h"

// Only the one set that MLX_EDGE_ISA names is linked.
namespace mlx_edge {
namespace MLX_EDGE_ISA {
extern const Kernels kernels;
}
const Kernels* find_kernels(const char*) { return &MLX_EDGE_ISA::kernels; }
}  // namespace mlx_edge

using namespace mlx_edge;

namespace {

int failures = 0;

void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("FAILED: %s\n", what);
  failures++;
}

std::mt19937 generator(7);

std::vector<float> numbers(size_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> found(count);
  for (float& x : found) x = normal(generator);
  return found;
}

WeightPtr make_weight(int rows, int columns, bool has_bias = false) {
  const int group_size = 32;
  Matrix w{Format::affine, rows, columns, 4, group_size, Float::f32, nullptr, nullptr};
  const size_t groups = static_cast<size_t>(rows) * columns / group_size;
  std::vector<uint32_t> packs(static_cast<size_t>(rows) * columns / 8);
  for (uint32_t& pack : packs) pack = static_cast<uint32_t>(generator());
  std::vector<float> scales(groups, 0.02f), offsets(groups, -0.15f);
  auto memory = std::make_shared<std::vector<uint8_t>>(packed_bytes(w) + 64);
  uint8_t* aligned = memory->data() + (64 - reinterpret_cast<uintptr_t>(memory->data()) % 64) % 64;
  pack(w, packs.data(), scales.data(), offsets.data(), aligned, 0, num_blocks(w));
  w.data = aligned;
  return std::make_shared<Weight>(Weight{w, has_bias ? numbers(rows) : std::vector<float>{}, memory});
}

constexpr int HIDDEN = 64, INNER = 160, HEADS = 4, KV_HEADS = 2, DIM = 32;

// With or without what only some families have.
AttentionLayer make_attention(bool has_all) {
  AttentionLayer layer;
  layer.norm = Norm{std::vector<float>(HIDDEN, 1.0f), 1e-5f};
  layer.q = make_weight(HEADS * DIM, HIDDEN, true);
  layer.k = make_weight(KV_HEADS * DIM, HIDDEN);
  layer.v = make_weight(KV_HEADS * DIM, HIDDEN);
  layer.o = make_weight(HIDDEN, HEADS * DIM);
  layer.num_heads = HEADS, layer.num_kv_heads = KV_HEADS, layer.head_dim = DIM, layer.scale = 0.18f;
  layer.q_norm = Norm{std::vector<float>(DIM, 1.1f), 1e-6f};
  Rope rope;
  for (int i = 0; i < DIM / 2; i++) rope.periods.push_back(1.0f + static_cast<float>(i * i));
  rope.dims = DIM;
  layer.rope = rope;
  layer.window = 90;
  if (!has_all) return layer;
  layer.k_norm = Norm{std::vector<float>(KV_HEADS * DIM, 0.9f), 1e-6f};
  layer.ending = {Norm{std::vector<float>(HIDDEN, 0.8f), 1e-6f}, 0.5f};
  layer.softcap = 4.0f, layer.sinks = {0.5f, -2.0f, 3.0f, 0.0f};
  return layer;
}

MLPLayer make_mlp(bool has_all) {
  MLPLayer layer;
  layer.norm = Norm{std::vector<float>(HIDDEN, 1.0f), 1e-5f};
  if (has_all) layer.norm.reset(), layer.ending.scale = 0.5f, layer.activation = Activation::swiglu_oai;
  layer.gate = make_weight(INNER, HIDDEN);
  layer.up = make_weight(INNER, HIDDEN);
  layer.down = make_weight(HIDDEN, INNER);
  return layer;
}

struct Model {
  AttentionLayer attention;
  MLPLayer mlp;

  explicit Model(bool has_all) : attention(make_attention(has_all)), mlp(make_mlp(has_all)) {}

  std::unique_ptr<KVStore> make_store(int batch) const {
    return std::make_unique<KVStore>(batch, KV_HEADS, DIM, KVFormat::f16, 0, 90, 4);
  }
  std::vector<float> step(KVStore& kv, const Step& step, const std::vector<float>& x) const {
    return this->step(Stores{&kv}, step, x);
  }
  std::vector<float> step(const Stores& stores, const Step& step, const std::vector<float>& x) const {
    std::vector<float> y(x.size()), z(x.size());
    check_step(attention, stores, step);
    attention_block(attention, Precision::int8, stores, step, x.data(), y.data());
    mlp_block(mlp, Precision::int8, y.data(), z.data(), step.num_rows());
    return z;
  }
};

bool same(const float* a, const float* b, size_t count) { return std::memcmp(a, b, count * sizeof(float)) == 0; }

void check_threads(const Model& model) {
  const int length = 300;  // more than a slice
  const auto x = numbers(static_cast<size_t>(length) * HIDDEN);
  std::vector<float> first;
  for (int threads : {1, 2, 3, 5}) {
    set_threads(threads);
    const auto kv = model.make_store(1);
    const auto y = model.step(*kv, Step{{0}, {length}, length}, x);
    if (first.empty()) first = y;
    expect(same(first.data(), y.data(), y.size()), "the same bits for any number of threads");
  }
  set_threads(2);
  const auto kv = model.make_store(1);
  for (int at = 0, count = 1; at < length; at += count, count = count % 41 + 7) {
    count = std::min(count, length - at);
    const std::vector<float> piece(x.begin() + at * HIDDEN, x.begin() + (at + count) * HIDDEN);
    const auto y = model.step(*kv, Step{{at}, {count}, count}, piece);
    expect(same(first.data() + at * HIDDEN, y.data(), y.size()), "the same bits for a prompt in pieces");
  }
}

void check_batch(const Model& model) {
  const int width = 70;
  const std::vector<int> lengths = {70, 1, 33};
  const auto x = numbers(lengths.size() * width * HIDDEN);
  const auto together = model.make_store(3);
  const auto y = model.step(*together, Step{{0, 0, 0}, lengths, width}, x);
  for (size_t row = 0; row < lengths.size(); row++) {
    const auto alone = model.make_store(1);
    const size_t at = row * width * HIDDEN, count = static_cast<size_t>(lengths[row]) * HIDDEN;
    const auto z = model.step(*alone, Step{{0}, {lengths[row]}, lengths[row]}, {x.begin() + at, x.begin() + at + count});
    expect(same(y.data() + at, z.data(), count), "a row of a batch equals the row alone");
  }
}

std::vector<float> rows_of(const std::vector<float>& x, int begin, int count) {
  return {x.begin() + begin * HIDDEN, x.begin() + (begin + count) * HIDDEN};
}

// Stores of three formats; a chunk lies across the end of a slice, and one behind it.
void check_ragged(const Model& model) {
  const std::vector<std::vector<int>> steps = {{200, 1, 130, 3}, {1, 9, 1, 1}, {1, 260, 1, 40}};
  const KVFormat formats[] = {KVFormat::f16, KVFormat::int8, KVFormat::f32, KVFormat::int4};
  std::vector<std::unique_ptr<KVStore>> together, alone;
  Stores stores;
  for (KVFormat format : formats) {
    for (auto* kind : {&together, &alone})
      kind->push_back(std::make_unique<KVStore>(1, KV_HEADS, DIM, format, 32, 90, 4));
    stores.push_back(together.back().get());
  }
  std::vector<int> starts(4, 0);
  for (const auto& lengths : steps) {
    const int width = std::accumulate(lengths.begin(), lengths.end(), 0);
    const auto x = numbers(static_cast<size_t>(width) * HIDDEN);
    const auto y = model.step(stores, Step{starts, lengths, width, true}, x);
    for (int b = 0, at = 0; b < 4; at += lengths[b++]) {
      const auto z = model.step(*alone[b], Step{{starts[b]}, {lengths[b]}, lengths[b]}, rows_of(x, at, lengths[b]));
      expect(same(y.data() + at * HIDDEN, z.data(), z.size()), "a sequence of a ragged step equals itself alone");
      starts[b] += lengths[b];
    }
  }
  const auto refuses = [&](const Stores& given, const Step& step) {
    try {
      check_step(model.attention, given, step);
      return false;
    } catch (const std::invalid_argument&) {
      return true;
    }
  };
  expect(refuses({stores[0], stores[0]}, Step{{0, 0}, {1, 1}, 2, true}), "one store for two sequences was taken");
  expect(refuses(stores, Step{starts, {1, 1, 1, 1}, 5, true}), "a width that is not the sum was taken");
  expect(refuses({stores[0]}, Step{{0, 0}, {1, 1}, 1}), "a store of one row was taken for two");
}

// Forks write, drop and are forked again, each by a thread of its own, over pages that all of them began with.
void check_shared_pages(const Model& model) {
  const auto prompt = numbers(150 * HIDDEN);
  const std::vector<float> rests[] = {numbers(50 * HIDDEN), numbers(50 * HIDDEN), numbers(50 * HIDDEN)};
  const auto base = model.make_store(1);
  model.step(*base, Step{{0}, {150}, 150}, prompt);
  const auto go_on = [&](KVStore& kv, int i) {
    const auto y = model.step(kv, Step{{150}, {50}, 50}, rests[i]);
    return std::pair{y, model.step(kv, Step{{200}, {1}, 1}, rows_of(rests[0], 7, 1))};  // sees what is stored by then
  };
  std::vector<std::pair<std::vector<float>, std::vector<float>>> wanted;
  std::unique_ptr<KVStore> fresh;
  for (int i = 0; i < 3; i++) {
    fresh = model.make_store(1);
    model.step(*fresh, Step{{0}, {150}, 150}, prompt);
    wanted.push_back(go_on(*fresh, i));
  }
  const auto last = base->fork({150});
  const auto first_half = model.step(*last, Step{{150}, {25}, 25}, rows_of(rests[1], 0, 25));
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; i++) {
    threads.emplace_back([&, i, twin = std::shared_ptr<KVStore>(base->fork({150}))]() mutable {
      const std::shared_ptr<KVStore> second = twin->fork({150});
      if (go_on(*twin, i) != wanted[i]) std::abort();
      twin.reset();
      if (go_on(*second, (i + 1) % 3) != wanted[(i + 1) % 3]) std::abort();
    });
  }
  expect(go_on(*base, 0) == wanted[0], "a store that was forked goes on as if it had not been");
  const auto second_half = model.step(*last, Step{{175}, {25}, 25}, rows_of(rests[1], 25, 25));
  expect(same(first_half.data(), wanted[1].first.data(), first_half.size()) &&
             same(second_half.data(), wanted[1].first.data() + first_half.size(), second_half.size()),
         "what others write between its steps does not reach a fork");
  for (std::thread& thread : threads) thread.join();
  expect(base->shared_bytes() * 2 == base->bytes(), "two of four pages are shared with the one fork that is left");
  expect(base->bytes() == fresh->bytes(), "a store that was forked holds as many pages as another");
}

void check_two_callers(const Model& model) {
  const auto x = numbers(40 * HIDDEN);
  const auto kv = model.make_store(1);
  const auto wanted = model.step(*kv, Step{{0}, {40}, 40}, x);
  const auto repeat = [&] {
    for (int i = 0; i < 5; i++) {
      const auto own = model.make_store(1);
      const auto y = model.step(*own, Step{{0}, {40}, 40}, x);
      if (!same(wanted.data(), y.data(), y.size())) std::abort();
    }
  };
  std::thread other(repeat);
  repeat();
  other.join();
}

void check_fork(const Model& model) {
#if !defined(__SANITIZE_THREAD__)  // its runtime does not follow a fork of a process with threads
  const auto x = numbers(20 * HIDDEN);
  const auto kv = model.make_store(1);
  const auto wanted = model.step(*kv, Step{{0}, {20}, 20}, x);
  const pid_t child = fork();
  if (child == 0) {
    const auto own = model.make_store(1);
    const auto y = model.step(*own, Step{{0}, {20}, 20}, x);
    _exit(same(wanted.data(), y.data(), y.size()) ? 0 : 1);
  }
  int status = 1;
  waitpid(child, &status, 0);
  expect(status == 0, "a forked child computes the same");
#else
  (void)model;
#endif
}

// Positions on three axes are those of the step's rows; where all are the shifted positions the bits are theirs.
void check_turns(Model model) {
  model.attention.rope->axes = std::vector<int>(DIM / 2);
  for (int i = 0; i < DIM / 2; i++) model.attention.rope->axes[i] = i % 3;
  const std::vector<int> lengths = {280, 3};
  const auto x = numbers(283 * HIDDEN);
  std::vector<std::unique_ptr<KVStore>> stores;
  for (int i = 0; i < 4; i++) stores.push_back(model.make_store(1));
  Step shifted{{0, 0}, lengths, 283, true, {7, -20}}, turned{{0, 0}, lengths, 283, true};
  for (int axis = 0; axis < 3; axis++)
    for (int b : {0, 1})
      for (int i = 0; i < lengths[b]; i++) turned.turns.push_back(i + shifted.shifts[b]);
  const auto y = model.step(Stores{stores[0].get(), stores[1].get()}, shifted, x);
  const auto z = model.step(Stores{stores[2].get(), stores[3].get()}, turned, x);
  expect(same(y.data(), z.data(), y.size()), "turns on three axes are those of shifts");
  turned.turns.pop_back();
  try {
    check_step(model.attention, Stores{stores[2].get(), stores[3].get()}, turned);
    expect(false, "a step with a turn too few was taken");
  } catch (const std::invalid_argument&) {
  }
}

// The same bits for any threads, and for a row alone.
void check_experts_and_runs() {
  MoELayer layer;
  layer.norm = Norm{std::vector<float>(HIDDEN, 1.0f), 1e-5f};
  layer.num_experts = 6, layer.top_k = 2;
  layer.router = make_weight(6, HIDDEN);
  layer.gate = make_weight(6 * INNER, HIDDEN, true), layer.up = make_weight(6 * INNER, HIDDEN);
  layer.down = make_weight(6 * HIDDEN, INNER, true);
  layer.ending.scale = 0.5f;
  check_experts(layer);
  const int rows = 300, heads = 3, dim = 33, length = 150;
  const auto x = numbers(rows * HIDDEN), q = numbers(heads * length * dim), k = numbers(q.size()), v = numbers(q.size());
  std::vector<float> y(x.size()), again(x.size()), alone(HIDDEN), mixed(q.size()), mixed_again(q.size());
  set_threads(1);
  moe_block(layer, Precision::int8, x.data(), y.data(), rows);
  attention_within(q.data(), k.data(), v.data(), mixed.data(), heads, length, dim, {70, 1, 79}, 0.2f);
  set_threads(3);
  moe_block(layer, Precision::int8, x.data(), again.data(), rows);
  attention_within(q.data(), k.data(), v.data(), mixed_again.data(), heads, length, dim, {70, 1, 79}, 0.2f);
  expect(same(y.data(), again.data(), y.size()), "experts give the same bits for any number of threads");
  expect(same(mixed.data(), mixed_again.data(), mixed.size()), "runs give the same bits for any number of threads");
  for (int row : {0, 255, 299}) {
    moe_block(layer, Precision::int8, x.data() + row * HIDDEN, alone.data(), 1);
    expect(same(y.data() + row * HIDDEN, alone.data(), HIDDEN), "a row among others has from its experts what it has alone");
  }
  layer.top_k = 7;
  try {
    check_experts(layer);
    expect(false, "more experts were chosen than there are");
  } catch (const std::invalid_argument&) {
  }
}

void check_small_ends(const Model& model) {
  const auto kv = model.make_store(2);
  const auto y = model.step(*kv, Step{{0, 0}, {0, 1}, 1}, numbers(2 * HIDDEN));
  expect(y.size() == 2 * HIDDEN, "a row without tokens");
  std::vector<float> logits = numbers(20001), probabilities(20001);
  log_softmax(logits.data(), probabilities.data(), 1, 20001);
  int best = -1;
  argmax(logits.data(), &best, 1, 20001);
  expect(probabilities[best] == *std::max_element(probabilities.begin(), probabilities.end()), "the likeliest is the largest");
  std::vector<float> rows(3 * HEADS * DIM);
  const int tokens[] = {-1, 1 << 30, HIDDEN - 1};
  embed(*model.attention.o, 0.5f, tokens, rows.data(), 3);
  expect(std::isnan(rows[0]) && std::isnan(rows[HEADS * DIM]), "a token outside the table has no row");
  expect(std::isfinite(rows.back()), "the table's last row");
  linear(*model.attention.q, Precision::int8, nullptr, nullptr, 0);
}

}  // namespace

int main() {
  const Model model(false), richer(true);
  for (const Model* one : {&model, &richer}) {
    check_threads(*one);
    check_batch(*one);
    check_ragged(*one);
    check_turns(*one);
  }
  check_experts_and_runs();
  check_shared_pages(model);
  check_two_callers(model);
  check_fork(model);
  check_small_ends(model);
  std::printf(failures ? "%d failed\n" : "all good\n", failures);
  return failures ? 1 : 0;
}
