// What the matmul kernels reach, beside what this machine could: microseconds, GB/s of weights, Gop/s (two operations a
// multiply-add). No MLX. The weight is larger than the caches or cycled through copies, so M = 1 reads memory.
//
//   g++ -O3 -std=c++20 bench/cpu_matmul.cpp <objects of cpu_kernels> -Icpu_kernels -pthread -o /tmp/cpu_matmul
//   /tmp/cpu_matmul [bits=4] [group=64] [threads=2] [N=8192] [K=2048] [M ...]     bits: 2 3 4 5 6 8, 16 (bf16), 32, 104 (mxfp4)
//   MLX_EDGE_CPU_ISA chooses the instruction set; MLX_EDGE_FLOAT=1 multiplies with float activations.
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "kernels.h"

using namespace mlx_edge;

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Threads that spin between jobs, so that what is measured is the kernel.
class Crew {
 public:
  explicit Crew(int n) : n_(n) {
    for (int i = 1; i < n; i++) threads_.emplace_back([this, i] { work(i); });
  }
  ~Crew() {
    job_ = nullptr;
    turn_++;
    for (auto& t : threads_) t.join();
  }
  int size() const { return n_; }
  void run(const std::function<void(int)>& job) {
    job_ = &job;
    busy_ = n_ - 1;
    turn_++;
    job(0);
    while (busy_ > 0) std::this_thread::yield();
  }

 private:
  void work(int i) {
    for (int seen = 0;;) {
      while (turn_ == seen) std::this_thread::yield();
      seen++;
      if (!job_) return;
      (*job_)(i);
      busy_--;
    }
  }
  int n_;
  const std::function<void(int)>* job_ = nullptr;
  std::atomic<int> turn_{0}, busy_{0};
  std::vector<std::thread> threads_;
};

uint8_t* reserve(size_t bytes) {
  bytes = (bytes + (2 << 20)) & ~size_t{(2 << 20) - 1};
  void* p = std::aligned_alloc(2 << 20, bytes);
  madvise(p, bytes, MADV_HUGEPAGE);
  return static_cast<uint8_t*>(p);
}

double best_of(int rounds, const std::function<void()>& f) {
  double best = 1e9;
  for (int i = 0; i < rounds; i++) {
    const double start = now();
    f();
    best = std::min(best, now() - start);
  }
  return best;
}

double read_bandwidth(Crew& crew) {
  const size_t bytes = size_t{256} << 20;
  const std::unique_ptr<uint8_t, decltype(&std::free)> memory(reserve(bytes), std::free);
  std::fill(memory.get(), memory.get() + bytes, uint8_t{1});
  std::atomic<uint64_t> sink{0};
  const double seconds = best_of(6, [&] {
    crew.run([&](int t) {
      const uint64_t* p = reinterpret_cast<const uint64_t*>(memory.get()) + bytes / 8 / crew.size() * t;
      uint64_t sum[16] = {};
      for (size_t i = 0; i + 16 <= bytes / 8 / crew.size(); i += 16)
        for (int j = 0; j < 16; j++) sum[j] ^= p[i + j];
      for (uint64_t s : sum) sink += s;
    });
  });
  return static_cast<double>(bytes) / seconds;
}

#if defined(__x86_64__)
// Multiply-adds of bytes from registers only: what AVX2 could do at best.
__attribute__((target("avx2"))) double maddubs_peak(Crew& crew) {
  const int rounds = 2000000;
  const double seconds = best_of(3, [&] {
    crew.run([&](int) __attribute__((target("avx2"))) {
      for (int i = 0; i < rounds; i++)
        asm volatile(
            "vpmaddubsw %%ymm0, %%ymm1, %%ymm2\n vpaddw %%ymm2, %%ymm8, %%ymm8\n"
            "vpmaddubsw %%ymm0, %%ymm1, %%ymm3\n vpaddw %%ymm3, %%ymm9, %%ymm9\n"
            "vpmaddubsw %%ymm0, %%ymm1, %%ymm4\n vpaddw %%ymm4, %%ymm10, %%ymm10\n"
            "vpmaddubsw %%ymm0, %%ymm1, %%ymm5\n vpaddw %%ymm5, %%ymm11, %%ymm11\n" ::
                : "xmm2", "xmm3", "xmm4", "xmm5", "xmm8", "xmm9", "xmm10", "xmm11");
    });
  });
  return 2.0 * 32 * 4 * rounds * crew.size() / seconds;
}
#endif

struct Case {
  Matrix w;
  std::vector<uint8_t*> copies;
  size_t bytes;
};

Case make_case(int bits, int group, int n, int k, size_t at_least) {
  Matrix w{Format::affine, n, k, bits, group, Float::bf16, nullptr, nullptr};
  if (bits == 16 || bits == 32) w.format = Format::dense, w.float_type = bits == 32 ? Float::f32 : Float::bf16;
  if (bits == 104) w.format = Format::mxfp4, w.bits = 4, w.group_size = 32;
  if (const char* why = refuse(w)) std::printf("%s\n", why), std::exit(1);
  Case c{w, {}, w.format == Format::dense ? size_t(n) * k * float_size(w.float_type) : packed_bytes(w)};
  std::mt19937 random(1);
  for (size_t made = 0; made < at_least; made += c.bytes) {
    uint8_t* p = reserve(c.bytes);
    for (size_t i = 0; i < c.bytes; i += 2) {  // halves that are numbers near one
      const uint16_t h = static_cast<uint16_t>(0x3f00 | (random() & 0x80ff));
      std::copy_n(reinterpret_cast<const uint8_t*>(&h), 2, p + i);
    }
    c.copies.push_back(p);
  }
  return c;
}

void measure(const Kernels& kernels, Crew& crew, const Case& c, int m, bool is_float) {
  const Matrix& w = c.w;
  const int group = w.format == Format::dense ? 64 : w.group_size;
  std::vector<float> x(size_t(m) * w.columns), y(size_t(m) * w.rows);
  std::mt19937 random(2);
  for (float& v : x) v = static_cast<float>(random() % 2001) / 1000 - 1;
  std::vector<float> scales(kernels.scales_count(m, w.columns, group)), sums(scales.size());
  std::unique_ptr<uint8_t, decltype(&std::free)> codes(reserve(kernels.codes_bytes(m, w.columns)), std::free);
  Rows rows{x.data(), w.columns, m, w.columns, group, reinterpret_cast<int8_t*>(codes.get()), scales.data(), sums.data()};
  double quantize = best_of(5, [&] { kernels.quantize(rows, 0, m, 0, w.columns / group); });
  if (is_float) rows.codes = nullptr, quantize = 0;
  const int blocks = num_blocks(w), chunk = std::max(1, blocks / 32);
  size_t turn = 0;
  std::vector<double> times;
  const double begin = now();
  while (times.size() < 12 || (now() - begin < 0.4 && times.size() < 400)) {
    Matrix one = w;
    one.data = c.copies[turn++ % c.copies.size()];
    std::atomic<int> next{0};
    const double start = now();
    crew.run([&](int) {
      for (int b; (b = next.fetch_add(chunk)) < blocks;)
        kernels.multiply(one, rows, nullptr, y.data(), w.rows, b, std::min(b + chunk, blocks));
    });
    times.push_back(now() - start);
  }
  std::sort(times.begin(), times.end());
  const double median = times[times.size() / 2], ops = 2.0 * m * w.rows * w.columns;
  std::printf("  M=%-4d %9.1f us (best %9.1f)  %6.1f GB/s  %7.1f Gop/s (best %7.1f)   quantize %6.1f us\n", m, median * 1e6,
              times[0] * 1e6, static_cast<double>(c.bytes) / median / 1e9, ops / median / 1e9, ops / times[0] / 1e9,
              quantize * 1e6);
}

}  // namespace

int main(int argc, char** argv) {
  const auto number = [&](int i, int otherwise) { return i < argc ? std::atoi(argv[i]) : otherwise; };
  const int bits = number(1, 4), group = number(2, 64), n = number(4, 8192), k = number(5, 2048);
  const Kernels* kernels = find_kernels();
  if (!kernels) return std::printf("no such instruction set here\n"), 1;
  Crew crew(number(3, 2));
  std::printf("%s, %d threads: read %.1f GB/s", kernels->name, crew.size(), read_bandwidth(crew) / 1e9);
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) std::printf(", maddubs %.0f Gop/s", maddubs_peak(crew) / 1e9);
#endif
  std::printf("\n%d bits, group %d, %d x %d\n", bits, group, n, k);
  const Case c = make_case(bits, group, n, k, size_t{96} << 20);
  std::vector<int> counts;
  for (int i = 6; i < argc; i++) counts.push_back(number(i, 1));
  if (counts.empty()) counts = {1, 2, 4, 8, 16, 128, 512};
  for (int m : counts) measure(*kernels, crew, c, m, std::getenv("MLX_EDGE_FLOAT") != nullptr);
  std::printf("read %.1f GB/s again\n", read_bandwidth(crew) / 1e9);
}
