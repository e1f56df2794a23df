// What clang's kernel-address sanitizer calls before each load and store of a kernel that was compiled for check or
// count mode. An address is looked for where a Metal kernel may have memory; anything else is a finding.
#include <cstring>

#include "counting.h"
#include "memory.h"
#include "shadow.h"

namespace emu {

static const char* verb(const Access& access) {
  return access.atomic ? "atomic access" : access.write ? "write" : "read";
}

static void access_arena(emu_u64 offset, emu_u64 bytes, const Access& access) {
  if (machine.mode == EMU_COUNT) {
    count_threadgroup(offset, bytes, access.write, access.pc);
    return;
  }
  emu_u32 index = offset < ARENA_BYTES ? arena.variable_at[offset / GRANULE] : 0;
  if (index && offset + bytes <= arena.variables[index - 1].offset + arena.variables[index - 1].bytes) {
    shadow_threadgroup(offset, bytes, access, arena.variables[index - 1]);
    return;
  }
  const Variable* nearest = nullptr;
  emu_u64 least = ~0ul;
  for (emu_u32 i = 0; i < arena.num_variables; i++) {
    const Variable& variable = arena.variables[i];
    emu_u64 end = variable.offset + variable.bytes;
    emu_u64 distance = offset < variable.offset ? variable.offset - offset : offset >= end ? offset - end : 0;
    if (distance >= least) continue;
    least = distance;
    nearest = &variable;
  }
  if (!nearest)
    fail(EMU_WILD_POINTER, 0, access.pc, NO_BUFFER, "%s of threadgroup memory that no variable has", verb(access));
  fail(EMU_OUT_OF_BOUNDS, 0, access.pc, NO_BUFFER,
       "out-of-bounds threadgroup %s of %lu bytes at byte %ld (index %ld) of the variable in line %u, "
       "which has %u bytes",
       verb(access), bytes, (long)offset - (long)nearest->offset, ((long)offset - (long)nearest->offset) / (long)bytes,
       line_of(nearest->site), nearest->bytes);
}

static void access_buffer(emu_u32 buffer, emu_u64 address, emu_u64 bytes, const Access& access) {
  const Buffer& of = buffers[buffer];
  emu_u64 offset = address - of.low;
  if (address + bytes > of.high)
    fail(EMU_OUT_OF_BOUNDS, 0, access.pc, buffer,
         "out-of-bounds device %s of %lu bytes at byte %lu (index %lu) crosses the end of %s, which has %lu bytes",
         verb(access), bytes, offset, offset / bytes, of.name, of.high - of.low);
  if (access.write && !(of.flags & EMU_WRITABLE))
    fail(EMU_WRITE_TO_INPUT, 0, access.pc, buffer, "%s to byte %lu (index %lu) of input %s", verb(access), offset,
         offset / bytes, of.name);
  if (machine.mode == EMU_COUNT)
    count_device(buffer, offset, bytes, access.write, access.pc);
  else if (of.flags & EMU_WRITABLE)
    shadow_buffer(buffer, offset, bytes, access);
}

static bool is_inside(emu_u64 address, const void* low, emu_u64 bytes) { return address - (emu_u64)low < bytes; }

// Neither of this thread nor the arena nor a buffer.
static void access_elsewhere(emu_u64 address, emu_u64 bytes, const Access& access) {
  if (address >= machine.library_low && address < machine.library_high) {
    if (access.write) fail(EMU_WILD_POINTER, 0, access.pc, NO_BUFFER, "write to a program-scope constant");
    counters().constant_accesses++;
    return;
  }
  if (is_below_stack(address)) fail_stack_overflow(access.pc);
  emu_u32 near = nearest_buffer(address);
  if (near != NO_BUFFER) {
    long offset = (long)(address - buffers[near].low);
    fail(EMU_OUT_OF_BOUNDS, 0, access.pc, near,
         "out-of-bounds device %s of %lu bytes at byte %ld (index %ld) of %s, which has %lu bytes", verb(access), bytes,
         offset, offset / (long)bytes, buffers[near].name, buffers[near].high - buffers[near].low);
  }
  bool private_memory = is_inside(address, stacks(), STACK_STRIDE * EMU_MAX_THREADS);
  fail(EMU_WILD_POINTER, 0, access.pc, NO_BUFFER, "wild pointer: %s of %lu bytes of %s", verb(access), bytes,
       private_memory ? "another thread's private memory" : "memory that this kernel does not have");
}

static inline void access(emu_u64 address, emu_u64 bytes, const Access& how) {
  if (!machine.running || !bytes) return;
  if (machine.mode == EMU_CHECK) settle_same_value();
  if (is_inside(address, machine.stack, STACK_BYTES)) {
    counters().private_accesses++;
    return;
  }
  if (is_inside(address, &machine, sizeof machine)) return;  // attributes and exchanged values
  emu_u64 offset = address - (emu_u64)arena.memory;
  if (offset < ARENA_BYTES + ARENA_GUARD) {
    access_arena(offset, bytes, how);
    return;
  }
  emu_u32 buffer = find_buffer(address);
  if (buffer != NO_BUFFER)
    access_buffer(buffer, address, bytes, how);
  else
    access_elsewhere(address, bytes, how);
}

}  // namespace emu

using namespace emu;

#define CALLER caller(__builtin_return_address(0))
#define HOOKS(bytes)                                               \
  EMU_EXTERN void __asan_load##bytes##_noabort(emu_u64 address) {  \
    access(address, bytes, {true, false, false, CALLER});          \
  }                                                                \
  EMU_EXTERN void __asan_store##bytes##_noabort(emu_u64 address) { \
    access(address, bytes, {false, true, false, CALLER});          \
  }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)

EMU_EXTERN void __asan_loadN_noabort(emu_u64 address, emu_u64 bytes) {
  access(address, bytes, {true, false, false, CALLER});
}
EMU_EXTERN void __asan_storeN_noabort(emu_u64 address, emu_u64 bytes) {
  access(address, bytes, {false, true, false, CALLER});
}
EMU_EXTERN void __asan_handle_no_return() {}

EMU_EXTERN void* __asan_memcpy(void* to, const void* from, emu_u64 bytes) {
  access((emu_u64)from, bytes, {true, false, false, CALLER});
  access((emu_u64)to, bytes, {false, true, false, CALLER});
  return memcpy(to, from, bytes);
}
EMU_EXTERN void* __asan_memmove(void* to, const void* from, emu_u64 bytes) {
  access((emu_u64)from, bytes, {true, false, false, CALLER});
  access((emu_u64)to, bytes, {false, true, false, CALLER});
  return memmove(to, from, bytes);
}
EMU_EXTERN void* __asan_memset(void* to, int value, emu_u64 bytes) {
  access((emu_u64)to, bytes, {false, true, false, CALLER});
  return memset(to, value, bytes);
}

void emu_atomic(emu_u64 address, emu_u32 bytes, emu_u32 kind) {
  counters().atomics++;
  if (machine.mode == EMU_FAST) return;
  access(address, bytes, {kind != EMU_ATOMIC_STORE, kind != EMU_ATOMIC_LOAD, true, CALLER});
}
