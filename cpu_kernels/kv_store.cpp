// Pages: made, given back, shared; and their contents one element at a time, for prompt caches and tests.
#include "kv_store.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>

#include "half.h"

namespace mlx_edge {

namespace {

constexpr size_t LINE = 64;  // bytes

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

// Bits of one stored element.
int element_bits(KVFormat format) {
  switch (format) {
    case KVFormat::f32: return 32;
    case KVFormat::f16: return 16;
    case KVFormat::int8: return 8;
    default: return 4;
  }
}

bool is_packed(KVFormat format) { return format == KVFormat::int8 || format == KVFormat::int4; }

void check_sizes(int batch, int num_heads, int head_dim, KVFormat format, int group_size) {
  if (batch < 1 || num_heads < 1 || head_dim < 1 || head_dim > MAX_HEAD_DIM)
    throw std::invalid_argument("a KV store of " + std::to_string(batch) + " rows, " + std::to_string(num_heads) +
                                " heads of " + std::to_string(head_dim) + "; expected at least one row and head, heads of 1 to " +
                                std::to_string(MAX_HEAD_DIM));
  if (!is_packed(format)) return;
  const bool is_known = group_size == 32 || group_size == 64 || group_size == 128;
  if (!is_known || head_dim % group_size)
    throw std::invalid_argument("heads of " + std::to_string(head_dim) + " in groups of " + std::to_string(group_size) +
                                "; expected groups of 32, 64 or 128 that divide the head");
}

// Of the process.
std::atomic<size_t> page_limit{std::numeric_limits<size_t>::max()};
std::atomic<size_t> page_bytes_held{0};

}  // namespace

void set_page_limit(std::optional<size_t> num_bytes) {
  page_limit = num_bytes.value_or(std::numeric_limits<size_t>::max());
}

size_t held_page_bytes() { return page_bytes_held; }

Page::Page(size_t num_bytes) {
  const size_t others = page_bytes_held.fetch_add(num_bytes);
  try {
    if (others + num_bytes > page_limit) throw std::bad_alloc();
    head_ = new (::operator new(sizeof(Head) + num_bytes, std::align_val_t{alignof(Head)})) Head;
  } catch (...) {
    page_bytes_held -= num_bytes;
    throw;
  }
  head_->num_bytes = num_bytes;
}

Page::~Page() {
  if (!head_ || head_->holders.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  page_bytes_held -= head_->num_bytes;
  ::operator delete(head_, std::align_val_t{alignof(Head)});
}

KVStore::KVStore(int batch, int num_heads, int head_dim, KVFormat format, int group_size, int window, int keep)
    : num_heads_(num_heads),
      head_dim_(head_dim),
      format_(format),
      group_size_(is_packed(format) ? group_size : 0),
      window_(std::max(window, 0)),
      keep_(std::max(keep, 0)) {
  check_sizes(batch, num_heads, head_dim, format, group_size);
  const size_t dims = round_up(head_dim, DIMS);
  value_stride_ = static_cast<int>(format == KVFormat::int4 ? dims / 2 : dims);
  const size_t scale_bytes = round_up(PAGE * num_groups() * sizeof(float), LINE);
  scales_at_ = round_up(PAGE * dims * element_bits(format) / 8, LINE);
  offsets_at_ = scales_at_ + scale_bytes;
  plane_bytes_ = offsets_at_ + scale_bytes;
  pages_.resize(batch);
}

Page KVStore::take_page() {
  if (!spare_.empty()) {
    Page page = std::move(spare_.back());
    spare_.pop_back();
    return page;
  }
  Page page(page_bytes());
  num_pages_++;
  return page;
}

void KVStore::give_back(Page& page) {
  if (page.is_shared()) {
    page = {};
    num_pages_--;
  } else {
    spare_.push_back(std::move(page));
  }
}

void KVStore::prepare(int row, int start, int count) {
  auto& pages = pages_[row];
  if (window_ > 0) {
    // The oldest position that a query from `start` on sees, and a page before it.
    const int first = (start - window_ + 1) / PAGE - 1;
    const int kept = (keep_ + PAGE - 1) / PAGE;
    for (int p = kept; p < std::min(first, static_cast<int>(pages.size())); p++)
      if (pages[p]) give_back(pages[p]);
  }
  if (count > 0) {
    const int end = (start + count + PAGE - 1) / PAGE;
    if (static_cast<int>(pages.size()) < end) pages.resize(end);
    for (int p = start / PAGE; p < end; p++) {
      if (pages[p] && !pages[p].is_shared()) continue;
      Page page = take_page();
      if (pages[p]) {
        std::memcpy(page.data(), pages[p].data(), page_bytes());
        num_pages_--;
      } else {
        // What was never stored must be finite: a weight of zero meets it.
        std::memset(page.data(), 0, page_bytes());
      }
      pages[p] = std::move(page);
    }
  }
  if (spare_.size() > pages_.size()) {
    num_pages_ -= spare_.size() - pages_.size();
    spare_.resize(pages_.size());
  }
}

uint8_t* KVStore::plane(int row, int head, int page, bool values) {
  return const_cast<uint8_t*>(static_cast<const KVStore*>(this)->plane(row, head, page, values));
}

const uint8_t* KVStore::plane(int row, int head, int page, bool values) const {
  const auto& pages = pages_[row];
  if (page < 0 || page >= static_cast<int>(pages.size()) || !pages[page]) return nullptr;
  return pages[page].data() + (2 * head + values) * plane_bytes_;
}

bool KVStore::holds(int row, int position) const { return plane(row, 0, position / PAGE, false) != nullptr; }

size_t KVStore::shared_bytes() const {
  size_t count = 0;
  for (const auto& pages : pages_)
    for (const Page& page : pages) count += page && page.is_shared();
  return count * page_bytes();
}

std::unique_ptr<KVStore> KVStore::fork(const std::vector<int>& lengths) const {
  if (lengths.size() != pages_.size())
    throw std::invalid_argument(std::to_string(lengths.size()) + " lengths for a fork of " + std::to_string(batch()) +
                                " rows; expected one each");
  auto twin = std::make_unique<KVStore>(batch(), num_heads_, head_dim_, format_, group_size_, window_, keep_);
  for (int row = 0; row < batch(); row++) {
    const auto& pages = pages_[row];
    const size_t count = std::min(round_up(std::max(lengths[row], 0), PAGE) / PAGE, pages.size());
    twin->pages_[row].assign(pages.begin(), pages.begin() + count);
    for (const Page& page : twin->pages_[row]) twin->num_pages_ += static_cast<bool>(page);
  }
  return twin;
}

size_t KVStore::code_byte(bool values, int slot, int dim, int* shift) const {
  *shift = 0;
  if (format_ == KVFormat::int4) {
    const int half = group_size_ / 2, within = dim % group_size_;
    *shift = within >= half ? 4 : 0;
    dim = dim / group_size_ * half + within % half;
  }
  return values ? static_cast<size_t>(slot) * value_stride_ + dim : static_cast<size_t>(dim) * PAGE + slot;
}

uint8_t KVStore::code_at(const uint8_t* plane, bool values, int slot, int dim) const {
  int shift;
  const uint8_t byte = plane[code_byte(values, slot, dim, &shift)];
  return format_ == KVFormat::int4 ? (byte >> shift) & 15 : byte;
}

void KVStore::set_code(uint8_t* plane, bool values, int slot, int dim, uint8_t code) const {
  int shift;
  uint8_t& byte = plane[code_byte(values, slot, dim, &shift)];
  byte = format_ == KVFormat::int4 ? static_cast<uint8_t>((byte & ~(15 << shift)) | code << shift) : code;
}

size_t KVStore::group_at(bool values, int slot, int group) const {
  return values ? static_cast<size_t>(slot) * num_groups() + group : static_cast<size_t>(group) * PAGE + slot;
}

float KVStore::value_at(const uint8_t* plane, bool values, int slot, int dim) const {
  const size_t at = values ? static_cast<size_t>(slot) * value_stride_ + dim : static_cast<size_t>(dim) * PAGE + slot;
  if (format_ == KVFormat::f32) return reinterpret_cast<const float*>(plane)[at];
  if (format_ == KVFormat::f16) return f16_to_float(reinterpret_cast<const uint16_t*>(plane)[at]);
  const size_t group = group_at(values, slot, dim / group_size_);
  const float scale = reinterpret_cast<const float*>(plane + scales_at_)[group];
  const float offset = reinterpret_cast<const float*>(plane + offsets_at_)[group];
  return std::fma(scale, static_cast<float>(code_at(plane, values, slot, dim)), offset);
}

void KVStore::read(int row, int start, int count, bool values, float* to) const {
  for (int head = 0; head < num_heads_; head++) {
    for (int position = start; position < start + count; position++, to += head_dim_) {
      const uint8_t* from = plane(row, head, position / PAGE, values);
      for (int d = 0; d < head_dim_; d++) to[d] = from ? value_at(from, values, position % PAGE, d) : 0.0f;
    }
  }
}

void KVStore::read_packed(int row, int start, int count, bool values, uint32_t* packs, float* scales,
                          float* offsets) const {
  const int bits = element_bits(format_), per_pack = 32 / bits;
  for (int head = 0; head < num_heads_; head++) {
    for (int position = start; position < start + count; position++) {
      const uint8_t* from = plane(row, head, position / PAGE, values);
      const int slot = position % PAGE;
      for (int d = 0; d < head_dim_; d += per_pack, packs++) {
        *packs = 0;
        for (int i = 0; from && i < per_pack; i++)
          *packs |= static_cast<uint32_t>(code_at(from, values, slot, d + i)) << (i * bits);
      }
      for (int g = 0; g < num_groups(); g++) {
        const size_t at = group_at(values, slot, g);
        *scales++ = from ? reinterpret_cast<const float*>(from + scales_at_)[at] : 0.0f;
        *offsets++ = from ? reinterpret_cast<const float*>(from + offsets_at_)[at] : 0.0f;
      }
    }
  }
}

void KVStore::write_packed(int row, int start, int count, bool values, const uint32_t* packs, const float* scales,
                           const float* offsets) {
  const int bits = element_bits(format_), per_pack = 32 / bits;
  for (int head = 0; head < num_heads_; head++) {
    for (int position = start; position < start + count; position++) {
      uint8_t* to = plane(row, head, position / PAGE, values);
      if (!to) throw std::invalid_argument("position " + std::to_string(position) + " has no page; prepare it first");
      const int slot = position % PAGE;
      for (int d = 0; d < head_dim_; d += per_pack, packs++)
        for (int i = 0; i < per_pack; i++)
          set_code(to, values, slot, d + i, static_cast<uint8_t>((*packs >> (i * bits)) & ((1u << bits) - 1)));
      for (int g = 0; g < num_groups(); g++) {
        const size_t at = group_at(values, slot, g);
        reinterpret_cast<float*>(to + scales_at_)[at] = *scales++;
        reinterpret_cast<float*>(to + offsets_at_)[at] = *offsets++;
      }
    }
  }
}

}  // namespace mlx_edge
