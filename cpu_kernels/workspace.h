// Scratch memory of the blocks: grows to the largest step seen and is used again. Held by whoever holds the pool's turn.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

namespace mlx_edge {

// An uninitialised, 64-byte aligned array that keeps its memory from use to use.
template <class T>
class Scratch {
 public:
  T* take(size_t count) {
    if (count > capacity_) {
      const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
      capacity_ = 0;  // of nothing, should the memory not be there
      memory_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
      if (!memory_) throw std::bad_alloc();
      capacity_ = count;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(T* memory) const { std::free(memory); }
  };
  std::unique_ptr<T, Free> memory_;
  size_t capacity_ = 0;
};

// The int8 codes of one set of rows.
struct Codes {
  Scratch<int8_t> codes;
  Scratch<float> scales, sums;
};

struct Workspace {
  Scratch<float> normed, heads, attended, gate, up, cosines, sines;
  Scratch<float> scores, gathered, mixed;  // of experts: the router's, their rows, what comes of these
  Scratch<float> turned, padded;           // keys and values of runs
  std::vector<Codes> codes;        // of what is multiplied, one a group size
  std::vector<Codes> inner_codes;  // of an MLP's inner rows, made while `codes` are still read
};

}  // namespace mlx_edge
