// Which thread runs next. A thread runs until it reaches an operation of its simdgroup or threadgroup; the last lane
// to arrive checks that all wait at the same one, lets them go, and goes on itself without a switch. Simdgroups run
// one after another until all wait at a threadgroup_barrier.
#include <cstring>

#include "counting.h"
#include "machine.h"
#include "shadow.h"

namespace emu {

Machine machine;

static emu_u32 last_of(emu_u32 lanes) { return 31 - __builtin_clz(lanes); }
static emu_u32 first_of(emu_u32 lanes) { return __builtin_ctz(lanes); }

static emu_u32 next_ready(emu_u32 ready, emu_u32 lane) {
  if (machine.reverse) return last_of(ready);
  emu_u32 after = lane == 31 ? 0 : ready & ~((2u << lane) - 1);
  return first_of(after ? after : ready);
}

static void select_thread(emu_u32 thread) {
  machine.thread = thread;
  machine.stack = stack_of(thread);
  counters().switches++;
}

static void switch_to(emu_u32 thread) {
  Thread& from = machine.threads[machine.thread];
  select_thread(thread);
  emu_switch(&from.fiber.stack_pointer, machine.threads[thread].fiber.stack_pointer);
}

[[noreturn]] static void leave_to(void* stack_pointer) {
  void* abandoned;
  emu_switch(&abandoned, stack_pointer);
  __builtin_unreachable();
}

[[noreturn]] static void fail_diverged(const Simdgroup& group) {
  emu_u32 same = 0, other = 0;
  for (emu_u32 lane = 0; lane < group.lanes; lane++) {
    const Thread& thread = machine.threads[group.first + lane];
    if (!(group.alive >> lane & 1)) continue;
    (thread.operation == group.operation && thread.site == group.site ? same : other) |= 1u << lane;
  }
  machine.thread = group.first + first_of(other);
  const Thread& thread = machine.threads[machine.thread];
  fail(EMU_DIVERGENCE, thread.site, thread.pc, NO_BUFFER,
       "divergent simdgroup: lanes %08x wait at %s %u:%u, while lane %u waits at %s %u:%u", same,
       operation_name(group.operation), line_of(group.site), column_of(group.site), first_of(other),
       operation_name(thread.operation), line_of(thread.site), column_of(thread.site));
}

static bool needs_all_lanes(emu_u32 operation) {
  return machine.launch->strict_exit > (operation == EMU_THREADGROUP_BARRIER ? 0u : 1u);
}

static void count_operation(emu_u32 operation) {
  emu_counters& count = counters();
  switch (operation) {
    case EMU_SIMD: count.simd_operations++; break;
    case EMU_QUAD: count.quad_operations++; break;
    case EMU_MATRIX_MULTIPLY: count.matrix_multiplies++; break;
    case EMU_MATRIX_MEMORY: count.matrix_accesses++; break;
    case EMU_SIMDGROUP_BARRIER: count.simdgroup_barriers++; break;
  }
}

// All live lanes wait: they may go on. For a threadgroup_barrier the scheduler decides when.
static void release(Simdgroup& group) {
  if (group.diverged) fail_diverged(group);
  if (__builtin_popcount(group.alive) != (int)group.lanes && needs_all_lanes(group.operation)) {
    machine.thread = group.first + first_of(group.alive);
    fail(EMU_DIVERGENCE, group.site, group.pc, NO_BUFFER,
         "%s is not reached by all lanes: of %u lanes only %08x wait, the others have returned",
         operation_name(group.operation), group.lanes, group.alive);
  }
  if (machine.mode == EMU_COUNT) flush_accesses(group.first, group.lanes);
  count_operation(group.operation);
  if (group.operation == EMU_SIMDGROUP_BARRIER) {
    if (group.memory_flags & EMU_MEM_THREADGROUP) group.threadgroup_barriers++;
    if (group.memory_flags & EMU_MEM_DEVICE) group.device_barriers++;
  }
  group.arrived = 0;
  group.ready = group.alive;
  // The slots belong to the operation, so what is true at the release stays true when a lane resumes later.
  emu_u32 exchanges = machine.threads[group.first + first_of(group.alive)].exchanges;
  emu_slots& slots = group.slots[(exchanges - 1) & 1];
  slots.active = group.alive;
  slots.reduced = 0;
  if (group.operation == EMU_THREADGROUP_BARRIER) group.state = AT_BARRIER;
}

static void arrive(emu_u32 operation, emu_site site, emu_u32 memory_flags, emu_u64 pc) {
  Simdgroup& group = *machine.simdgroup;
  emu_u32 lane = lane_of(machine.thread);
  Thread& thread = machine.threads[machine.thread];
  if (machine.mode == EMU_CHECK) settle_same_value();
  thread.operation = operation;
  thread.site = site;
  thread.pc = pc;
  if (!group.arrived) {
    group.operation = operation;
    group.site = site;
    group.memory_flags = memory_flags;
    group.pc = pc;
    group.diverged = false;
  } else if (group.operation != operation || group.site != site) {
    group.diverged = true;
  }
  group.arrived |= 1u << lane;
  group.ready &= ~(1u << lane);
  if (group.arrived != group.alive) {
    switch_to(group.first + next_ready(group.ready, lane));
    return;
  }
  release(group);
  if (group.state == AT_BARRIER) emu_switch(&thread.fiber.stack_pointer, machine.scheduler);
}

// The life of a thread; its stack begins here.
static void live() {
  machine.launch->entry(&machine.contexts[machine.thread]);
  if (machine.mode == EMU_CHECK) settle_same_value();
  Simdgroup& group = *machine.simdgroup;
  emu_u32 lane = lane_of(machine.thread);
  group.alive &= ~(1u << lane);
  group.ready &= ~(1u << lane);
  if (!group.alive) {
    if (machine.mode == EMU_COUNT) flush_accesses(group.first, group.lanes);
    group.state = DONE;
    leave_to(machine.scheduler);
  }
  if (!group.ready) {  // every other lane waits for this one
    release(group);
    if (group.state == AT_BARRIER) leave_to(machine.scheduler);
  }
  emu_u32 next = group.first + next_ready(group.ready, lane);
  select_thread(next);
  leave_to(machine.threads[next].fiber.stack_pointer);
}

static void start_threads() {
  for (emu_u32 t = 0; t < machine.num_threads; t++) {
    machine.threads[t].exchanges = 0;
    start_fiber(machine.threads[t].fiber, t, live);
  }
  for (emu_u32 s = 0; s < machine.num_simdgroups; s++) {
    Simdgroup& group = machine.simdgroups[s];
    group.first = s * EMU_LANES;
    emu_u32 left = machine.num_threads - group.first;
    group.lanes = left < EMU_LANES ? left : (emu_u32)EMU_LANES;
    group.alive = group.ready = group.lanes == 32 ? ~0u : (1u << group.lanes) - 1;
    group.arrived = 0;
    group.state = RUNNING;
    group.threadgroup_barriers = group.device_barriers = 0;
    for (emu_slots& slots : group.slots) slots.distant_first = machine.launch->order >> 1 & 1;
  }
}

static void run_simdgroup(Simdgroup& group) {
  machine.simdgroup = &group;
  select_thread(group.first + (machine.reverse ? last_of(group.ready) : first_of(group.ready)));
  machine.running = true;
  emu_switch(&machine.scheduler, machine.threads[machine.thread].fiber.stack_pointer);
  machine.running = false;
}

// All simdgroups wait or have ended: lets them through the barrier. False when all have ended.
static bool pass_barrier() {
  Simdgroup* waiting = nullptr;
  bool ended = false;
  for (emu_u32 s = 0; s < machine.num_simdgroups; s++) {
    Simdgroup& group = machine.simdgroups[s];
    if (group.state == DONE) {
      ended = true;
    } else if (!waiting) {
      waiting = &group;
    } else if (group.site != waiting->site) {
      machine.thread = group.first + first_of(group.alive);
      report(EMU_DIVERGENCE, group.site, group.pc, NO_BUFFER, true,
             "simdgroups wait at different threadgroup_barriers: simdgroup %u at %u:%u, simdgroup %u at %u:%u",
             (emu_u32)(waiting - machine.simdgroups), line_of(waiting->site), column_of(waiting->site), s,
             line_of(group.site), column_of(group.site));
      return false;
    }
  }
  if (!waiting) return false;
  if (ended && machine.launch->strict_exit) {
    machine.thread = waiting->first + first_of(waiting->alive);
    report(EMU_DIVERGENCE, waiting->site, waiting->pc, NO_BUFFER, true,
           "threadgroup_barrier is not reached by all threads: a simdgroup has returned, simdgroup %u waits",
           (emu_u32)(waiting - machine.simdgroups));
    return false;
  }
  counters().threadgroup_barriers++;
  order_memory(waiting->memory_flags);
  for (emu_u32 s = 0; s < machine.num_simdgroups; s++) {
    Simdgroup& group = machine.simdgroups[s];
    if (group.state == AT_BARRIER) group.state = RUNNING;
  }
  return true;
}

void run_threadgroup() {
  start_threads();
  do {
    for (emu_u32 i = 0; i < machine.num_simdgroups; i++) {
      Simdgroup& group = machine.simdgroups[machine.reverse ? machine.num_simdgroups - 1 - i : i];
      if (group.state != RUNNING) continue;
      run_simdgroup(group);
      if (machine.failed) return;
    }
  } while (pass_barrier());
}

}  // namespace emu

using namespace emu;

emu_thread* emu_self(void) { return &machine.contexts[machine.thread]; }

emu_u32 emu_lane(void) { return lane_of(machine.thread); }

emu_slots* emu_exchange(emu_u32 operation, emu_site site, const void* value, emu_u32 bytes) {
  Simdgroup& group = *machine.simdgroup;
  emu_u32 thread = machine.thread;
  emu_slots& slots = group.slots[machine.threads[thread].exchanges++ & 1];
  unsigned char* slot = slots.value[lane_of(thread)];
  if (bytes == 4)
    memcpy(slot, value, 4);  // one instruction, where a size that is not known is a call
  else
    memcpy(slot, value, bytes);
  arrive(operation, site, EMU_MEM_NONE, caller(__builtin_return_address(0)));
  return &slots;
}

void emu_barrier(emu_u32 operation, emu_site site, emu_u32 memory_flags) {
  arrive(operation, site, memory_flags, caller(__builtin_return_address(0)));
}

void emu_misused(emu_u32 misuse, emu_site site, int a, emu_u32 b) {
  emu_u64 pc = machine.threads[machine.thread].pc;
  switch (misuse) {
    case EMU_SHUFFLE_INACTIVE:
      fail(EMU_SIMD_MISUSE, site, pc, NO_BUFFER, "shuffle from inactive lane %d: active are %08x", a, b);
    case EMU_LANE_OUT_OF_RANGE:
      fail(EMU_SIMD_MISUSE, site, pc, NO_BUFFER, "lane %d is out of range: the operation has lanes 0 to %u", a, b);
    case EMU_MATRIX_INACTIVE:
      fail(EMU_SIMD_MISUSE, site, pc, NO_BUFFER, "simdgroup_matrix operation with inactive lanes: active are %08x", b);
    default:
      fail(EMU_SIMD_MISUSE, site, pc, NO_BUFFER, "delta or modulo %d is out of range: at most %u", a, b);
  }
}
