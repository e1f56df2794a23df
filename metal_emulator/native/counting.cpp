#include "counting.h"

#include <algorithm>
#include <cstring>
#include <unordered_map>
#include <vector>

#include "memory.h"

namespace emu {

enum Kind : emu_u32 { DEVICE_READ, DEVICE_WRITE, THREADGROUP_READ, THREADGROUP_WRITE };
constexpr emu_u32 LINE_SHIFT = 7;              // 128 bytes
constexpr emu_u64 MERGE_BYTES = 16;            // the widest access of a lane
constexpr emu_u64 MERGE_DISTANCE = 64;         // how far on in a lane's log a mergeable access is looked for
constexpr emu_u32 BANKS = 32, BANK_SHIFT = 2;  // modelled: a word of 4 bytes from each bank in a cycle

struct LoggedAccess {
  LoggedAccess(emu_u64 offset, emu_u64 what) : offset(offset), what(what) {}
  emu_u64 offset;  // in its buffer, or in the arena
  emu_u64 what;    // equal for two lanes that do the same: 32 bits pc, 16 bytes, 8 kind, 8 buffer
  emu_u32 pc() const { return (emu_u32)what; }
  emu_u32 bytes() const { return what >> 32 & 0xFFFF; }
  emu_u32 kind() const { return what >> 48 & 0xFF; }
  emu_u32 buffer() const { return (emu_u32)(what >> 56); }
};
typedef std::vector<LoggedAccess> Log;

static Log logs[EMU_MAX_THREADS];
static std::vector<emu_u32> last_group[EMU_MAX_BUFFERS][2];  // by line: 1 + the threadgroup that touched it last
static std::unordered_map<emu_u64, emu_instruction> instructions;
static emu_instruction* known_instructions[1024];  // by pc: entries of `instructions` that were looked up before

void begin_launch_counts() {
  instructions.clear();
  memset(known_instructions, 0, sizeof known_instructions);
  for (Log& log : logs) log.clear();
  for (emu_u32 i = 0; i < num_buffers; i++)
    for (auto& lines : last_group[i]) lines.assign(((buffers[i].high - buffers[i].low) >> LINE_SHIFT) + 1, 0);
}

static void log_access(Kind kind, emu_u32 buffer, emu_u64 offset, emu_u64 bytes, emu_u64 pc) {
  Log& log = logs[machine.thread];
  emu_u64 what = (emu_u32)pc | (emu_u64)kind << 48 | (emu_u64)buffer << 56;
  for (; bytes > 0xFFFF; bytes -= 0xFFFF, offset += 0xFFFF) log.emplace_back(offset, what | 0xFFFFul << 32);
  log.emplace_back(offset, what | bytes << 32);
}

void count_device(emu_u32 buffer, emu_u64 offset, emu_u64 bytes, bool write, emu_u64 pc) {
  log_access(write ? DEVICE_WRITE : DEVICE_READ, buffer, offset, bytes, pc);
}

void count_threadgroup(emu_u64 offset, emu_u64 bytes, bool write, emu_u64 pc) {
  log_access(write ? THREADGROUP_WRITE : THREADGROUP_READ, 0, offset, bytes, pc);
}

// Which units of 2^shift bytes the lanes touch together, in order. Valid until the next call.
template <class Offset, class Bytes>
static const std::vector<emu_u64>& distinct_units(emu_u32 lanes, emu_u32 shift, Offset offset, Bytes bytes) {
  static std::vector<emu_u64> units;
  units.clear();
  for (emu_u32 i = 0; i < lanes; i++)
    for (emu_u64 unit = offset(i) >> shift; unit <= (offset(i) + bytes(i) - 1) >> shift; unit++)
      if (units.empty() || units.back() != unit) units.push_back(unit);
  if (!std::is_sorted(units.begin(), units.end())) std::sort(units.begin(), units.end());
  units.erase(std::unique(units.begin(), units.end()), units.end());
  return units;
}

static void count_banks(const LoggedAccess* const* lanes, emu_u32 count) {
  emu_u32 words_of_bank[BANKS] = {}, most = 0;
  const auto& words = distinct_units(
      count, BANK_SHIFT, [&](emu_u32 i) { return lanes[i]->offset; }, [&](emu_u32 i) { return lanes[i]->bytes(); });
  for (emu_u64 word : words) most = std::max(most, ++words_of_bank[word % BANKS]);
  counters().bank_cycles += most;
}

static emu_instruction& find_instruction(const LoggedAccess& access) {
  emu_instruction*& known = known_instructions[access.pc() % 1024];
  if (!known || known->pc != access.pc() || known->kind != access.kind()) {
    known = &instructions[(emu_u64)access.pc() * 4 + access.kind()];
    known->pc = access.pc();
    known->kind = access.kind();
    known->buffer = access.kind() >= THREADGROUP_READ ? NO_BUFFER : access.buffer();
  }
  return *known;
}

// The lines that an instruction touches, noted once for the launch and once for the threadgroup. Returns how many.
static emu_u32 count_lines(const LoggedAccess* const* lanes, emu_u32 count, bool write) {
  constexpr emu_u32 BUFFER_SHIFT = 40;  // the lanes may address different buffers: then their lines differ too
  constexpr emu_u32 LINE_BITS = BUFFER_SHIFT - LINE_SHIFT;
  const auto& lines = distinct_units(
      count, LINE_SHIFT,
      [&](emu_u32 i) { return lanes[i]->offset + ((emu_u64)lanes[i]->buffer() << BUFFER_SHIFT); },
      [&](emu_u32 i) { return lanes[i]->bytes(); });
  emu_u32 group = (emu_u32)machine.group_index + 1;
  for (emu_u64 line : lines) {
    emu_u32 buffer = (emu_u32)(line >> LINE_BITS);
    emu_u32& last = last_group[buffer][write][line & ((1ul << LINE_BITS) - 1)];
    machine.result->buffers[buffer].unique_lines[write] += last == 0;
    machine.result->buffers[buffer].group_lines[write] += last != group;
    last = group;
  }
  return (emu_u32)lines.size();
}

static void count_instruction(const LoggedAccess* const* lanes, emu_u32 count) {
  const LoggedAccess& first = *lanes[0];
  emu_counters& all = counters();
  all.memory_instructions++;
  all.active_lanes += count;
  emu_u64 bytes = 0;
  bool write = first.kind() & 1, device = first.kind() < THREADGROUP_READ;
  for (emu_u32 i = 0; i < count; i++) {
    bytes += lanes[i]->bytes();
    if (device) machine.result->buffers[lanes[i]->buffer()].bytes_asked[write] += lanes[i]->bytes();
  }
  emu_instruction& entry = find_instruction(first);
  entry.executions++;
  entry.bytes += bytes;
  entry.lanes += count;
  if (!device) {
    (write ? all.threadgroup_stores : all.threadgroup_loads)++;
    (write ? all.threadgroup_store_bytes : all.threadgroup_load_bytes) += bytes;
    count_banks(lanes, count);
    return;
  }
  emu_u32 lines = count_lines(lanes, count, write);
  entry.lines += lines;
  emu_buffer_counters& of = machine.result->buffers[first.buffer()];
  of.instructions[write]++;
  of.lines[write] += lines;
}

static bool follows(const Log* lanes, emu_u32 count, size_t first, size_t next, emu_u64 bytes) {
  for (emu_u32 i = 0; i < count; i++)
    if (lanes[i][next].offset != lanes[i][first].offset + bytes) return false;
  return true;
}

// The accesses that a vectorising compiler could have made of these: neighbours of one lane joined, up to 16 bytes.
static void count_merged(const Log* lanes, emu_u32 count, size_t length) {
  static std::vector<char> joined;
  joined.assign(length, 0);
  for (size_t k = 0; k < length; k++) {
    const LoggedAccess& first = lanes[0][k];
    if (joined[k] || first.kind() >= THREADGROUP_READ) continue;
    emu_u64 bytes = first.bytes();
    for (size_t next = k + 1; next < length && next < k + MERGE_DISTANCE && bytes < MERGE_BYTES; next++) {
      const LoggedAccess& other = lanes[0][next];
      if (joined[next] || other.kind() != first.kind() || other.buffer() != first.buffer()) continue;
      if (bytes + other.bytes() > MERGE_BYTES || !follows(lanes, count, k, next, bytes)) continue;
      joined[next] = 1;
      bytes += other.bytes();
    }
    const auto& lines = distinct_units(
        count, LINE_SHIFT, [&](emu_u32 i) { return lanes[i][k].offset; }, [&](emu_u32) { return bytes; });
    emu_buffer_counters& of = machine.result->buffers[first.buffer()];
    of.merged_instructions[first.kind()]++;
    of.merged_lines[first.kind()] += lines.size();
  }
}

static bool run_alike(const Log* lanes, emu_u32 count) {
  for (emu_u32 i = 1; i < count; i++) {
    if (lanes[i].size() != lanes[0].size()) return false;
    for (size_t k = 0; k < lanes[0].size(); k++)
      if (lanes[i][k].what != lanes[0][k].what) return false;
  }
  return true;
}

// Lanes took different ways: an access is matched with the accesses of other lanes at the same place, of the same
// turn.
static void flush_divergent(const Log* lanes, emu_u32 count) {
  struct Turn {
    emu_u64 pc;
    emu_u32 turn;
    const LoggedAccess* access;
  };
  std::vector<Turn> turns;
  std::unordered_map<emu_u64, emu_u32> seen;
  for (emu_u32 i = 0; i < count; i++) {
    seen.clear();
    for (const LoggedAccess& access : lanes[i]) turns.push_back({access.pc(), seen[access.pc()]++, &access});
  }
  std::stable_sort(turns.begin(), turns.end(), [](const Turn& a, const Turn& b) {
    return a.pc != b.pc ? a.pc < b.pc : a.turn < b.turn;
  });
  const LoggedAccess* together[EMU_LANES];
  for (size_t i = 0; i < turns.size();) {
    emu_u32 n = 0;
    size_t begin = i;
    for (; i < turns.size() && turns[i].pc == turns[begin].pc && turns[i].turn == turns[begin].turn; i++)
      together[n++] = turns[i].access;
    emu_buffer_counters& of = machine.result->buffers[together[0]->buffer()];
    bool device = together[0]->kind() < THREADGROUP_READ, write = together[0]->kind() & 1;
    emu_u64 before = of.lines[write];
    count_instruction(together, n);
    if (!device) continue;
    of.merged_instructions[write]++;
    of.merged_lines[write] += of.lines[write] - before;
  }
}

void flush_accesses(emu_u32 first, emu_u32 lanes) {
  Log* of = logs + first;
  if (run_alike(of, lanes)) {
    const LoggedAccess* together[EMU_LANES];
    for (size_t k = 0; k < of[0].size(); k++) {
      for (emu_u32 i = 0; i < lanes; i++) together[i] = &of[i][k];
      count_instruction(together, lanes);
    }
    count_merged(of, lanes, of[0].size());
  } else {
    flush_divergent(of, lanes);
  }
  for (emu_u32 i = 0; i < lanes; i++) of[i].clear();
}

}  // namespace emu

emu_u64 emu_instructions(emu_instruction* out, emu_u64 capacity) {
  emu_u64 i = 0;
  for (const auto& entry : emu::instructions) {
    if (i == capacity) break;
    out[i++] = entry.second;
  }
  return emu::instructions.size();
}
