// Weights that are views of their file, where MLX's allocator knows only memory of its own.
//
//     reserved  | page: ..... size word | pages of the file ........ |
//                                       ^ what the array calls its data
//
// MLX's CPU allocator keeps the size of a buffer in the word before its data. One page more than the file needs is
// reserved, the word is written at its end, and the file is mapped right behind it; a deleter takes the whole
// reservation back. Whether the installed MLX has this layout is tried out before.
//
// The mapping is private and may be written, as any memory behind an array: a numpy view of it can be assigned to, and
// an MLX before 0.32.4 wrote results into inputs that nobody else held. Such a page becomes this process's own copy; the
// file and other processes never see it. Pages that are only read stay shared.

#include "adopt.h"

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <deque>
#include <limits>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "mlx/allocator.h"

namespace mx = mlx::core;

namespace mlx_edge {
namespace {

void require(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(std::string("cannot share the file's pages: ") + what);
}

void require_call(bool succeeded, const char* call) {
  if (!succeeded) {
    throw std::runtime_error(std::string("cannot share the file's pages: ") + call + ": " + std::strerror(errno));
  }
}

constexpr size_t LARGE = size_t{1} << 17;

// Whether a buffer of the installed MLX is a size word and, right behind it, the data.
bool has_size_word() {
  constexpr size_t num_bytes = 24;
  const mx::allocator::Data data = mx::allocator::malloc(num_bytes);
  mx::allocator::Buffer buffer = data.buffer();
  const auto* word = static_cast<const size_t*>(buffer.ptr());
  // A buffer that was used before may be larger.
  return word && static_cast<const void*>(word + 1) == buffer.raw_ptr() && *word >= num_bytes && *word < LARGE;
}

// Address space, given back unless it was released to somebody else.
class Reservation {
 public:
  explicit Reservation(size_t num_bytes)
      : begin_(mmap(nullptr, num_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)),
        num_bytes_(num_bytes) {
    require_call(begin_ != MAP_FAILED, "mmap");
  }
  Reservation(const Reservation&) = delete;
  Reservation& operator=(const Reservation&) = delete;
  ~Reservation() {
    if (begin_) munmap(begin_, num_bytes_);
  }
  std::byte* begin() const { return static_cast<std::byte*>(begin_); }
  void release() { begin_ = nullptr; }

 private:
  void* begin_;
  size_t num_bytes_;
};

// A few pages that were given back, for outputs of the same size: each step has those of the step before, and fresh pages cost
// more than many a small op.
class SparePages {
 public:
  static constexpr size_t MOST_BYTES = size_t{5} << 18;  // logits and log-probabilities of one row

  void* take(size_t num_bytes) {
    const std::lock_guard lock(mutex_);
    const auto found = std::find_if(kept_.begin(), kept_.end(), [&](const Pages& kept) { return kept.num_bytes == num_bytes; });
    if (found == kept_.end()) return nullptr;
    void* const start = found->start;
    bytes_ -= num_bytes;
    kept_.erase(found);
    return start;
  }
  // The oldest make room.
  void keep(void* start, size_t num_bytes) {
    const std::lock_guard lock(mutex_);
    kept_.push_back({start, num_bytes});
    for (bytes_ += num_bytes; bytes_ > MOST_BYTES; kept_.pop_front()) {
      bytes_ -= kept_.front().num_bytes;
      munmap(kept_.front().start, kept_.front().num_bytes);
    }
  }

 private:
  struct Pages {
    void* start;
    size_t num_bytes;
  };
  std::mutex mutex_;
  std::deque<Pages> kept_;
  size_t bytes_ = 0;
};

SparePages& spare_pages() {
  static SparePages* const pages = new SparePages;  // never destroyed: arrays may outlive whatever ends first
  return *pages;
}

bool knows_layout() {
  static const bool is_known = has_size_word();
  return is_known;
}

}  // namespace

mx::allocator::Data allocate(size_t num_bytes) {
  if (num_bytes < LARGE || !knows_layout()) return mx::allocator::malloc(num_bytes);
  const size_t page = sysconf(_SC_PAGESIZE), reserved_bytes = page + num_bytes;
  void* start = spare_pages().take(reserved_bytes);
  if (!start) start = mmap(nullptr, reserved_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED) return mx::allocator::malloc(num_bytes);
  std::byte* const word = static_cast<std::byte*>(start) + page - sizeof(size_t);
  std::memcpy(word, &num_bytes, sizeof(num_bytes));
  return {mx::allocator::Buffer(word),
          [start, reserved_bytes](mx::allocator::Buffer) { spare_pages().keep(start, reserved_bytes); }};
}

mx::array adopt_pages(int descriptor, int64_t begin, int64_t num_bytes) {
  require(knows_layout(), "the installed MLX lays out its memory in another way");
  const int64_t page = sysconf(_SC_PAGESIZE);
  require(begin >= 0 && begin % page == 0 && num_bytes > 0 && num_bytes % page == 0, "they are not whole pages");
  require(num_bytes / 4 <= std::numeric_limits<int>::max(), "MLX counts elements in 32 bits");
  struct stat info;
  require_call(fstat(descriptor, &info) == 0, "fstat");
  require(num_bytes - page < info.st_size - begin, "they lie behind the end of the file");

  const size_t reserved_bytes = page + num_bytes;
  Reservation reservation(reserved_bytes);
  std::byte* const start = reservation.begin();
  std::byte* const data = start + page;
  std::byte* const word = data - sizeof(size_t);
  require_call(mprotect(start, page, PROT_READ | PROT_WRITE) == 0, "mprotect");
  const size_t size = num_bytes;
  std::memcpy(word, &size, sizeof(size));
  // Without a reserve: otherwise a file larger than the memory could be refused, though nothing is written.
  const int flags = MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE;
  require_call(mmap(data, num_bytes, PROT_READ | PROT_WRITE, flags, descriptor, begin) != MAP_FAILED, "mmap");

  mx::allocator::Data owner(mx::allocator::Buffer(word),
                            [start, reserved_bytes](mx::allocator::Buffer) { munmap(start, reserved_bytes); });
  reservation.release();
  return mx::array(std::move(owner), mx::Shape{static_cast<int>(num_bytes / 4)}, mx::uint32);
}

}  // namespace mlx_edge
