// Where the memory of a launch lies: buffers in fixed slots of one large reservation (so that an address tells its
// buffer, however far out of bounds it is), threadgroup variables in one arena. It knows nothing of who accesses what.
#pragma once
#include "machine.h"

namespace emu {

// ---- buffers

struct Buffer {
  emu_u64 low, high;  // [low, high)
  const char* name;
  emu_u32 flags;
};

struct BufferSlots {
  emu_u64 base;   // of the reservation
  emu_u32 shift;  // log2 of a slot's bytes
};

extern BufferSlots buffer_slots;
extern Buffer buffers[EMU_MAX_BUFFERS];
extern emu_u32 num_buffers;

void bind_buffers(const emu_launch& launch);

// The buffer that holds `address`, or NO_BUFFER.
inline emu_u32 find_buffer(emu_u64 address) {
  auto holds = [&](emu_u64 i) {
    return i < num_buffers && address - buffers[i].low < buffers[i].high - buffers[i].low;
  };
  emu_u64 slot = (address - buffer_slots.base) >> buffer_slots.shift;
  if (holds(slot)) return (emu_u32)slot;
  static emu_u32 known[64];  // by page: of the buffers that were not placed in a slot
  emu_u32& guess = known[address >> 12 & 63];
  if (holds(guess)) return guess;
  for (emu_u32 i = 0; i < num_buffers; i++)
    if (holds(i)) return guess = i;
  return NO_BUFFER;
}

// The buffer that an address outside all buffers most likely belongs to, or NO_BUFFER when it is nowhere near one.
emu_u32 nearest_buffer(emu_u64 address);

// ---- threadgroup memory

struct Variable {
  emu_u32 id, bytes, offset;  // offset in the arena
  emu_site site;
};

constexpr emu_u32 ARENA_BYTES = 256 * 1024;  // with the gaps that check mode leaves between variables
constexpr emu_u32 ARENA_GUARD = 64 * 1024;
constexpr emu_u32 MAX_VARIABLES = 64;
constexpr emu_u32 GRANULE = 64;  // a variable's alignment in check mode

struct Arena {
  char* memory;
  emu_u32 used;   // of the arena
  emu_u32 bytes;  // of all variables
  emu_u32 num_variables;
  Variable variables[MAX_VARIABLES];
  unsigned char variable_at[ARENA_BYTES / GRANULE];  // check mode: index + 1
};

extern Arena arena;

bool prepare_arena();
void forget_variables();
void poison_arena();

}  // namespace emu
