// The keys and values of one layer: pages of PAGE positions that never move, appended to in place.
//
// A position's page is position / PAGE; pages are made when something is stored in them and given back when no query
// can see them any more. Keys lie turned, (D, PAGE), so that a vector of positions meets one element of the query; values
// lie (PAGE, D'), D' = D rounded up to DIMS. Formats: float32, float16, or codes of 8 or 4 bits with a scale and an offset
// per group of the head, as mlx_edge/cache/quantized.py defines them, both float32. Knows no instruction set and no MLX.
//
// A plane, the keys or the values of one head in one page, holds codes, then scales, then offsets:
//   keys    codes (D, PAGE)   scales and offsets (D / G, PAGE)
//   values  codes (PAGE, D')  scales and offsets (PAGE, D / G)
// Codes of 4 bits: a byte holds code i of a group in its low half and code i + G / 2 in its high half; keys are then
// (D / 2, PAGE) bytes and values (PAGE, D / 2).
//
// A fork shares its pages with the store that it came from, until one of them writes a page: then it takes a copy.
//
// Threads: heads are apart, so one thread may append to a head while others read or append to other heads; prepare,
// write_packed and fork want the store to themselves. Stores that share pages may be used, and dropped, by different threads.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

namespace mlx_edge {

constexpr int PAGE = 64;           // positions
constexpr int DIMS = 16;           // a row of values is padded to a multiple of it
constexpr int MAX_HEAD_DIM = 256;

enum class KVFormat : int { f32 = 0, f16 = 1, int8 = 2, int4 = 3 };

// The memory of a page, 64-byte aligned; held by one store or by several. Only one that is its sole holder may write it.
class Page {
 public:
  Page() = default;
  explicit Page(size_t num_bytes);  // throws std::bad_alloc, also where it would go beyond the limit on all pages
  Page(const Page& other) : head_(other.head_) {
    if (head_) head_->holders.fetch_add(1, std::memory_order_relaxed);
  }
  Page(Page&& other) noexcept : head_(std::exchange(other.head_, nullptr)) {}
  Page& operator=(Page other) noexcept {
    std::swap(head_, other.head_);
    return *this;
  }
  ~Page();

  explicit operator bool() const { return head_; }
  uint8_t* data() const { return reinterpret_cast<uint8_t*>(head_ + 1); }
  // What others read before they let go has happened before this says no.
  bool is_shared() const { return head_->holders.load(std::memory_order_acquire) > 1; }

 private:
  struct alignas(64) Head {
    std::atomic<int> holders{1};
    size_t num_bytes = 0;
  };
  Head* head_ = nullptr;
};

// The most bytes of pages in this process, none for no limit; and how many there are.
void set_page_limit(std::optional<size_t> num_bytes);
size_t held_page_bytes();

class KVStore {
 public:
  // `group_size` is that of the packed formats; `window`: positions that the store must keep (0: all); `keep`: first
  // positions that are never dropped. Throws std::invalid_argument when the sizes cannot be served.
  KVStore(int batch, int num_heads, int head_dim, KVFormat format, int group_size, int window, int keep);
  KVStore(const KVStore&) = delete;
  KVStore& operator=(const KVStore&) = delete;

  int batch() const { return static_cast<int>(pages_.size()); }
  int num_heads() const { return num_heads_; }
  int head_dim() const { return head_dim_; }
  KVFormat format() const { return format_; }
  int group_size() const { return group_size_; }  // 0 when the format has none
  int num_groups() const { return group_size_ ? head_dim_ / group_size_ : 0; }
  int window() const { return window_; }
  int keep() const { return keep_; }

  // Makes the pages of positions [start, start + count) of a row, or its own copies of shared ones, and gives back those that
  // no later query sees (with a margin of one page, for rejected drafts). Called once per step and row, before any head is
  // appended to.
  void prepare(int row, int start, int count);

  // The bytes of one head in one page: keys (values = false) or values, 64-byte aligned; null where no page is.
  uint8_t* plane(int row, int head, int page, bool values);
  const uint8_t* plane(int row, int head, int page, bool values) const;
  size_t scales_at() const { return scales_at_; }  // bytes from the start of a plane
  size_t offsets_at() const { return offsets_at_; }
  int value_stride() const { return value_stride_; }  // elements (or bytes, for codes) from a position to the next

  bool holds(int row, int position) const;  // whether the position's page is there
  size_t bytes() const { return num_pages_ * page_bytes(); }  // of all pages now held, shared ones too; any thread may ask
  size_t shared_bytes() const;                                // of those that other stores hold as well
  // A store that goes on by itself from the first lengths[row] positions of each row.
  std::unique_ptr<KVStore> fork(const std::vector<int>& lengths) const;

  // Stored positions [start, start + count) of a row as floats (num_heads, count, D), whatever the format; zeros where
  // no page is. The way back for floats is `append` of the kernels.
  void read(int row, int start, int count, bool values, float* to) const;
  // The same in MLX's layout, for the packed formats: packs (num_heads, count, D * bits / 32), scales and offsets
  // (num_heads, count, D / G). `write_packed` wants the positions prepared.
  void read_packed(int row, int start, int count, bool values, uint32_t* packs, float* scales, float* offsets) const;
  void write_packed(int row, int start, int count, bool values, const uint32_t* packs, const float* scales,
                    const float* offsets);

 private:
  size_t page_bytes() const { return 2 * num_heads_ * plane_bytes_; }  // of all heads: keys, then values of each
  Page take_page();
  void give_back(Page& page);
  uint8_t code_at(const uint8_t* plane, bool values, int slot, int dim) const;
  void set_code(uint8_t* plane, bool values, int slot, int dim, uint8_t code) const;
  size_t code_byte(bool values, int slot, int dim, int* shift) const;
  size_t group_at(bool values, int slot, int group) const;
  float value_at(const uint8_t* plane, bool values, int slot, int dim) const;

  int num_heads_, head_dim_;
  KVFormat format_;
  int group_size_, window_, keep_;
  int value_stride_;
  size_t scales_at_, offsets_at_, plane_bytes_;
  std::vector<std::vector<Page>> pages_;  // of each row, by page number; null where nothing is held
  std::vector<Page> spare_;                // nobody else's
  std::atomic<size_t> num_pages_{0};       // of all rows, and spare ones
};

}  // namespace mlx_edge
