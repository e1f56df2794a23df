// Count mode: what the loads and stores of a simdgroup ask of the memory. Each lane logs its accesses; when the lanes
// meet, equal instructions of all lanes are taken together as one instruction of the simdgroup.
#pragma once
#include "machine.h"

namespace emu {

void begin_launch_counts();
void count_device(emu_u32 buffer, emu_u64 offset, emu_u64 bytes, bool write, emu_u64 pc);
void count_threadgroup(emu_u64 offset, emu_u64 bytes, bool write, emu_u64 pc);

// The lanes of the simdgroup that begins with thread `first` have met, or have all returned.
void flush_accesses(emu_u32 first, emu_u32 lanes);

// blocks.cpp
void begin_block_counts();

}  // namespace emu
