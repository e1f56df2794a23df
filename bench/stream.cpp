// How fast this machine's memory can be read: a sum over 1 GiB, split among threads, pass after pass for some seconds.
// Built and run by bench/peers.py: stream THREADS SECONDS; prints GB/s of each pass, one a line.
#include <sys/mman.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

constexpr std::size_t kBytes = std::size_t{1} << 30;

// Eight sums: one would wait for itself. A sum over all words cannot be left out by the compiler.
std::uint64_t sum(const std::uint64_t* words, std::size_t count) {
  std::uint64_t sums[32] = {};
  for (std::size_t i = 0; i + 32 <= count; i += 32) {
    for (std::size_t j = 0; j < 32; ++j) sums[j] += words[i + j];
  }
  std::uint64_t total = 0;
  for (auto part : sums) total += part;
  return total;
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 2;
  const double seconds = argc > 2 ? std::atof(argv[2]) : 1.0;
  void* memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED || threads < 1) return 1;
  madvise(memory, kBytes, MADV_HUGEPAGE);
  auto* words = static_cast<std::uint64_t*>(memory);
  const std::size_t share = kBytes / sizeof(std::uint64_t) / threads;
  for (std::size_t i = 0; i < kBytes / sizeof(std::uint64_t); ++i) words[i] = i;

  std::vector<std::uint64_t> results(threads);
  const auto begin = std::chrono::steady_clock::now();
  for (std::chrono::duration<double> spent{0}; spent.count() < seconds;) {
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> pool;
    for (int t = 1; t < threads; ++t) {
      pool.emplace_back([&, t] { results[t] = sum(words + t * share, share); });
    }
    results[0] = sum(words, share);
    for (auto& thread : pool) thread.join();
    const auto end = std::chrono::steady_clock::now();
    const std::chrono::duration<double> pass = end - start;
    spent = end - begin;
    std::printf("%.3f\n", static_cast<double>(share) * threads * sizeof(std::uint64_t) / pass.count() / 1e9);
  }
  std::uint64_t total = 0;
  for (auto part : results) total += part;
  std::fprintf(stderr, "sum %llu\n", static_cast<unsigned long long>(total));
  return 0;
}
