// Signals that a kernel raises become findings: a touched guard page, a sanitizer's trap, a division by zero, no end. A
// signal from anywhere else goes to whoever had it before.
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <ucontext.h>

#include <cstring>

#include "memory.h"

namespace emu {

static const int SIGNALS[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGVTALRM};
constexpr int NUM_SIGNALS = 6;
static emu_u32 time_limit_ms = 600 * 1000;
static pthread_t launching;
static struct sigaction previous[NUM_SIGNALS];
static stack_t previous_stack;
static char* signal_stack = nullptr;
constexpr emu_u64 SIGNAL_STACK_BYTES = 256 * 1024;

static emu_u64 faulting_pc(void* context) {
  const mcontext_t& at = static_cast<ucontext_t*>(context)->uc_mcontext;
#if defined(__x86_64__)
  emu_u64 pc = (emu_u64)at.gregs[REG_RIP];
#else
  emu_u64 pc = at.pc;
#endif
  return pc >= machine.library_low && pc < machine.library_high ? pc - machine.library_low : 0;
}

[[noreturn]] static void fail_memory_fault(emu_u64 address, emu_u64 pc) {
  if (is_below_stack(address)) fail_stack_overflow(pc);
  emu_u64 in_arena = address - (emu_u64)arena.memory + ARENA_GUARD;
  if (in_arena < ARENA_BYTES + 2 * ARENA_GUARD)
    fail(EMU_OUT_OF_BOUNDS, 0, pc, NO_BUFFER, "out-of-bounds threadgroup access: byte %ld of %u",
         (long)in_arena - (long)ARENA_GUARD, arena.used);
  emu_u32 near = nearest_buffer(address);
  if (near == NO_BUFFER)
    fail(EMU_WILD_POINTER, 0, pc, NO_BUFFER, "wild pointer: access to memory that this kernel does not have");
  fail(EMU_OUT_OF_BOUNDS, 0, pc, near, "out-of-bounds device access: byte %ld of %s, which has %lu bytes",
       (long)(address - buffers[near].low), buffers[near].name, buffers[near].high - buffers[near].low);
}

// clang puts the number of the check that failed into the trap instruction.
static const char* trapped_check(emu_u64 address) {
  const unsigned char* code = (const unsigned char*)address;
#if defined(__x86_64__)
  bool is_trap = code[0] == 0x67 && code[1] == 0x0F && code[2] == 0xB9;  // ud1l number(%eax), %eax
  int check = is_trap ? code[4] : -1;
#else
  emu_u32 word;
  memcpy(&word, code, sizeof word);
  bool is_trap = (word & 0xFFFFE01F) == 0xD42AA000;  // brk #0x5500 + number
  int check = is_trap ? (int)(word >> 5 & 0xFF) : -1;
#endif
  switch (check) {
    case 3: return "integer division by zero, or its result does not fit";
    case 18: return "array index out of bounds";
    case 20: return "shift by at least the number of bits";
    case 22: return "misaligned pointer";
  }
  return "undefined behaviour: array index, misaligned pointer, division by zero or shift width";
}

static void on_signal(int signal, siginfo_t* info, void* context) {
  if (!machine.running) {
    remove_faults();
    return;  // and the instruction raises it again
  }
  emu_u64 pc = faulting_pc(context);
  if (signal == SIGSEGV || signal == SIGBUS) fail_memory_fault((emu_u64)info->si_addr, pc);
  if (signal == SIGFPE) fail(EMU_UNDEFINED, 0, pc, NO_BUFFER, "integer division by zero");
  fail(EMU_UNDEFINED, 0, pc, NO_BUFFER, "%s", trapped_check(machine.library_low + pc));
}

// A fiber can be abandoned in the kernel's own code, but not in the runtime's or the C library's, which may hold a
// lock: then the next tick of the timer tries again.
static void on_timer(int, siginfo_t*, void* context) {
  if (!pthread_equal(pthread_self(), launching)) {
    pthread_kill(launching, SIGVTALRM);
    return;
  }
  emu_u64 pc = faulting_pc(context);
  if (machine.running && pc)
    fail(EMU_DEADLOCK, 0, pc, NO_BUFFER,
         "no end after %u ms: an endless loop, or a wait for a threadgroup that has not run", time_limit_ms);
}

static void set_timer(emu_u32 milliseconds) {
  itimerval timer = {{0, milliseconds ? 20 * 1000 : 0}, {milliseconds / 1000, milliseconds % 1000 * 1000}};
  setitimer(ITIMER_VIRTUAL, &timer, nullptr);
}

void install_faults() {
  if (!signal_stack) {
    void* memory = mmap(nullptr, SIGNAL_STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return;
    signal_stack = (char*)memory;
  }
  stack_t stack = {};
  stack.ss_sp = signal_stack;
  stack.ss_size = SIGNAL_STACK_BYTES;
  sigaltstack(&stack, &previous_stack);
  struct sigaction action = {};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // the handler does not return: it switches away
  launching = pthread_self();
  for (int i = 0; i < NUM_SIGNALS; i++) {
    if (SIGNALS[i] == SIGVTALRM) action.sa_sigaction = on_timer;
    sigaction(SIGNALS[i], &action, &previous[i]);
  }
  if (time_limit_ms) set_timer(time_limit_ms);
}

void remove_faults() {
  if (time_limit_ms) set_timer(0);
  for (int i = 0; i < NUM_SIGNALS; i++) sigaction(SIGNALS[i], &previous[i], nullptr);
  sigaltstack(&previous_stack, nullptr);
}

}  // namespace emu

void emu_limit_time(emu_u32 milliseconds) { emu::time_limit_ms = milliseconds; }
