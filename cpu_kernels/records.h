// What Python holds of the kernels' records: weights, layers, steps and stores. records.cpp binds them.
#pragma once

#include <nanobind/nanobind.h>

#include <memory>

#include "blocks.h"

namespace mlx_edge {

// What Python holds of a record. The steps share the record itself, never its Python object: a stream's thread that dropped
// one would wait for the interpreter.
template <class T>
struct Held {
  std::shared_ptr<T> it;
};
using HeldWeight = Held<const Weight>;
using HeldAttention = Held<const AttentionLayer>;
using HeldMLP = Held<const MLPLayer>;
using HeldMoE = Held<const MoELayer>;
using HeldHead = Held<const HeadLayer>;
using HeldStore = Held<KVStore>;

void bind_records(nanobind::module_& m);

}  // namespace mlx_edge
