// What the three sides of the emulator agree on: the runtime (C++, built by the system's compiler), a kernel (Metal,
// compiled as C++ for OpenCL) and the Python side (ctypes). Plain C types only; every size is asserted, because `long
// long` has 128 bits in OpenCL. It knows nothing of MLX. Changing a struct needs a new EMU_INTERFACE.
#ifndef EMU_INTERFACE_H
#define EMU_INTERFACE_H

#define EMU_INTERFACE 1

#ifdef __OPENCL_CPP_VERSION__
#define EMU_PRIVATE __private
#define EMU_SHARED __local
#define EMU_EXTERN extern "C"
#else
#define EMU_PRIVATE
#define EMU_SHARED
#define EMU_EXTERN extern "C" __attribute__((visibility("default")))
#endif

typedef unsigned int emu_u32;
typedef unsigned long emu_u64;

enum {
  EMU_LANES = 32,                    // lanes of a simdgroup
  EMU_MAX_THREADS = 1024,            // threads of a threadgroup
  EMU_MAX_BUFFERS = 32,              // [[buffer(0)]] to [[buffer(31)]]
  EMU_THREADGROUP_BYTES = 32 * 1024  // threadgroup memory of one threadgroup
};

// ---- what a thread can ask of its launch --------------------------------------------------------------------------
// Attributes have Metal's names. Those that differ from thread to thread are fields of emu_thread, the others of
// emu_group.

typedef struct emu_group {
  emu_u64 buffer[EMU_MAX_BUFFERS];  // addresses, by [[buffer(n)]]
  emu_u32 threadgroup_position_in_grid[3];
  emu_u32 threads_per_grid[3];
  emu_u32 threadgroups_per_grid[3];
  emu_u32 threads_per_threadgroup[3];           // of this group: smaller at a ragged end of the grid
  emu_u32 dispatch_threads_per_threadgroup[3];  // as launched
  emu_u32 grid_origin[3];
  emu_u32 grid_size[3];
  emu_u32 simdgroups_per_threadgroup, dispatch_simdgroups_per_threadgroup;
  emu_u32 threads_per_simdgroup, thread_execution_width;
  emu_u32 quadgroups_per_threadgroup, dispatch_quadgroups_per_threadgroup;
  emu_u32 reserved;
} emu_group;

typedef struct emu_thread {
  const EMU_PRIVATE emu_group* group;
  emu_u32 thread_position_in_grid[3];
  emu_u32 thread_position_in_threadgroup[3];
  emu_u32 thread_index_in_threadgroup;
  emu_u32 thread_index_in_simdgroup, simdgroup_index_in_threadgroup;
  emu_u32 thread_index_in_quadgroup, quadgroup_index_in_threadgroup;
  emu_u32 reserved;
} emu_thread;

// A kernel library exports exactly one function, which the Python side generates:
//   extern "C" void emu_entry(thread emu_thread* t) { NAME<template arguments>(arguments); }
// with arguments `(device float*)t->group->buffer[2]`, `emu_attribute<uint3>(t->thread_position_in_grid)`,
// `emu_attribute<uint>(&t->thread_index_in_simdgroup)`.
// Other names of the shim that the rewritten source may use (include/types.h, threadgroup.h):
//   emu_vector<vec<float, 4>>(a, b)   for vec<float, 4>(a, b); the named types (float4(...), bool4(...)) are macros
//   emu_cast<T>(x)                    for static_cast<T>(x)
//   threadgroup void* emu_threadgroup(unsigned id, unsigned bytes, unsigned alignment, emu_site)
//                                     a threadgroup variable: the same id and size give the same memory to every
//                                     thread of the group
//   EMU_SITE(line, column)            a place in the source

// ---- values that the lanes of a simdgroup exchange ----------------------------------------------------------------

typedef struct __attribute__((aligned(64))) emu_slots {
  unsigned char value[EMU_LANES][32];  // what each lane brought
  unsigned char result[32];            // a reduction's result, once a lane has computed it
  emu_u32 active;                      // bit i: lane i takes part
  emu_u32 reduced;                     // result is valid
  emu_u32 distant_first;               // the order in which to reduce, see emu_launch.order
  emu_u32 reserved[5];
} emu_slots;

typedef emu_u32 emu_site;  // line << 11 | column of an operation: tells two operations apart
#define EMU_SITE(line, column) (((emu_site)(line) << 11) | ((emu_site)(column) & 2047u))

enum emu_operation {
  EMU_SIMD = 1,
  EMU_QUAD = 2,
  EMU_MATRIX_MULTIPLY = 3,
  EMU_MATRIX_MEMORY = 4,  // simdgroup_load, simdgroup_store
  EMU_SIMDGROUP_BARRIER = 5,
  EMU_THREADGROUP_BARRIER = 6
};

enum emu_memory_flags { EMU_MEM_NONE = 0, EMU_MEM_DEVICE = 1, EMU_MEM_THREADGROUP = 2 };
enum emu_atomic_kind { EMU_ATOMIC_LOAD = 0, EMU_ATOMIC_STORE = 1, EMU_ATOMIC_UPDATE = 2 };

enum emu_misuse {
  EMU_SHUFFLE_INACTIVE = 1,  // a: lane asked for, b: active lanes
  EMU_LANE_OUT_OF_RANGE = 2, // a: lane asked for
  EMU_MATRIX_INACTIVE = 3,   // b: active lanes
  EMU_DELTA_OUT_OF_RANGE = 4 // a: delta or modulo asked for
};

#define EMU_ASSERT_SIZE(type, size) static_assert(sizeof(type) == (size), #type " differs between the sides")
EMU_ASSERT_SIZE(emu_u32, 4);
EMU_ASSERT_SIZE(emu_u64, 8);
EMU_ASSERT_SIZE(emu_group, 368);
EMU_ASSERT_SIZE(emu_thread, 56);
EMU_ASSERT_SIZE(emu_slots, 1088);

// ---- functions of the runtime that a kernel calls -----------------------------------------------------------------

EMU_EXTERN EMU_PRIVATE emu_slots* emu_exchange(emu_u32 operation, emu_site site, const EMU_PRIVATE void* value,
                                               emu_u32 bytes);
EMU_EXTERN void emu_barrier(emu_u32 operation, emu_site site, emu_u32 memory_flags);
EMU_EXTERN EMU_SHARED void* emu_threadgroup(emu_u32 id, emu_u32 bytes, emu_u32 alignment, emu_site site);
EMU_EXTERN EMU_PRIVATE emu_thread* emu_self(void);
EMU_EXTERN emu_u32 emu_lane(void);  // thread_index_in_simdgroup
EMU_EXTERN void emu_misused(emu_u32 misuse, emu_site site, int a, emu_u32 b);
EMU_EXTERN void emu_atomic(emu_u64 address, emu_u32 bytes, emu_u32 kind);

#ifndef __OPENCL_CPP_VERSION__  // the rest is not for kernels

// ---- a launch: filled by the Python side --------------------------------------------------------------------------

// A library of kernels is compiled for one mode; the launch must name that mode.
enum emu_mode { EMU_FAST = 0, EMU_CHECK = 1, EMU_COUNT = 2 };

enum emu_buffer_flags {
  EMU_WRITABLE = 1,
  EMU_POISON = 2,       // fill with 0xFF (a NaN in every float type) before the launch: an output without init_value
  EMU_UNWRITTEN_OK = 4  // check mode: bytes that no thread has written are counted but are no finding
};

typedef struct emu_buffer {
  // From emu_place(), or any memory of at least `bytes` bytes: without guard pages then, and check mode works on a copy
  // of an input, because beside another buffer an index out of bounds would go unseen.
  emu_u64 address;
  emu_u64 bytes;    // an unbound slot has 0 bytes
  const char* name; // for messages
  emu_u32 flags;    // emu_buffer_flags
  emu_u32 reserved;
} emu_buffer;

typedef struct emu_launch {
  void (*entry)(emu_thread*);  // emu_entry of the kernel's library
  const emu_buffer* buffers;
  emu_u32 num_buffers;
  emu_u32 grid[3];         // threads, as in dispatchThreads
  emu_u32 threadgroup[3];  // threads
  emu_u32 mode;            // emu_mode
  emu_u32 order;           // bit 0: lanes, simdgroups and threadgroups forward (0) or all in reverse (1);
                           // bit 1: simd_sum and the like add distant lanes first (Metal leaves the order open)
  emu_u32 strict_exit;     // 2: simd operations and barriers need all threads; 1: barriers only; 0: neither
  emu_u32 same_value_ok;   // check mode: 1: two threads may write the same value to the same byte
  emu_u32 max_groups;      // run only the first so many threadgroups; 0: all
} emu_launch;

// ---- what a launch gives ------------------------------------------------------------------------------------------

enum emu_finding_kind {
  EMU_OK = 0,
  EMU_OUT_OF_BOUNDS = 1,      // device or threadgroup memory
  EMU_WILD_POINTER = 2,       // no memory of this kernel at all, or another thread's private memory
  EMU_WRITE_TO_INPUT = 3,
  EMU_UNINITIALISED = 4,      // threadgroup memory read before any write
  EMU_THREADGROUP_RACE = 5,
  EMU_DEVICE_RACE = 6,
  EMU_DIVERGENCE = 7,         // barrier or simd operation in divergent flow, or not reached by all
  EMU_SIMD_MISUSE = 8,        // shuffle from an inactive lane, lane out of range, matrix operation with inactive lanes
  EMU_UNWRITTEN_OUTPUT = 9,
  EMU_STACK_OVERFLOW = 10,
  EMU_THREADGROUP_MEMORY = 11,// more than 32 KB
  EMU_UNDEFINED = 12,         // a sanitizer trap: private array index, misaligned vector, division by zero, shift width
  EMU_BAD_LAUNCH = 13,        // grid or threadgroup that Metal would refuse
  EMU_DEADLOCK = 14           // no end within the time limit
};

typedef struct emu_finding {
  emu_u32 kind;          // emu_finding_kind
  emu_site site;         // of the operation, or 0
  emu_u64 pc;            // offset in the kernel's library, inside the instruction that did it (look up as it is); or 0
  emu_u32 threadgroup[3], thread[3];  // positions of the thread; valid when has_thread
  emu_u32 simdgroup, lane;
  emu_u32 has_thread;
  emu_u32 buffer;        // its index, or 0xFFFFFFFF
  char text[448];        // what was found, without the place
} emu_finding;

typedef struct emu_counters {
  emu_u64 threads, threadgroups, simdgroups;
  emu_u64 simd_operations, quad_operations;  // of a simdgroup, not of a lane
  emu_u64 matrix_multiplies, matrix_accesses;
  emu_u64 simdgroup_barriers, threadgroup_barriers;
  emu_u64 atomics;                   // of a lane
  emu_u64 switches;                  // between fibers
  emu_u64 threadgroup_bytes;         // allocated, of one group
  emu_u64 threadgroup_loads, threadgroup_stores;  // instructions of a simdgroup
  emu_u64 threadgroup_load_bytes, threadgroup_store_bytes;
  emu_u64 bank_cycles;               // modelled: 32 banks of 4 bytes, one word a bank a cycle
  emu_u64 active_lanes;              // summed over memory instructions: / instructions = mean active lanes
  emu_u64 memory_instructions;       // of a simdgroup, device and threadgroup
  emu_u64 private_accesses, constant_accesses;  // of a lane: spilled or indexed private arrays, program-scope constants
  emu_u64 reserved[11];
} emu_counters;

// Count mode: [0] reads, [1] writes. A line is 128 bytes. An instruction is one access of a simdgroup.
typedef struct emu_buffer_counters {
  emu_u64 bytes_asked[2];        // by lanes, every access counted
  emu_u64 unique_lines[2];       // touched in the whole launch: compulsory traffic
  emu_u64 group_lines[2];        // unique lines of a threadgroup, summed over threadgroups: traffic with a perfect L1
  emu_u64 instructions[2], lines[2];                // as compiled here
  emu_u64 merged_instructions[2], merged_lines[2];  // adjacent accesses of a lane merged to at most 16 bytes
  emu_u64 unwritten_bytes;       // check mode
  emu_u64 reserved;
} emu_buffer_counters;

typedef struct emu_instruction {  // count mode: one memory instruction of the library
  emu_u64 pc;
  emu_u32 kind;    // 0 device read, 1 device write, 2 threadgroup read, 3 threadgroup write
  emu_u32 buffer;  // of its first access, or 0xFFFFFFFF
  emu_u64 executions, bytes, lines, lanes;
} emu_instruction;

typedef struct emu_result {
  emu_finding finding;
  emu_counters counters;
  emu_buffer_counters buffers[EMU_MAX_BUFFERS];
} emu_result;

EMU_ASSERT_SIZE(emu_buffer, 32);
EMU_ASSERT_SIZE(emu_launch, 64);
EMU_ASSERT_SIZE(emu_finding, 504);
EMU_ASSERT_SIZE(emu_counters, 256);
EMU_ASSERT_SIZE(emu_buffer_counters, 128);
EMU_ASSERT_SIZE(emu_instruction, 48);
EMU_ASSERT_SIZE(emu_result, 4856);

// ---- functions of the runtime that the Python side calls; one launch at a time in a process -----------------------
// To build it: c++ -std=c++17 -O2 -fPIC -shared -fvisibility=hidden -fno-exceptions native/*.cpp -Wl,--no-as-needed
// -lm -ldl A kernel needs, beside the flags of its mode: -fsigned-char (arm64), -isystem native/include, and -D
// EMU_FAST_MATH if an unqualified exp() is to be fast::exp(); its library may be linked with undefined symbols.

// The runtime must be loaded with RTLD_GLOBAL before any kernel's library.
EMU_EXTERN emu_u32 emu_interface(void);  // EMU_INTERFACE
// Memory for buffer `index` of the next launch: its end (rounded up to 16 bytes) lies at an unmapped page, its start
// behind one. Valid until the next emu_place of the same index; contents are undefined. Null when there is no room.
EMU_EXTERN void* emu_place(emu_u32 index, emu_u64 bytes);
// Gives back the memory that emu_place keeps.
EMU_EXTERN void emu_release(void);
// Runs the launch. Returns result->finding.kind. `result` is written whole.
EMU_EXTERN emu_u32 emu_run(const emu_launch* launch, emu_result* result);
// Count mode, last launch: copies at most `capacity` instructions, returns how many there are.
EMU_EXTERN emu_u64 emu_instructions(emu_instruction* out, emu_u64 capacity);
// Count mode, last launch: how often each basic block of the library that holds `entry` has run (a lane counts as
// one), in the order of its __sancov_guards section (-fsanitize-coverage=bb,no-prune,trace-pc-guard). Returns how many
// blocks.
EMU_EXTERN emu_u64 emu_block_counts(const void* entry, emu_u64* out, emu_u64 capacity);
// A launch that takes more processor time than this is stopped with EMU_DEADLOCK; 0: never. 600 seconds until set.
EMU_EXTERN void emu_limit_time(emu_u32 milliseconds);
// Nanoseconds of one switch between fibers, over `count` switches.
EMU_EXTERN double emu_switch_cost(emu_u64 count);
#endif

#endif
