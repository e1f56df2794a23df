// One fiber per GPU thread: a stack of its own, and a switch that saves what the C calling convention asks for. It
// knows nothing of simdgroups.
#pragma once
#include "interface.h"

namespace emu {

constexpr emu_u64 STACK_BYTES = 96 * 1024;
// From one stack to the next. What lies below a stack is unmapped, and wide: a large frame must not step over it.
constexpr emu_u64 STACK_STRIDE = 1024 * 1024;

struct Fiber {
  void* stack_pointer;
};

// Makes `count` stacks usable. False when there is no memory.
bool prepare_stacks(emu_u32 count);
char* stacks();
inline char* stack_of(emu_u32 thread) { return stacks() + (thread + 1) * STACK_STRIDE - STACK_BYTES; }

// The fiber of thread `index` will begin at `start`, which must not return.
void start_fiber(Fiber& fiber, emu_u32 index, void (*start)());

}  // namespace emu

extern "C" __attribute__((visibility("hidden"))) void emu_switch(void** save, void* load);
