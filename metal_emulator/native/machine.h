// The state of the one launch that a process runs at a time: its threads, its simdgroups, its memory. Every other file
// of the runtime works on `machine`.
#pragma once
#include "fiber.h"
#include "interface.h"

namespace emu {

constexpr emu_u32 NO_BUFFER = 0xFFFFFFFFu;

enum SimdgroupState { RUNNING, AT_BARRIER, DONE };

struct Thread {
  Fiber fiber;
  emu_u32 exchanges;  // how many values it has exchanged: picks the slots
  emu_u32 operation;  // what it waits at
  emu_site site;
  emu_u64 pc;
};

struct Simdgroup {
  emu_u32 alive, ready, arrived;  // sets of lanes: not returned; able to run; waiting for the others
  emu_u32 first;                  // its first thread
  emu_u32 lanes;                  // how many it began with
  SimdgroupState state;
  emu_u32 operation;  // what the lane that arrived first waits at
  emu_site site;
  emu_u32 memory_flags;
  emu_u64 pc;
  bool diverged;                                   // a lane waits elsewhere
  emu_u32 threadgroup_barriers, device_barriers;  // simdgroup_barriers passed that order this memory
  emu_slots slots[2];
};

struct Machine {
  const emu_launch* launch;
  emu_result* result;
  emu_u32 mode;
  bool reverse;
  bool running;  // a fiber runs, not the scheduler
  bool failed;

  emu_u32 thread;        // that runs
  Simdgroup* simdgroup;  // of that thread
  char* stack;           // lowest byte of that thread's stack
  emu_u32 num_threads, num_simdgroups;
  emu_u64 group_index;
  void* scheduler;  // stack pointer

  emu_u64 library_low, library_high;  // where the kernel's code and constants lie

  emu_group group;
  emu_thread contexts[EMU_MAX_THREADS];
  Thread threads[EMU_MAX_THREADS];
  Simdgroup simdgroups[EMU_MAX_THREADS / EMU_LANES];
};

extern Machine machine;

inline emu_counters& counters() { return machine.result->counters; }
inline bool is_below_stack(emu_u64 address) { return (emu_u64)machine.stack - address <= STACK_STRIDE - STACK_BYTES; }
inline emu_u32 lane_of(emu_u32 thread) { return thread % EMU_LANES; }

// scheduler.cpp: runs the threads of one threadgroup to their end, or to the first finding.
void run_threadgroup();

// report.cpp. The first finding of a launch counts. `report` returns; `fail` abandons the launch from a fiber.
void report(emu_u32 kind, emu_site site, emu_u64 pc, emu_u32 buffer, bool in_thread, const char* format, ...)
    __attribute__((format(printf, 6, 7)));
[[noreturn]] void fail(emu_u32 kind, emu_site site, emu_u64 pc, emu_u32 buffer, const char* format, ...)
    __attribute__((format(printf, 5, 6)));
[[noreturn]] void fail_stack_overflow(emu_u64 pc);
const char* operation_name(emu_u32 operation);
inline emu_u32 line_of(emu_site site) { return site >> 11; }
inline emu_u32 column_of(emu_site site) { return site & 2047; }

// The address of the instruction that called, as an offset in the kernel's library.
inline emu_u64 caller(const void* return_address) { return (emu_u64)return_address - 1 - machine.library_low; }

// launch.cpp: where the library that holds `entry` lies.
void find_library(const void* entry, emu_u64& low, emu_u64& high);

// faults.cpp: signals that a kernel's bad access raises become findings, from install_faults to remove_faults.
void install_faults();
void remove_faults();

}  // namespace emu
