// One launch: what Metal would refuse, the threadgroups in sequence, what is left to say at the end.
#include <link.h>

#include <algorithm>
#include <cstring>

#include "counting.h"
#include "memory.h"
#include "shadow.h"

namespace emu {

struct Search {
  emu_u64 address, low, high;
};

static int match_library(dl_phdr_info* info, size_t, void* data) {
  Search& search = *static_cast<Search*>(data);
  emu_u64 high = 0;
  bool found = false;
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const auto& part = info->dlpi_phdr[i];
    if (part.p_type != PT_LOAD) continue;
    emu_u64 low = info->dlpi_addr + part.p_vaddr;
    found = found || (search.address >= low && search.address < low + part.p_memsz);
    high = std::max<emu_u64>(high, low + part.p_memsz);
  }
  if (!found) return 0;
  search.low = info->dlpi_addr;
  search.high = high;
  return 1;
}

void find_library(const void* entry, emu_u64& low, emu_u64& high) {
  static Search last = {};
  if ((emu_u64)entry != last.address) {
    last = {(emu_u64)entry, 0, 0};
    dl_iterate_phdr(match_library, &last);
  }
  low = last.low;
  high = last.high;
}

static bool refuse(const emu_launch& launch) {
  const emu_u32* threads = launch.threadgroup;
  emu_u64 in_group = 1;
  for (int axis = 0; axis < 3; axis++) {
    in_group *= std::min(threads[axis], launch.grid[axis]);
    if (!threads[axis] || !launch.grid[axis]) {
      report(EMU_BAD_LAUNCH, 0, 0, NO_BUFFER, false, "grid (%u, %u, %u) of threadgroups (%u, %u, %u): a size is 0",
             launch.grid[0], launch.grid[1], launch.grid[2], threads[0], threads[1], threads[2]);
      return true;
    }
  }
  if (in_group > EMU_MAX_THREADS)
    report(EMU_BAD_LAUNCH, 0, 0, NO_BUFFER, false, "threadgroup of %lu threads: at most %u are possible", in_group,
           (emu_u32)EMU_MAX_THREADS);
  else if (launch.num_buffers > EMU_MAX_BUFFERS)
    report(EMU_BAD_LAUNCH, 0, 0, NO_BUFFER, false, "%u buffers: at most %u are possible", launch.num_buffers,
           (emu_u32)EMU_MAX_BUFFERS);
  else if (!prepare_stacks((emu_u32)in_group) || !prepare_arena())
    report(EMU_BAD_LAUNCH, 0, 0, NO_BUFFER, false, "no memory for %lu threads", in_group);
  return machine.failed;
}

static void begin_launch(const emu_launch& launch) {
  bind_buffers(launch);
  forget_variables();
  find_library((const void*)launch.entry, machine.library_low, machine.library_high);
  emu_group& group = machine.group;
  memset(&group, 0, sizeof group);
  for (emu_u32 i = 0; i < launch.num_buffers; i++) group.buffer[i] = buffers[i].low;
  emu_u32 full = 1;
  for (int axis = 0; axis < 3; axis++) {
    emu_u32 threads = std::min(launch.threadgroup[axis], launch.grid[axis]);
    full *= threads;
    group.dispatch_threads_per_threadgroup[axis] = threads;
    group.threads_per_grid[axis] = group.grid_size[axis] = launch.grid[axis];
    group.threadgroups_per_grid[axis] = (launch.grid[axis] + threads - 1) / threads;
  }
  group.threads_per_simdgroup = group.thread_execution_width = EMU_LANES;
  group.dispatch_simdgroups_per_threadgroup = (full + EMU_LANES - 1) / EMU_LANES;
  group.dispatch_quadgroups_per_threadgroup = (full + 3) / 4;
  if (machine.mode == EMU_CHECK) begin_launch_shadows();
  if (machine.mode == EMU_COUNT) {
    begin_launch_counts();
    begin_block_counts();
  }
}

// Positions in the threadgroup: the same for all threadgroups of one size.
static void place_threads(const emu_u32* size) {
  emu_u32 t = 0;
  for (emu_u32 z = 0; z < size[2]; z++)
    for (emu_u32 y = 0; y < size[1]; y++)
      for (emu_u32 x = 0; x < size[0]; x++, t++) {
        emu_thread& context = machine.contexts[t];
        context.group = &machine.group;
        context.thread_position_in_threadgroup[0] = x;
        context.thread_position_in_threadgroup[1] = y;
        context.thread_position_in_threadgroup[2] = z;
        context.thread_index_in_threadgroup = t;
        context.thread_index_in_simdgroup = t % EMU_LANES;
        context.simdgroup_index_in_threadgroup = t / EMU_LANES;
        context.thread_index_in_quadgroup = t % 4;
        context.quadgroup_index_in_threadgroup = t / 4;
      }
  machine.num_threads = t;
  machine.num_simdgroups = (t + EMU_LANES - 1) / EMU_LANES;
  machine.group.simdgroups_per_threadgroup = machine.num_simdgroups;
  machine.group.quadgroups_per_threadgroup = (t + 3) / 4;
}

static void begin_threadgroup(emu_u64 index) {
  emu_group& group = machine.group;
  emu_u32 size[3], first[3];
  emu_u64 rest = index;
  for (int axis = 0; axis < 3; axis++) {
    emu_u32 full = group.dispatch_threads_per_threadgroup[axis];
    group.threadgroup_position_in_grid[axis] = (emu_u32)(rest % group.threadgroups_per_grid[axis]);
    rest /= group.threadgroups_per_grid[axis];
    first[axis] = group.threadgroup_position_in_grid[axis] * full;
    size[axis] = std::min(full, group.threads_per_grid[axis] - first[axis]);
  }
  if (memcmp(size, group.threads_per_threadgroup, sizeof size)) {
    memcpy(group.threads_per_threadgroup, size, sizeof size);
    place_threads(size);
  }
  for (emu_u32 t = 0; t < machine.num_threads; t++)
    for (int axis = 0; axis < 3; axis++)
      machine.contexts[t].thread_position_in_grid[axis] =
          first[axis] + machine.contexts[t].thread_position_in_threadgroup[axis];
  machine.group_index = index;
  poison_arena();
  if (machine.mode == EMU_CHECK) begin_threadgroup_shadows();
  counters().threads += machine.num_threads;
  counters().simdgroups += machine.num_simdgroups;
  counters().threadgroups++;
}

static void run_threadgroups(const emu_launch& launch) {
  const emu_u32* groups = machine.group.threadgroups_per_grid;
  emu_u64 count = (emu_u64)groups[0] * groups[1] * groups[2];
  emu_u64 end = launch.max_groups ? std::min<emu_u64>(count, launch.max_groups) : count;
  for (emu_u64 i = 0; i < end && !machine.failed; i++) {
    begin_threadgroup(machine.reverse ? end - 1 - i : i);
    run_threadgroup();
  }
}

static void check_outputs() {
  for (emu_u32 i = 0; i < num_buffers; i++) {
    if (!(buffers[i].flags & EMU_WRITABLE)) continue;
    emu_u64 unwritten = machine.result->buffers[i].unwritten_bytes = count_unwritten(i);
    if (!unwritten || buffers[i].flags & EMU_UNWRITTEN_OK || machine.launch->max_groups) continue;
    report(EMU_UNWRITTEN_OUTPUT, 0, 0, i, false, "output %s is not written: %lu of its %lu bytes", buffers[i].name,
           unwritten, buffers[i].high - buffers[i].low);
  }
}

}  // namespace emu

using namespace emu;

emu_u32 emu_interface(void) { return EMU_INTERFACE; }

emu_u32 emu_run(const emu_launch* launch, emu_result* result) {
  memset(result, 0, sizeof *result);
  result->finding.buffer = NO_BUFFER;
  machine.launch = launch;
  machine.result = result;
  machine.mode = launch->mode;
  machine.reverse = launch->order & 1;
  machine.failed = machine.running = false;
  if (refuse(*launch)) return result->finding.kind;
  begin_launch(*launch);
  install_faults();
  run_threadgroups(*launch);
  machine.running = false;
  remove_faults();
  if (machine.mode == EMU_CHECK && !machine.failed) check_outputs();
  return result->finding.kind;
}
