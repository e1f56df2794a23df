// Findings: the first one of a launch is kept, with the place and the thread.
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "machine.h"

namespace emu {

static void write_finding(emu_u32 kind, emu_site site, emu_u64 pc, emu_u32 buffer, bool in_thread, const char* format,
                          va_list arguments) {
  if (machine.failed) return;
  machine.failed = true;
  emu_finding& finding = machine.result->finding;
  finding.kind = kind;
  finding.site = site;
  finding.pc = pc;
  finding.buffer = buffer;
  finding.has_thread = in_thread;
  vsnprintf(finding.text, sizeof finding.text, format, arguments);
  if (!in_thread) return;
  const emu_thread& context = machine.contexts[machine.thread];
  memcpy(finding.threadgroup, machine.group.threadgroup_position_in_grid, sizeof finding.threadgroup);
  memcpy(finding.thread, context.thread_position_in_threadgroup, sizeof finding.thread);
  finding.simdgroup = context.simdgroup_index_in_threadgroup;
  finding.lane = context.thread_index_in_simdgroup;
}

void report(emu_u32 kind, emu_site site, emu_u64 pc, emu_u32 buffer, bool in_thread, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  write_finding(kind, site, pc, buffer, in_thread, format, arguments);
  va_end(arguments);
}

void fail(emu_u32 kind, emu_site site, emu_u64 pc, emu_u32 buffer, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  write_finding(kind, site, pc, buffer, true, format, arguments);
  va_end(arguments);
  void* abandoned;
  emu_switch(&abandoned, machine.scheduler);
  __builtin_unreachable();
}

void fail_stack_overflow(emu_u64 pc) {
  fail(EMU_STACK_OVERFLOW, 0, pc, NO_BUFFER, "stack overflow: a thread has more than %lu bytes of private memory",
       (emu_u64)STACK_BYTES);
}

const char* operation_name(emu_u32 operation) {
  switch (operation) {
    case EMU_SIMD: return "simd operation";
    case EMU_QUAD: return "quad operation";
    case EMU_MATRIX_MULTIPLY: return "simdgroup_multiply";
    case EMU_MATRIX_MEMORY: return "simdgroup_load or simdgroup_store";
    case EMU_SIMDGROUP_BARRIER: return "simdgroup_barrier";
    case EMU_THREADGROUP_BARRIER: return "threadgroup_barrier";
  }
  return "operation";
}

}  // namespace emu
