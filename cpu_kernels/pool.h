// The threads that share out a kernel's range: as many as the affinity mask allows, the caller being one of them.
//
// Pieces are claimed one after another, so that a core that was taken away does not hold up the rest. Between two regions
// of a step the others spin for a moment; when nothing comes they sleep until they are woken. Knows no kernel.
#pragma once

#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace mlx_edge {

class Pool {
 public:
  // The pool of this process; a forked child gets threads of its own on first use.
  static Pool& of_process();

  explicit Pool(int num_threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Held by whoever runs regions: two MLX streams take turns, and may share scratch memory.
  std::mutex& turn() { return turn_; }

  // Calls work(begin, end) for pieces that cover [0, total), `piece` long but for the last; returns when all are done.
  // Throws what a piece threw, once nobody works any more; others may then never have begun.
  template <class Work>
  void run(int total, int piece, Work&& work) {
    if (total <= 0) return;
    if (workers_.empty() || total <= piece) return work(0, total);
    share_out(total, piece, [](void* self, int begin, int end) { (*static_cast<Work*>(self))(begin, end); }, &work);
  }

 private:
  using Call = void (*)(void* self, int begin, int end);

  void share_out(int total, int piece, Call call, void* self);
  void claim();
  void wait_for_work();

  std::vector<std::thread> workers_;
  std::mutex turn_;
  Call call_ = nullptr;
  void* self_ = nullptr;
  int total_ = 0, piece_ = 1;
  std::atomic<int> next_{0};        // first index nobody has claimed
  std::atomic<int> unfinished_{0};  // workers that still look at the region
  std::atomic<unsigned> region_{0};
  std::atomic<bool> has_failed_{false};
  std::exception_ptr error_;  // of the piece that failed first
  std::atomic<bool> is_over_{false};
};

// How many threads to use: MLX_EDGE_THREADS, else the cores of the affinity mask.
int default_threads();
// From now on; waits for the region that runs.
void set_threads(int num_threads);

}  // namespace mlx_edge
