#include "fiber.h"

#include <sys/mman.h>
#include <time.h>

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
asm(R"(
.text
.globl emu_switch
.hidden emu_switch
.type emu_switch,@function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch,.-emu_switch
)");
static constexpr int FRAME_WORDS = 6;  // saved registers below the return address
static constexpr int RETURN_WORD = 6;
static constexpr int ENTRY_WORDS = 2;  // return address, and the word that a call would have pushed
#elif defined(__aarch64__)
asm(R"(
.text
.globl emu_switch
.hidden emu_switch
.type emu_switch,%function
emu_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size emu_switch,.-emu_switch
)");
static constexpr int FRAME_WORDS = 20;
static constexpr int RETURN_WORD = 11;  // x30
static constexpr int ENTRY_WORDS = 0;
#else
#error "no context switch for this processor: x86-64 and arm64 only"
#endif

namespace emu {

static char* stack_memory = nullptr;
static emu_u32 prepared = 0;

char* stacks() { return stack_memory; }

bool prepare_stacks(emu_u32 count) {
  if (!stack_memory) {
    void* memory = mmap(nullptr, STACK_STRIDE * EMU_MAX_THREADS, PROT_NONE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return false;
    stack_memory = static_cast<char*>(memory);
  }
  for (; prepared < count; prepared++)
    if (mprotect(stack_of(prepared), STACK_BYTES, PROT_READ | PROT_WRITE) != 0) return false;
  return true;
}

void start_fiber(Fiber& fiber, emu_u32 index, void (*start)()) {
  // Tops at one distance from a page would all fall into the same sets of the first-level cache.
  emu_u64 top = (emu_u64)(stack_of(index) + STACK_BYTES) - 4096 - (index % 29) * 832;
  emu_u64* frame = (emu_u64*)(top & ~63ul) - FRAME_WORDS - ENTRY_WORDS;
  memset(frame, 0, sizeof(emu_u64) * (FRAME_WORDS + ENTRY_WORDS));
  frame[RETURN_WORD] = (emu_u64)start;
  fiber.stack_pointer = frame;
}

static void* bench_points[2];
static void bench_fiber() {
  for (;;) emu_switch(&bench_points[1], bench_points[0]);
}

}  // namespace emu

double emu_switch_cost(emu_u64 count) {
  using namespace emu;
  if (!prepare_stacks(1)) return -1;
  Fiber fiber;
  start_fiber(fiber, 0, bench_fiber);
  bench_points[1] = fiber.stack_pointer;
  timespec from, to;
  clock_gettime(CLOCK_MONOTONIC, &from);
  for (emu_u64 i = 0; i < count; i++) emu_switch(&bench_points[0], bench_points[1]);
  clock_gettime(CLOCK_MONOTONIC, &to);
  return ((to.tv_sec - from.tv_sec) * 1e9 + (to.tv_nsec - from.tv_nsec)) / (2.0 * count);
}
