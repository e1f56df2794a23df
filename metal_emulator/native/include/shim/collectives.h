// What lanes do together, for the 32 lanes of a simdgroup and the 4 of a quadgroup alike: each brings a value, and
// after all have come each reads what the others brought. Types are those of Metal: no bool, nothing of 64 bits.
#pragma once

namespace metal {

struct emu_simdgroup {
  static constexpr constant uint operation = EMU_SIMD, width = 32;
};
// Its four lanes meet with the whole simdgroup: a quad operation in divergent quads is a finding.
struct emu_quadgroup {
  static constexpr constant uint operation = EMU_QUAD, width = 4;
};

template <class T>
constexpr constant bool emu_is_lane_value =
    is_floating_point_v<emu_element<T>> ||
    (is_integral_v<emu_element<T>> && !is_same_v<emu_element<T>, bool> && sizeof(emu_element<T>) <= 4);
template <class T>
using emu_if_lane_value = enable_if_t<emu_is_lane_value<T>>;

template <class G, class T>
EMU_FUNC thread emu_slots* emu_meet(T value, emu_site site) {
  static_assert(sizeof(T) <= 32, "value too large");
  return emu_exchange(G::operation, site, (const thread void*)&value, sizeof(T));
}

template <class T>
EMU_FUNC T emu_brought(const thread emu_slots* slots, uint lane) {
  T value;
  __builtin_memcpy(&value, slots->value[lane], sizeof(T));
  return value;
}

template <class G>
EMU_FUNC uint emu_first_lane() {
  return emu_lane() & ~(G::width - 1);
}
template <class G>
EMU_FUNC uint emu_rank() {
  return emu_lane() & (G::width - 1);
}

// ---- reductions: a tree over the lanes, of neighbours first or of distant lanes first

template <class T, class F>
EMU_OUTLINE T emu_reduce(thread emu_slots* slots, uint first, uint width, F combine) {
  T value[32];
  uint here = slots->active >> first;
  for (uint i = 0; i < width; i++) value[i] = emu_brought<T>(slots, first + i);
  auto join = [&](uint to, uint from) {
    if (here >> from & 1) value[to] = here >> to & 1 ? combine(value[to], value[from]) : value[from];
    here |= (here >> from & 1) << to;
  };
  if (slots->distant_first) {
    for (uint stride = width / 2; stride; stride /= 2)
      for (uint i = 0; i < stride; i++) join(i, i + stride);
  } else {
    for (uint stride = 1; stride < width; stride *= 2)
      for (uint i = 0; i < width; i += 2 * stride) join(i, i + stride);
  }
  if (width == 32) {
    __builtin_memcpy(slots->result, &value[0], sizeof(T));
    slots->reduced = 1;
  }
  return value[0];
}

template <class T>
EMU_OUTLINE T emu_reduced(thread emu_slots* slots) {
  T value;
  __builtin_memcpy(&value, slots->result, sizeof(T));
  return value;
}

struct emu_add {
  template <class T>
  EMU_FUNC T operator()(T a, T b) const { return T(a + b); }
};
struct emu_multiply {
  template <class T>
  EMU_FUNC T operator()(T a, T b) const { return T(a * b); }
};
struct emu_maximum {
  template <class T>
  EMU_FUNC T operator()(T a, T b) const { return emu_max<T>(a, b); }
};
struct emu_minimum {
  template <class T>
  EMU_FUNC T operator()(T a, T b) const { return emu_min<T>(a, b); }
};
struct emu_and {
  template <class T>
  EMU_FUNC T operator()(T a, T b) const { return T(a & b); }
};
struct emu_or {
  template <class T>
  EMU_FUNC T operator()(T a, T b) const { return T(a | b); }
};
struct emu_xor {
  template <class T>
  EMU_FUNC T operator()(T a, T b) const { return T(a ^ b); }
};

template <class G, class F, class T>
EMU_FUNC T emu_collect(T value, emu_site site) {
  if constexpr (is_vector_v<T>) {
    T r;
    for (int i = 0; i < emu_size<T>; i++) r[i] = emu_collect<G, F, emu_element<T>>(value[i], site);
    return r;
  } else {
    thread emu_slots* slots = emu_meet<G>(value, site);
    if (G::width == 32 && slots->reduced) return emu_reduced<T>(slots);
    return emu_reduce<T>(slots, emu_first_lane<G>(), G::width, F{});
  }
}

// ---- prefixes: over the active lanes before this one, and this one if inclusive

template <class T, class F>
EMU_OUTLINE T emu_prefix_of(const thread emu_slots* slots, uint first, uint end, T start, F combine) {
  T r = start;
  for (uint i = first; i < end; i++)
    if (slots->active >> i & 1) r = combine(r, emu_brought<T>(slots, i));
  return r;
}

template <class G, class F, class T>
EMU_FUNC T emu_prefix(T value, emu_element<T> start, bool inclusive, emu_site site) {
  if constexpr (is_vector_v<T>) {
    T r;
    for (int i = 0; i < emu_size<T>; i++) r[i] = emu_prefix<G, F, emu_element<T>>(value[i], start, inclusive, site);
    return r;
  } else {
    thread emu_slots* slots = emu_meet<G>(value, site);
    return emu_prefix_of<T>(slots, emu_first_lane<G>(), emu_lane() + (inclusive ? 1 : 0), start, F{});
  }
}

// ---- shuffles. `source` is a rank; one outside the group leaves the lane its own value

template <class T>
EMU_FUNC T emu_take(thread emu_slots* slots, uint lane, emu_site site) {
  if (!(slots->active >> lane & 1)) emu_misused(EMU_SHUFFLE_INACTIVE, site, (int)lane, slots->active);
  return emu_brought<T>(slots, lane);
}

template <class G, class T>
EMU_FUNC T emu_shuffle(T value, int source, emu_site site) {
  thread emu_slots* slots = emu_meet<G>(value, site);
  if (source < 0 || source >= (int)G::width) return value;
  return emu_take<T>(slots, emu_first_lane<G>() + (uint)source, site);
}

template <class G>
EMU_FUNC void emu_check_lane(uint lane, emu_site site) {
  if (lane >= G::width) emu_misused(EMU_LANE_OUT_OF_RANGE, site, (int)lane, G::width - 1);
}
template <class G>
EMU_FUNC void emu_check_delta(uint delta, emu_site site) {
  if (delta >= G::width) emu_misused(EMU_DELTA_OUT_OF_RANGE, site, (int)delta, G::width - 1);
}

template <class T>
struct emu_filled {
  T value, filling;
};

// Lanes move by `by` in blocks of `modulo`; where nothing moves in, the filling moves in from the block's other end.
template <class G, class T>
EMU_FUNC T emu_shuffle_and_fill(T value, T filling, int by, uint modulo, emu_site site) {
  if constexpr (sizeof(T) > 16 || is_vector_v<T>) {
    T r;
    for (int i = 0; i < emu_size<T>; i++)
      r[i] = emu_shuffle_and_fill<G, emu_element<T>>(value[i], filling[i], by, modulo, site);
    return r;
  } else {
    if (modulo < 2 || modulo > G::width || (modulo & (modulo - 1)))
      emu_misused(EMU_DELTA_OUT_OF_RANGE, site, (int)modulo, G::width);
    emu_filled<T> both = {value, filling};
    thread emu_slots* slots = emu_meet<G>(both, site);
    int rank = (int)(emu_lane() & (modulo - 1)) + by;
    uint first = emu_lane() & ~(modulo - 1);
    bool inside = rank >= 0 && rank < (int)modulo;
    emu_filled<T> taken = emu_take<emu_filled<T>>(slots, first + ((uint)rank & (modulo - 1)), site);
    return inside ? taken.value : taken.filling;
  }
}

// ---- votes

template <class G>
EMU_OUTLINE uint emu_count_votes(const thread emu_slots* slots, uint first) {
  uint votes = 0;
  for (uint i = 0; i < G::width; i++)
    if (slots->active >> (first + i) & 1 && emu_brought<uint>(slots, first + i)) votes |= 1u << i;
  return votes;
}
template <class G>
EMU_FUNC uint emu_vote(bool yes, emu_site site) {
  return emu_count_votes<G>(emu_meet<G>((uint)yes, site), emu_first_lane<G>());
}

template <class G>
struct emu_votes {
  using vote_t = ulong;
  ulong votes;
  emu_votes() : votes(0) {}
  explicit emu_votes(ulong v) : votes(v) {}
  explicit operator ulong() const { return votes; }
  bool all() const { return (uint)votes == (G::width == 32 ? 0xFFFFFFFFu : (1u << (G::width & 31)) - 1); }
  bool any() const { return votes != 0; }
};

}  // namespace metal

// The functions of one kind of group. PREFIX is simd or quad.
#define EMU_REDUCTION(PREFIX, GROUP, name, functor)                       \
  template <class T, class = emu_if_lane_value<T>>                        \
  EMU_FUNC T PREFIX##_##name(T value, EMU_HERE) {                         \
    return emu_collect<GROUP, functor>(value, site);                      \
  }
#define EMU_PREFIX(PREFIX, GROUP, name, functor, start)                                     \
  template <class T, class = emu_if_lane_value<T>>                                          \
  EMU_FUNC T PREFIX##_prefix_inclusive_##name(T value, EMU_HERE) {                          \
    return emu_prefix<GROUP, functor>(value, emu_element<T>(start), true, site);            \
  }                                                                                         \
  template <class T, class = emu_if_lane_value<T>>                                          \
  EMU_FUNC T PREFIX##_prefix_exclusive_##name(T value, EMU_HERE) {                          \
    return emu_prefix<GROUP, functor>(value, emu_element<T>(start), false, site);           \
  }
#define EMU_TAKE_LANE(PREFIX, GROUP, name)                                \
  template <class T, class = emu_if_lane_value<T>>                        \
  EMU_FUNC T PREFIX##_##name(T value, ushort lane, EMU_HERE) {            \
    emu_check_lane<GROUP>(lane, site);                                    \
    return emu_shuffle<GROUP>(value, lane, site);                         \
  }
#define EMU_SHIFT(PREFIX, GROUP, name, source)                            \
  template <class T, class = emu_if_lane_value<T>>                        \
  EMU_FUNC T PREFIX##_##name(T value, ushort delta, EMU_HERE) {           \
    emu_check_delta<GROUP>(delta, site);                                  \
    int rank = (int)emu_rank<GROUP>();                                    \
    return emu_shuffle<GROUP>(value, source, site);                       \
  }
#define EMU_SHIFT_AND_FILL(PREFIX, GROUP, name, sign)                                                       \
  template <class T, class = emu_if_lane_value<T>>                                                          \
  EMU_FUNC T PREFIX##_##name(T value, T filling, ushort delta, ushort modulo = GROUP::width, EMU_HERE) {    \
    emu_check_delta<GROUP>(delta, site);                                                                    \
    return emu_shuffle_and_fill<GROUP>(value, filling, sign(int)delta, modulo, site);                       \
  }
#define EMU_VOTES(PREFIX, GROUP)                                                                            \
  using PREFIX##_vote = emu_votes<GROUP>;                                                                   \
  EMU_FUNC PREFIX##_vote PREFIX##_ballot(bool yes, EMU_HERE) {                                              \
    return PREFIX##_vote(emu_vote<GROUP>(yes, site));                                                       \
  }                                                                                                         \
  EMU_FUNC PREFIX##_vote PREFIX##_active_threads_mask(EMU_HERE) {                                           \
    return PREFIX##_vote(emu_vote<GROUP>(true, site));                                                      \
  }                                                                                                         \
  EMU_FUNC bool PREFIX##_any(bool yes, EMU_HERE) { return emu_vote<GROUP>(yes, site) != 0; }                \
  EMU_FUNC bool PREFIX##_all(bool yes, EMU_HERE) { return emu_vote<GROUP>(!yes, site) == 0; }               \
  EMU_FUNC bool PREFIX##_is_first(EMU_HERE) {                                                               \
    return emu_rank<GROUP>() == (uint)__builtin_ctz(emu_vote<GROUP>(true, site));                           \
  }                                                                                                         \
  EMU_FUNC bool PREFIX##_is_helper_thread() { return false; }                                               \
  template <class T, class = emu_if_lane_value<T>>                                                          \
  EMU_FUNC T PREFIX##_broadcast_first(T value, EMU_HERE) {                                                  \
    thread emu_slots* slots = emu_meet<GROUP>(value, site);                                                 \
    uint first = emu_first_lane<GROUP>();                                                                   \
    return emu_brought<T>(slots, first + (uint)__builtin_ctz(slots->active >> first));                      \
  }
#define EMU_COLLECTIVES(PREFIX, GROUP)                                                                      \
  namespace metal {                                                                                         \
  EMU_REDUCTION(PREFIX, GROUP, sum, emu_add)                                                                \
  EMU_REDUCTION(PREFIX, GROUP, product, emu_multiply)                                                       \
  EMU_REDUCTION(PREFIX, GROUP, max, emu_maximum)                                                            \
  EMU_REDUCTION(PREFIX, GROUP, min, emu_minimum)                                                            \
  EMU_REDUCTION(PREFIX, GROUP, and, emu_and)                                                                \
  EMU_REDUCTION(PREFIX, GROUP, or, emu_or)                                                                  \
  EMU_REDUCTION(PREFIX, GROUP, xor, emu_xor)                                                                \
  EMU_PREFIX(PREFIX, GROUP, sum, emu_add, 0)                                                                \
  EMU_PREFIX(PREFIX, GROUP, product, emu_multiply, 1)                                                       \
  EMU_TAKE_LANE(PREFIX, GROUP, shuffle)                                                                     \
  EMU_TAKE_LANE(PREFIX, GROUP, broadcast)                                                                   \
  EMU_SHIFT(PREFIX, GROUP, shuffle_xor, rank ^ delta)                                                       \
  EMU_SHIFT(PREFIX, GROUP, shuffle_up, rank - delta)                                                        \
  EMU_SHIFT(PREFIX, GROUP, shuffle_down, rank + delta)                                                      \
  EMU_SHIFT(PREFIX, GROUP, shuffle_rotate_up, (rank - delta) & ((int)GROUP::width - 1))                     \
  EMU_SHIFT(PREFIX, GROUP, shuffle_rotate_down, (rank + delta) & ((int)GROUP::width - 1))                   \
  EMU_SHIFT_AND_FILL(PREFIX, GROUP, shuffle_and_fill_up, -)                                                 \
  EMU_SHIFT_AND_FILL(PREFIX, GROUP, shuffle_and_fill_down, +)                                               \
  EMU_VOTES(PREFIX, GROUP)                                                                                  \
  }
