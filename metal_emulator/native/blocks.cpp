// How often each basic block runs: clang's -fsanitize-coverage=bb,trace-pc-guard calls these. The blocks of a library
// are numbered in the order of its __sancov_guards section.
#include <algorithm>
#include <vector>

#include "counting.h"

namespace emu {

struct Library {
  emu_u64 low, high;  // addresses of its guards
  emu_u32 first, count;
};

static std::vector<Library>& libraries() {
  static std::vector<Library> all;
  return all;
}
static std::vector<emu_u64> block_counts(1, 0);
static emu_u64* counts = block_counts.data();

void begin_block_counts() { std::fill(block_counts.begin(), block_counts.end(), 0); }

}  // namespace emu

using namespace emu;

// Called when a library is loaded. A guard holds the number of its block from then on; 0 would be none.
EMU_EXTERN void __sanitizer_cov_trace_pc_guard_init(emu_u32* begin, emu_u32* end) {
  if (begin == end || *begin) return;
  emu_u32 first = (emu_u32)block_counts.size();
  for (emu_u32* guard = begin; guard < end; guard++) *guard = first + (emu_u32)(guard - begin);
  libraries().push_back({(emu_u64)begin, (emu_u64)end, first, (emu_u32)(end - begin)});
  block_counts.resize(first + (end - begin), 0);
  counts = block_counts.data();
}

EMU_EXTERN void __sanitizer_cov_trace_pc_guard(emu_u32* guard) { counts[*guard]++; }

emu_u64 emu_block_counts(const void* entry, emu_u64* out, emu_u64 capacity) {
  emu_u64 low, high;
  find_library(entry, low, high);
  for (const Library& library : libraries()) {
    if (library.low < low || library.low >= high) continue;
    for (emu_u64 i = 0; i < library.count && i < capacity; i++) out[i] = block_counts[library.first + i];
    return library.count;
  }
  return 0;
}
