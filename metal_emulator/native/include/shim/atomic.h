// <metal_atomic>. Fibers switch only where lanes meet, so a plain read-modify-write is atomic. The runtime is told of
// each access, and the access itself is not checked twice.
#pragma once

namespace metal {

enum memory_order { memory_order_relaxed };

template <class T>
struct atomic {
  static_assert(emu_is_one_of<T, int, uint, bool, float, ulong>, "Metal has no atomic of this type");
  T emu_value;
};
using atomic_int = atomic<int>;
using atomic_uint = atomic<uint>;
using atomic_bool = atomic<bool>;
using atomic_float = atomic<float>;
using atomic_ulong = atomic<ulong>;

#define EMU_UNCHECKED __attribute__((noinline, nodebug, no_sanitize("kernel-address")))

#define EMU_ATOMIC_UPDATE_FUNCTION(space, name, types, expression)                                          \
  template <class T>                                                                                        \
  EMU_UNCHECKED T emu_fetch_##name(volatile space atomic<T>* object, T operand) {                           \
    T old = object->emu_value;                                                                              \
    object->emu_value = expression;                                                                         \
    return old;                                                                                             \
  }                                                                                                         \
  template <class T, class = enable_if_t<types>>                                                            \
  EMU_FUNC T atomic_fetch_##name##_explicit(volatile space atomic<T>* object, emu_same<T> operand,          \
                                            memory_order) {                                                 \
    emu_atomic((ulong)object, sizeof(T), EMU_ATOMIC_UPDATE);                                                \
    return emu_fetch_##name<T>(object, operand);                                                            \
  }
#define EMU_ATOMIC_EXTREME_FUNCTION(name)                                                                   \
  EMU_FUNC void atomic_##name##_explicit(volatile device atomic<ulong>* object, ulong operand,              \
                                         memory_order) {                                                    \
    emu_atomic((ulong)object, sizeof(ulong), EMU_ATOMIC_UPDATE);                                            \
    emu_fetch_##name<ulong>(object, operand);                                                               \
  }

#define EMU_ATOMIC_FUNCTIONS(space)                                                                         \
  template <class T>                                                                                        \
  EMU_UNCHECKED T emu_read_atomic(const volatile space atomic<T>* object) {                                 \
    return object->emu_value;                                                                               \
  }                                                                                                         \
  template <class T>                                                                                        \
  EMU_UNCHECKED T emu_swap_atomic(volatile space atomic<T>* object, T value) {                              \
    T old = object->emu_value;                                                                              \
    object->emu_value = value;                                                                              \
    return old;                                                                                             \
  }                                                                                                         \
  template <class T, class = enable_if_t<sizeof(T) <= 4>>                                                   \
  EMU_FUNC T atomic_load_explicit(const volatile space atomic<T>* object, memory_order) {                   \
    emu_atomic((ulong)object, sizeof(T), EMU_ATOMIC_LOAD);                                                  \
    return emu_read_atomic<T>(object);                                                                      \
  }                                                                                                         \
  template <class T, class = enable_if_t<sizeof(T) <= 4>>                                                   \
  EMU_FUNC void atomic_store_explicit(volatile space atomic<T>* object, emu_same<T> value, memory_order) {  \
    emu_atomic((ulong)object, sizeof(T), EMU_ATOMIC_STORE);                                                 \
    emu_swap_atomic<T>(object, value);                                                                      \
  }                                                                                                         \
  template <class T, class = enable_if_t<sizeof(T) <= 4>>                                                   \
  EMU_FUNC T atomic_exchange_explicit(volatile space atomic<T>* object, emu_same<T> value, memory_order) {  \
    emu_atomic((ulong)object, sizeof(T), EMU_ATOMIC_UPDATE);                                                \
    return emu_swap_atomic<T>(object, value);                                                               \
  }                                                                                                         \
  template <class T, class = enable_if_t<sizeof(T) <= 4>>                                                   \
  EMU_FUNC bool atomic_compare_exchange_weak_explicit(volatile space atomic<T>* object, thread T* expected, \
                                                      emu_same<T> desired, memory_order, memory_order) {    \
    emu_atomic((ulong)object, sizeof(T), EMU_ATOMIC_UPDATE);                                                \
    T old = emu_read_atomic<T>(object);                                                                     \
    bool equal = __builtin_memcmp(&old, expected, sizeof(T)) == 0;                                          \
    if (equal)                                                                                              \
      emu_swap_atomic<T>(object, desired);                                                                  \
    else                                                                                                    \
      *expected = old;                                                                                      \
    return equal;                                                                                           \
  }                                                                                                         \
  EMU_ATOMIC_UPDATE_FUNCTION(space, add, (emu_is_one_of<T, int, uint, float>), T(old + operand))            \
  EMU_ATOMIC_UPDATE_FUNCTION(space, sub, (emu_is_one_of<T, int, uint, float>), T(old - operand))            \
  EMU_ATOMIC_UPDATE_FUNCTION(space, max, (emu_is_one_of<T, int, uint>), emu_max<T>(old, operand))           \
  EMU_ATOMIC_UPDATE_FUNCTION(space, min, (emu_is_one_of<T, int, uint>), emu_min<T>(old, operand))           \
  EMU_ATOMIC_UPDATE_FUNCTION(space, and, (emu_is_one_of<T, int, uint>), T(old & operand))                   \
  EMU_ATOMIC_UPDATE_FUNCTION(space, or, (emu_is_one_of<T, int, uint>), T(old | operand))                    \
  EMU_ATOMIC_UPDATE_FUNCTION(space, xor, (emu_is_one_of<T, int, uint>), T(old ^ operand))
EMU_ATOMIC_FUNCTIONS(device)
EMU_ATOMIC_FUNCTIONS(threadgroup)
EMU_ATOMIC_EXTREME_FUNCTION(max)
EMU_ATOMIC_EXTREME_FUNCTION(min)
#undef EMU_ATOMIC_FUNCTIONS
#undef EMU_ATOMIC_UPDATE_FUNCTION
#undef EMU_ATOMIC_EXTREME_FUNCTION
#undef EMU_UNCHECKED

}  // namespace metal
