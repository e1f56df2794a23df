// Check mode's memory of who touched which byte: finds races, reads of uninitialised threadgroup memory, unwritten
// outputs. One 64-bit stamp a byte for its last writer and two for its readers.
#pragma once
#include "memory.h"

namespace emu {

// From the highest bit: 32 epoch, 20 simdgroup_barriers passed in that epoch, 1 atomic, 1 unused, 10 thread. An epoch
// ends with a barrier that orders this memory, and with the threadgroup; epochs are never used twice, so old stamps
// need no clearing.
typedef emu_u64 Stamp;
inline emu_u32 epoch_of(Stamp stamp) { return (emu_u32)(stamp >> 32); }
inline emu_u32 thread_of(Stamp stamp) { return stamp & 1023; }
inline bool is_atomic(Stamp stamp) { return stamp >> 11 & 1; }

struct Epochs {
  emu_u32 current;     // now
  emu_u32 threadgroup; // at the beginning of this threadgroup
  emu_u32 launch;      // at the beginning of this launch
};

struct Shadow {
  Stamp* writer;
  Stamp* reader;
  Stamp* other_reader;  // by another thread, of another simdgroup if there was one
  emu_u64 capacity;     // bytes
};

void begin_launch_shadows();
void begin_threadgroup_shadows();
void order_memory(emu_u32 memory_flags);  // a threadgroup_barrier
emu_u64 count_unwritten(emu_u32 buffer);

struct Access {
  bool read, write, atomic;
  emu_u64 pc;
};

// One access of the running thread, inside the bounds of its memory.
void shadow_threadgroup(emu_u64 offset, emu_u64 bytes, const Access& access, const Variable& variable);
void shadow_buffer(emu_u32 buffer, emu_u64 offset, emu_u64 bytes, const Access& access);

// A write over another thread's write may be allowed when the value is the same: whether it was is known only
// afterwards.
extern bool same_value_open;
void close_same_value();
inline void settle_same_value() {
  if (same_value_open) close_same_value();
}

}  // namespace emu
