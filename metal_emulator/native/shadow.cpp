#include "shadow.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstring>
#include <vector>

namespace emu {

static Epochs device_epochs, threadgroup_epochs;
static Shadow arena_shadow;
static Shadow buffer_shadows[EMU_MAX_BUFFERS];

// The first epoch of each threadgroup of this launch, to name the group of a stamp.
struct GroupStart {
  emu_u32 epoch;
  emu_u32 position[3];
};
static std::vector<GroupStart> group_starts;

bool same_value_open;
struct SameValue {
  emu_u64 address, bytes;
  unsigned char before[64];
  emu_u64 pc;
  emu_u32 buffer;
  char text[300];
};
static SameValue same_value;

static bool allocate(Shadow& shadow, emu_u64 bytes) {
  if (shadow.capacity >= bytes) return true;
  if (shadow.writer) munmap(shadow.writer, shadow.capacity * 3 * sizeof(Stamp));
  void* memory = mmap(nullptr, bytes * 3 * sizeof(Stamp), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  shadow = {};
  if (memory == MAP_FAILED) return false;
  shadow.writer = (Stamp*)memory;
  shadow.reader = shadow.writer + bytes;
  shadow.other_reader = shadow.reader + bytes;
  shadow.capacity = bytes;
  return true;
}

static void drop(Shadow& shadow) {
  if (shadow.writer) munmap(shadow.writer, shadow.capacity * 3 * sizeof(Stamp));
  shadow = {};
}

void begin_launch_shadows() {
  if (device_epochs.current > 1u << 31 || threadgroup_epochs.current > 1u << 31) {
    drop(arena_shadow);
    for (Shadow& shadow : buffer_shadows) drop(shadow);
    device_epochs.current = threadgroup_epochs.current = 0;
  }
  device_epochs.launch = device_epochs.current + 1;
  group_starts.clear();
  same_value_open = false;
  bool enough = allocate(arena_shadow, ARENA_BYTES);
  for (emu_u32 i = 0; i < num_buffers; i++)
    if (buffers[i].flags & EMU_WRITABLE)
      enough = enough && allocate(buffer_shadows[i], buffers[i].high - buffers[i].low);
  if (!enough)
    report(EMU_BAD_LAUNCH, 0, 0, NO_BUFFER, false, "no memory for the checks: outputs need 24 bytes a byte");
}

void begin_threadgroup_shadows() {
  device_epochs.threadgroup = ++device_epochs.current;
  // Threadgroup memory is new in every group: what another group did there never was.
  threadgroup_epochs.launch = threadgroup_epochs.threadgroup = ++threadgroup_epochs.current;
  GroupStart start = {device_epochs.current, {}};
  memcpy(start.position, machine.group.threadgroup_position_in_grid, sizeof start.position);
  group_starts.push_back(start);
}

void order_memory(emu_u32 memory_flags) {
  if (memory_flags & EMU_MEM_THREADGROUP) threadgroup_epochs.current++;
  if (memory_flags & EMU_MEM_DEVICE) device_epochs.current++;
}

emu_u64 count_unwritten(emu_u32 buffer) {
  emu_u64 unwritten = 0, bytes = buffers[buffer].high - buffers[buffer].low;
  const Stamp* writer = buffer_shadows[buffer].writer;
  for (emu_u64 i = 0; i < bytes; i++) unwritten += epoch_of(writer[i]) < device_epochs.launch;
  return unwritten;
}

static Stamp own_stamp(const Epochs& epochs, emu_u32 simdgroup_barriers, bool atomic) {
  return (Stamp)epochs.current << 32 | (Stamp)(simdgroup_barriers & 0xFFFFF) << 12 | (Stamp)atomic << 11 |
         machine.thread;
}

// Whether an earlier access is ordered before `own` by nothing.
static bool unordered(Stamp earlier, Stamp own, const Epochs& epochs) {
  emu_u32 epoch = epoch_of(earlier);
  if (epoch < epochs.launch) return false;
  if (is_atomic(earlier) && is_atomic(own)) return false;
  if (epoch < epochs.threadgroup) return true;  // another threadgroup: no barrier orders the two
  if (epoch < epochs.current || thread_of(earlier) == thread_of(own)) return false;
  if (thread_of(earlier) / EMU_LANES != thread_of(own) / EMU_LANES) return true;
  return (earlier ^ own) >> 12 == 0;
}

// Two readers are enough if they differ in simdgroup where any do: a writer differs from one of them.
static void note_reader(Shadow& shadow, emu_u64 i, Stamp own, const Epochs& epochs) {
  Stamp& first = shadow.reader[i];
  Stamp& second = shadow.other_reader[i];
  auto old = [&](Stamp stamp) { return epoch_of(stamp) < epochs.launch; };
  auto same_group = [&](Stamp a, Stamp b) {
    if (epoch_of(a) < epochs.threadgroup || epoch_of(b) < epochs.threadgroup)
      return epoch_of(a) < epochs.threadgroup && epoch_of(b) < epochs.threadgroup;
    return thread_of(a) / EMU_LANES == thread_of(b) / EMU_LANES;
  };
  if (old(first) || (thread_of(first) == thread_of(own) && epoch_of(first) >= epochs.threadgroup)) {
    first = own;
  } else if (old(second) || same_group(second, own)) {
    second = own;
  } else if (same_group(first, own)) {
    first = own;
  } else if (same_group(first, second)) {
    second = own;
  }
}

static const emu_u32* group_of(Stamp stamp) {
  emu_u64 low = 0, high = group_starts.size();
  while (high - low > 1) {
    emu_u64 middle = (low + high) / 2;
    (group_starts[middle].epoch <= epoch_of(stamp) ? low : high) = middle;
  }
  return group_starts[low].position;
}

struct Conflict {
  Stamp earlier;
  bool earlier_wrote;
};

static const char* words(bool write, bool atomic) { return atomic ? "atomic access" : write ? "write" : "read"; }
static const char* words(const Access& access) { return words(access.write, access.atomic); }

static bool conflicts(const Shadow& shadow, emu_u64 i, Stamp own, bool write, const Epochs& epochs,
                      Conflict& conflict) {
  if (unordered(shadow.writer[i], own, epochs)) {
    conflict = {shadow.writer[i], true};
    return true;
  }
  if (!write) return false;
  for (Stamp earlier : {shadow.reader[i], shadow.other_reader[i]})
    if (unordered(earlier, own, epochs)) {
      conflict = {earlier, false};
      return true;
    }
  return false;
}

// A thread's atomic access after its plain one: the plain one is what other threads may race with.
static bool hides_plain_write(Stamp writer, Stamp own, const Epochs& epochs) {
  return is_atomic(own) && !is_atomic(writer) && epoch_of(writer) == epochs.current &&
         thread_of(writer) == thread_of(own);
}

static void note(Shadow& shadow, emu_u64 i, Stamp own, bool write, const Epochs& epochs) {
  if (!write) {
    if (shadow.reader[i] != own) note_reader(shadow, i, own, epochs);
  } else if (!hides_plain_write(shadow.writer[i], own, epochs)) {
    shadow.writer[i] = own;
  }
}

void shadow_threadgroup(emu_u64 offset, emu_u64 bytes, const Access& access, const Variable& variable) {
  const Epochs& epochs = threadgroup_epochs;
  Stamp own = own_stamp(epochs, machine.simdgroup->threadgroup_barriers, access.atomic);
  Conflict conflict;
  emu_u64 index = (offset - variable.offset) / bytes;
  for (emu_u64 i = offset; i < offset + bytes; i++) {
    if (access.read && epoch_of(arena_shadow.writer[i]) < epochs.threadgroup)
      fail(EMU_UNINITIALISED, 0, access.pc, NO_BUFFER,
           "%s of uninitialised threadgroup memory: %lu bytes at index %lu of the variable of %u bytes in line %u",
           words(access), bytes, index, variable.bytes, line_of(variable.site));
    if (conflicts(arena_shadow, i, own, access.write, epochs, conflict))
      fail(EMU_THREADGROUP_RACE, 0, access.pc, NO_BUFFER,
           "threadgroup data race: %s of %lu bytes at index %lu of the variable in line %u, after a %s by thread %u of "
           "the threadgroup, with no barrier between",
           words(access), bytes, index, line_of(variable.site),
           words(conflict.earlier_wrote, is_atomic(conflict.earlier)), thread_of(conflict.earlier));
    note(arena_shadow, i, own, access.write, epochs);
  }
}

static void describe_device_race(char* text, emu_u64 room, emu_u32 buffer, emu_u64 offset, emu_u64 bytes,
                                 const Access& access, const Conflict& conflict) {
  const emu_u32* group = group_of(conflict.earlier);
  bool elsewhere = epoch_of(conflict.earlier) < device_epochs.threadgroup;
  snprintf(text, room,
           "device data race: %s of %lu bytes at byte %lu (index %lu) of %s, after a %s by thread %u of threadgroup "
           "(%u, %u, %u), %s",
           words(access), bytes, offset, offset / bytes, buffers[buffer].name,
           words(conflict.earlier_wrote, is_atomic(conflict.earlier)), thread_of(conflict.earlier), group[0], group[1],
           group[2], elsewhere ? "which nothing orders" : "with no barrier between");
}

static void await_same_value(emu_u32 buffer, emu_u64 offset, emu_u64 bytes, const Access& access,
                             const Conflict& conflict) {
  same_value_open = true;
  same_value.address = buffers[buffer].low + offset;
  same_value.bytes = bytes < sizeof same_value.before ? bytes : sizeof same_value.before;
  memcpy(same_value.before, (void*)same_value.address, same_value.bytes);
  same_value.pc = access.pc;
  same_value.buffer = buffer;
  describe_device_race(same_value.text, sizeof same_value.text, buffer, offset, bytes, access, conflict);
}

void close_same_value() {
  same_value_open = false;
  if (memcmp(same_value.before, (void*)same_value.address, same_value.bytes))
    fail(EMU_DEVICE_RACE, 0, same_value.pc, same_value.buffer, "%s (and the values differ)", same_value.text);
}

void shadow_buffer(emu_u32 buffer, emu_u64 offset, emu_u64 bytes, const Access& access) {
  const Epochs& epochs = device_epochs;
  Shadow& shadow = buffer_shadows[buffer];
  Stamp own = own_stamp(epochs, machine.simdgroup->device_barriers, access.atomic);
  Conflict conflict;
  bool awaited = false;
  for (emu_u64 i = offset; i < offset + bytes; i++) {
    if (!awaited && conflicts(shadow, i, own, access.write, epochs, conflict)) {
      if (access.write && !access.atomic && conflict.earlier_wrote && machine.launch->same_value_ok) {
        await_same_value(buffer, offset, bytes, access, conflict);
        awaited = true;
      } else {
        char text[300];
        describe_device_race(text, sizeof text, buffer, offset, bytes, access, conflict);
        fail(EMU_DEVICE_RACE, 0, access.pc, buffer, "%s", text);
      }
    }
    note(shadow, i, own, access.write, epochs);
  }
}

}  // namespace emu
