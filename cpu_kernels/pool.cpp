#include "pool.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <utility>

namespace mlx_edge {
namespace {

constexpr int SPINS = 4000;  // about 0.1 ms, more than lies between two regions of a step

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct Owner {
  std::mutex mutex;
  std::unique_ptr<Pool> pool;
  pid_t process = 0;
};

// Never destroyed: MLX's stream threads may still run while the process ends.
Owner& owner() {
  static Owner& it = *new Owner;
  return it;
}

}  // namespace

int default_threads() {
  if (const char* wanted = std::getenv("MLX_EDGE_THREADS")) {
    const int count = std::atoi(wanted);
    if (count > 0) return count;
  }
  cpu_set_t mask;
  if (sched_getaffinity(0, sizeof mask, &mask) == 0) return std::max(1, CPU_COUNT(&mask));
  return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

Pool& Pool::of_process() {
  Owner& it = owner();
  const std::lock_guard lock(it.mutex);
  if (it.process != getpid()) {
    it.pool.release();  // a parent's threads did not come along; there is nobody to join
    it.pool = std::make_unique<Pool>(default_threads());
    it.process = getpid();
  }
  return *it.pool;
}

void set_threads(int num_threads) {
  Pool& old = Pool::of_process();
  Owner& it = owner();
  const std::lock_guard lock(it.mutex);
  { const std::lock_guard wait(old.turn()); }
  it.pool = std::make_unique<Pool>(std::max(1, num_threads));
}

Pool::Pool(int num_threads) {
  for (int i = 1; i < num_threads; i++) workers_.emplace_back([this] { wait_for_work(); });
}

Pool::~Pool() {
  is_over_ = true;
  region_.fetch_add(1);
  region_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void Pool::share_out(int total, int piece, Call call, void* self) {
  call_ = call;
  self_ = self;
  total_ = total;
  piece_ = piece;
  next_.store(0, std::memory_order_relaxed);
  unfinished_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
  region_.fetch_add(1, std::memory_order_release);
  region_.notify_all();
  claim();
  for (int spins = 0; unfinished_.load(std::memory_order_acquire);) {
    if (++spins < SPINS) {
      pause();
    } else {
      std::this_thread::yield();  // a worker lost its core: let it have this one
    }
  }
  if (has_failed_.exchange(false)) std::rethrow_exception(std::exchange(error_, nullptr));
}

void Pool::claim() {
  try {
    for (int begin; (begin = next_.fetch_add(piece_, std::memory_order_relaxed)) < total_;)
      call_(self_, begin, std::min(begin + piece_, total_));
  } catch (...) {
    next_.store(total_, std::memory_order_relaxed);
    if (!has_failed_.exchange(true)) error_ = std::current_exception();
  }
}

void Pool::wait_for_work() {
  for (unsigned seen = 0;;) {
    for (int spins = 0; region_.load(std::memory_order_acquire) == seen;) {
      if (++spins < SPINS) {
        pause();
      } else {
        region_.wait(seen, std::memory_order_acquire);
      }
    }
    seen = region_.load(std::memory_order_acquire);
    if (is_over_) return;
    claim();
    unfinished_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace mlx_edge
