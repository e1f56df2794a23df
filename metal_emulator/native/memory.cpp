#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>

namespace emu {

BufferSlots buffer_slots;
Buffer buffers[EMU_MAX_BUFFERS];
emu_u32 num_buffers;
Arena arena;

// A slot's buffer ends at a fixed place, so that memory which was used once is used again whatever the next size is.
struct Slot {
  emu_u64 accessible;  // bytes before the end that may be touched
  emu_u64 kept;        // bytes before the end that have been touched and hold memory
};
static Slot slots[EMU_MAX_BUFFERS];
static constexpr emu_u64 TAIL = 64 * 1024;
static constexpr emu_u64 LARGE = 64ul << 20;  // more than this is given back when a smaller buffer takes the slot

static emu_u64 page_bytes() {
  static const emu_u64 bytes = (emu_u64)sysconf(_SC_PAGESIZE);
  return bytes;
}
static emu_u64 round_up(emu_u64 n, emu_u64 unit) { return (n + unit - 1) / unit * unit; }

static bool reserve_slots() {
  if (buffer_slots.base) return true;
  for (emu_u32 shift = 33; shift >= 28; shift--) {
    void* memory = mmap(nullptr, (emu_u64)EMU_MAX_BUFFERS << shift, PROT_NONE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) continue;
    buffer_slots.base = (emu_u64)memory;
    buffer_slots.shift = shift;
    return true;
  }
  return false;
}

static emu_u64 slot_end(emu_u32 index) {
  return buffer_slots.base + ((emu_u64)(index + 1) << buffer_slots.shift) - TAIL;
}

static bool open_pages(emu_u32 index, emu_u64 bytes) {
  Slot& slot = slots[index];
  emu_u64 end = slot_end(index);
  if (bytes > slot.accessible) {
    if (mprotect((void*)(end - bytes), bytes - slot.accessible, PROT_READ | PROT_WRITE)) return false;
  } else if (bytes < slot.accessible) {
    mprotect((void*)(end - slot.accessible), slot.accessible - bytes, PROT_NONE);
    if (slot.kept > bytes + LARGE) {
      madvise((void*)(end - slot.kept), slot.kept - bytes, MADV_DONTNEED);
      slot.kept = bytes;
    }
  }
  slot.accessible = bytes;
  if (slot.kept < bytes) slot.kept = bytes;
  return true;
}

static bool is_placed(emu_u32 index, emu_u64 address) {
  return buffer_slots.base && (address - buffer_slots.base) >> buffer_slots.shift == index;
}

// Inputs that lie beside each other hide an index that leaves one for the other: check mode moves them apart.
static emu_u64 move_apart(emu_u32 index, const emu_buffer& from) {
  if (is_placed(index, from.address) || from.flags & EMU_WRITABLE || !from.bytes) return from.address;
  void* memory = emu_place(index, from.bytes);
  return memory ? (emu_u64)memcpy(memory, (void*)from.address, from.bytes) : from.address;
}

void bind_buffers(const emu_launch& launch) {
  num_buffers = launch.num_buffers;
  for (emu_u32 i = 0; i < num_buffers; i++) {
    const emu_buffer& from = launch.buffers[i];
    emu_u64 address = launch.mode == EMU_CHECK ? move_apart(i, from) : from.address;
    buffers[i] = {address, address + from.bytes, from.name, from.flags};
    if (from.flags & EMU_POISON) memset((void*)address, 0xFF, from.bytes);
    // What lies between a placed buffer's end and its guard page must not look like data.
    if (is_placed(i, address)) memset((void*)buffers[i].high, 0xFF, slot_end(i) - buffers[i].high);
  }
}

emu_u32 nearest_buffer(emu_u64 address) {
  emu_u64 limit = buffer_slots.base ? 1ul << buffer_slots.shift : 1ul << 28;
  emu_u32 nearest = NO_BUFFER;
  for (emu_u32 i = 0; i < num_buffers; i++) {
    if (buffers[i].low == buffers[i].high) continue;
    emu_u64 distance = address >= buffers[i].high ? address - buffers[i].high : buffers[i].low - address;
    if (distance >= limit) continue;
    limit = distance;
    nearest = i;
  }
  return nearest;
}

bool prepare_arena() {
  if (arena.memory) return true;
  void* memory = mmap(nullptr, ARENA_BYTES + 2 * ARENA_GUARD, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return false;
  arena.memory = (char*)memory + ARENA_GUARD;
  return mprotect(arena.memory, ARENA_BYTES, PROT_READ | PROT_WRITE) == 0;
}

void forget_variables() {
  arena.used = arena.bytes = arena.num_variables = 0;
  memset(arena.variable_at, 0, sizeof arena.variable_at);
}

void poison_arena() { memset(arena.memory, 0xFF, arena.used); }

}  // namespace emu

using namespace emu;

void* emu_place(emu_u32 index, emu_u64 bytes) {
  if (index >= EMU_MAX_BUFFERS || !reserve_slots()) return nullptr;
  emu_u64 pages = round_up(bytes ? bytes : 1, page_bytes());
  if (pages + 2 * TAIL > 1ul << buffer_slots.shift) return nullptr;
  if (!open_pages(index, pages)) return nullptr;
  return (void*)(slot_end(index) - round_up(bytes, 16));
}

void emu_release(void) {
  for (emu_u32 i = 0; i < EMU_MAX_BUFFERS && buffer_slots.base; i++) {
    if (!slots[i].kept) continue;
    emu_u64 end = slot_end(i);
    mprotect((void*)(end - slots[i].kept), slots[i].kept, PROT_NONE);
    madvise((void*)(end - slots[i].kept), slots[i].kept, MADV_DONTNEED);
    slots[i] = {};
  }
}

static const Variable* add_variable(emu_u32 id, emu_u32 bytes, emu_u32 alignment, emu_site site, emu_u64 pc) {
  bool check = machine.mode == EMU_CHECK;
  emu_u32 unit = check ? GRANULE : alignment < 16 ? 16 : alignment;
  emu_u32 offset = (emu_u32)round_up(arena.used + (check && arena.used ? GRANULE * 8 : 0), unit);
  arena.bytes = (emu_u32)round_up(arena.bytes, alignment < 16 ? 16 : alignment) + bytes;
  if (arena.bytes > EMU_THREADGROUP_BYTES)
    fail(EMU_THREADGROUP_MEMORY, site, pc, NO_BUFFER, "threadgroup memory of %u bytes: at most %u are there",
         arena.bytes, (emu_u32)EMU_THREADGROUP_BYTES);
  if (arena.num_variables == MAX_VARIABLES)
    fail(EMU_THREADGROUP_MEMORY, site, pc, NO_BUFFER, "more than %u threadgroup variables", MAX_VARIABLES);
  memset(arena.memory + arena.used, 0xFF, offset + bytes - arena.used);
  arena.used = offset + bytes;
  if (counters().threadgroup_bytes < arena.bytes) counters().threadgroup_bytes = arena.bytes;
  emu_u32 index = arena.num_variables++;
  if (check) memset(arena.variable_at + offset / GRANULE, (int)index + 1, (bytes + GRANULE - 1) / GRANULE);
  arena.variables[index] = {id, bytes, offset, site};
  return &arena.variables[index];
}

void* emu_threadgroup(emu_u32 id, emu_u32 bytes, emu_u32 alignment, emu_site site) {
  const Variable* variable = nullptr;
  for (emu_u32 i = 0; i < arena.num_variables; i++)
    if (arena.variables[i].id == id && arena.variables[i].bytes == bytes) variable = &arena.variables[i];
  if (!variable) variable = add_variable(id, bytes, alignment, site, caller(__builtin_return_address(0)));
  return arena.memory + variable->offset;
}
