// The blocks as MLX primitives, for mlx_edge/ops/cpu.py. No arithmetic here.
//
// A primitive is a closure over raw pointers that runs on the stream's thread; it keeps alive what it points into. A KV store
// is written in place, so steps over it must run in order: each takes the ticket that the one before it gave.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <malloc.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <new>
#include <stdexcept>
#include <utility>

#include "adopt.h"
#include "blas.h"
#include "blocks.h"
#include "mlx/allocator.h"
#include "mlx/array.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"
#include "mlx/version.h"
#include "pool.h"
#include "products.h"
#include "records.h"

namespace mx = mlx::core;
namespace nb = nanobind;
using namespace nb::literals;

namespace {

using namespace mlx_edge;

using Pointers = std::vector<char*>;
using Work = std::function<void(const Pointers& in, const Pointers& out)>;

// An error that MLX throws to whoever waits for a result begins with one of these.
constexpr const char* FAILURE = "mlx_edge's CPU kernels failed";
constexpr const char* OUT_OF_MEMORY = "mlx_edge's CPU kernels found no memory";

// What outputs are filled with that could not be computed: a float that is no number, and a token that no vocabulary has.
constexpr int32_t NEVER_COMPUTED = 0x7fced6e0;

struct Memory {
  int32_t* data;
  size_t num_words;
};
using Memories = std::vector<Memory>;

// Runs the work of an op on the stream's thread. MLX catches what is thrown there, throws it to who waits, and goes on with
// the ops behind: they must not take for keys and values, or for tokens, what was never written.
void run_guarded(const char* name, const Work& work, const Memories& in, const Memories& out) {
  const auto fail = [&](const std::string& why) {
    for (const Memory& output : out) std::fill_n(output.data, output.num_words, NEVER_COMPUTED);
    throw std::runtime_error(why);
  };
  const auto pointers = [](const Memories& memories) {
    Pointers found;
    for (const Memory& memory : memories) found.push_back(reinterpret_cast<char*>(memory.data));
    return found;
  };
  try {
    for (const Memory& input : in)
      if (input.num_words && *input.data == NEVER_COMPUTED) throw std::runtime_error("the op before it had failed");
    work(pointers(in), pointers(out));
  } catch (const std::bad_alloc&) {
    fail(std::string(OUT_OF_MEMORY) + " for " + name);
  } catch (const std::exception& error) {
    fail(std::string(FAILURE) + " in " + name + ": " + error.what());
  }
}

// One op of ours in MLX's graph, of elements of 32 bits. Inputs are made contiguous, the outputs are new.
class EdgeOp : public mx::Primitive {
 public:
  EdgeOp(mx::Stream stream, const char* name, Work work) : Primitive(stream), name_(name), work_(std::make_shared<const Work>(std::move(work))) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    Memories in, out;
    for (const mx::array& input : inputs) in.push_back({const_cast<int32_t*>(input.data<int32_t>()), input.size()});
    for (mx::array& output : outputs) {
      output.set_data(allocate(output.nbytes()));
      out.push_back({output.data<int32_t>(), output.size()});
    }
    mx::cpu::get_command_encoder(stream()).dispatch(
        [name = name_, work = work_, in = std::move(in), out = std::move(out)] { run_guarded(name, *work, in, out); });
  }
  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::runtime_error(std::string(name_) + " of mlx_edge's CPU kernels has no GPU version");
  }
  std::vector<mx::array> vjp(const std::vector<mx::array>&, const std::vector<mx::array>&, const std::vector<int>&,
                             const std::vector<mx::array>&) override {
    throw std::invalid_argument(std::string(name_) +
                                " of mlx_edge's CPU kernels has no gradient; train inside ops.reference()");
  }
  std::vector<mx::array> jvp(const std::vector<mx::array>& primals, const std::vector<mx::array>& tangents,
                             const std::vector<int>& argnums) override {
    return vjp(primals, tangents, argnums, {});
  }
  const char* name() const override { return name_; }

 private:
  const char* name_;
  std::shared_ptr<const Work> work_;  // it holds a list of stores: not to be copied for each run
};

std::vector<mx::array> make_op(const char* name, std::vector<mx::array> inputs, std::vector<mx::Shape> shapes,
                               const std::vector<mx::Dtype>& dtypes, Work work) {
  const mx::Stream stream = mx::to_stream({}, mx::Device(mx::Device::cpu));
  for (mx::array& input : inputs) {
    // Only what is known to lie in order may be taken as it is; the rest passes through MLX's check when it is computed.
    const bool is_known = input.status() == mx::array::Status::available && input.flags().row_contiguous;
    const bool is_ours = input.has_primitive() && dynamic_cast<const EdgeOp*>(&input.primitive());
    if (!is_known && !is_ours) input = mx::contiguous(input, false, stream);
  }
  return mx::array::make_arrays(std::move(shapes), dtypes, std::make_shared<EdgeOp>(stream, name, std::move(work)),
                                inputs);
}

mx::Shape with_last(const mx::array& x, int size) {
  mx::Shape shape = x.shape();
  shape.back() = size;
  return shape;
}

int num_rows(const mx::array& x) { return x.shape(-1) ? static_cast<int>(x.size() / x.shape(-1)) : 0; }

void expect_floats(const char* op, const mx::array& x, int columns) {
  if (x.dtype() != mx::float32) throw std::invalid_argument(std::string(op) + ": expected float32");
  if (x.ndim() < 1 || x.shape(-1) != columns)
    throw std::invalid_argument(std::string(op) + ": the last axis is " + std::to_string(x.ndim() ? x.shape(-1) : 0) +
                                ", expected " + std::to_string(columns));
}

mx::array run_linear(const mx::array& x, const HeldWeight& weight, Precision precision) {
  const auto w = weight.it;
  expect_floats("linear", x, w->matrix.columns);
  const int rows = num_rows(x);
  return make_op("linear", {x}, {with_last(x, w->matrix.rows)}, {mx::float32}, [=](const Pointers& in, const Pointers& out) {
    linear(*w, precision, reinterpret_cast<float*>(in[0]), reinterpret_cast<float*>(out[0]), rows);
  })[0];
}

// One step of the KV stores: what to wait for before they are touched, and what tells that they have been.
std::pair<mx::array, mx::array> run_attention(const mx::array& x, const HeldAttention& held_layer,
                                              const std::vector<HeldStore>& held_stores,
                                              const std::vector<mx::array>& tickets, const Step& step,
                                              Precision precision) {
  const auto layer = held_layer.it;
  expect_floats("attention_block", x, layer->q->matrix.columns);
  if (num_rows(x) != step.num_rows())
    throw std::invalid_argument("attention_block: " + std::to_string(num_rows(x)) + " rows for a step of " +
                                std::to_string(step.num_rows()));
  Stores stores;
  for (const HeldStore& store : held_stores) stores.push_back(store.it.get());
  check_step(*layer, stores, step);
  std::vector<mx::array> inputs{x};
  inputs.insert(inputs.end(), tickets.begin(), tickets.end());
  auto outputs = make_op("attention_block", inputs, {x.shape(), mx::Shape{}}, {mx::float32, mx::int32},
                         [=, held = held_stores](const Pointers& in, const Pointers& out) {
                           attention_block(*layer, precision, stores, step, reinterpret_cast<float*>(in[0]),
                                           reinterpret_cast<float*>(out[0]));
                           *reinterpret_cast<int32_t*>(out[1]) = 0;
                         });
  return {outputs[0], outputs[1]};
}

mx::array run_append(const mx::array& keys, const mx::array& values, const HeldStore& store,
                     const std::optional<mx::array>& ticket, const Step& step) {
  const auto kv = store.it;
  expect_floats("append", keys, kv->head_dim());
  expect_floats("append", values, kv->head_dim());
  std::vector<mx::array> inputs{keys, values};
  if (ticket) inputs.push_back(*ticket);
  return make_op("append", inputs, {mx::Shape{}}, {mx::int32}, [=](const Pointers& in, const Pointers& out) {
    append(*kv, step, reinterpret_cast<float*>(in[0]), reinterpret_cast<float*>(in[1]));
    *reinterpret_cast<int32_t*>(out[0]) = 0;
  })[0];
}

// Positions [start, start + count) of all rows as floats (2, B, K, count, D), keys first.
mx::array run_read(const HeldStore& store, const std::optional<mx::array>& ticket, int start, int count) {
  const auto kv = store.it;
  const mx::Shape shape{2, kv->batch(), kv->num_heads(), count, kv->head_dim()};
  std::vector<mx::array> inputs;
  if (ticket) inputs.push_back(*ticket);
  return make_op("read", inputs, {shape}, {mx::float32}, [=](const Pointers&, const Pointers& out) {
    float* to = reinterpret_cast<float*>(out[0]);
    const size_t size = static_cast<size_t>(kv->num_heads()) * count * kv->head_dim();
    for (bool values : {false, true})
      for (int row = 0; row < kv->batch(); row++, to += size) kv->read(row, start, count, values, to);
  })[0];
}

mx::array run_mlp(const mx::array& x, const HeldMLP& held, Precision precision) {
  const auto layer = held.it;
  expect_floats("mlp_block", x, layer->gate->matrix.columns);
  const int rows = num_rows(x);
  return make_op("mlp_block", {x}, {x.shape()}, {mx::float32}, [=](const Pointers& in, const Pointers& out) {
    mlp_block(*layer, precision, reinterpret_cast<float*>(in[0]), reinterpret_cast<float*>(out[0]), rows);
  })[0];
}

mx::array run_head(const mx::array& x, const HeldHead& held, Precision precision) {
  const auto layer = held.it;
  const Matrix& w = layer->projection->matrix;
  expect_floats("head", x, w.columns);
  const int rows = num_rows(x);
  return make_op("head", {x}, {with_last(x, w.rows)}, {mx::float32}, [=](const Pointers& in, const Pointers& out) {
    head(*layer, precision, reinterpret_cast<float*>(in[0]), reinterpret_cast<float*>(out[0]), rows);
  })[0];
}

mx::array run_moe(const mx::array& x, const HeldMoE& held, Precision precision) {
  const auto layer = held.it;
  expect_floats("moe_block", x, layer->gate->matrix.columns);
  const int rows = num_rows(x);
  return make_op("moe_block", {x}, {x.shape()}, {mx::float32}, [=](const Pointers& in, const Pointers& out) {
    moe_block(*layer, precision, reinterpret_cast<float*>(in[0]), reinterpret_cast<float*>(out[0]), rows);
  })[0];
}

mx::array run_attention_within(const mx::array& q, const mx::array& k, const mx::array& v, const std::vector<int>& lengths,
                               float scale) {
  if (q.ndim() != 3 || k.shape() != q.shape() || v.shape() != q.shape() || q.shape(2) > MAX_HEAD_DIM)
    throw std::invalid_argument("attention_within: expected q, k and v of one shape (H, L, D), D at most " +
                                std::to_string(MAX_HEAD_DIM));
  for (const mx::array& x : {q, k, v}) expect_floats("attention_within", x, q.shape(2));
  const int heads = q.shape(0), length = q.shape(1), dim = q.shape(2);
  int total = 0;
  for (int count : lengths) {
    if (count < 1 || count > length - total) throw std::invalid_argument("attention_within: the lengths are not those of q");
    total += count;
  }
  if (total != length) throw std::invalid_argument("attention_within: the lengths do not add up to " + std::to_string(length));
  return make_op("attention_within", {q, k, v}, {q.shape()}, {mx::float32}, [=](const Pointers& in, const Pointers& out) {
    attention_within(reinterpret_cast<float*>(in[0]), reinterpret_cast<float*>(in[1]), reinterpret_cast<float*>(in[2]),
                     reinterpret_cast<float*>(out[0]), heads, length, dim, lengths, scale);
  })[0];
}

mx::array run_embed(const mx::array& tokens, const HeldWeight& weight, float scale) {
  const auto table = weight.it;
  mx::Shape shape = tokens.shape();
  shape.push_back(table->matrix.columns);
  const int count = static_cast<int>(tokens.size());
  const mx::array whole = tokens.dtype() == mx::int32 ? tokens : mx::astype(tokens, mx::int32, mx::Device(mx::Device::cpu));
  return make_op("embed", {whole}, {shape}, {mx::float32}, [=](const Pointers& in, const Pointers& out) {
    embed(*table, scale, reinterpret_cast<int*>(in[0]), reinterpret_cast<float*>(out[0]), count);
  })[0];
}

mx::array run_rms_norm(const mx::array& x, const Held<const Norm>& held) {
  const auto norm = held.it;
  expect_floats("rms_norm", x, static_cast<int>(norm->weight.size()));
  const int rows = num_rows(x);
  return make_op("rms_norm", {x}, {x.shape()}, {mx::float32}, [=](const Pointers& in, const Pointers& out) {
    rms_norm(*norm, reinterpret_cast<float*>(in[0]), reinterpret_cast<float*>(out[0]), rows);
  })[0];
}

mx::array run_glu(const mx::array& gate, const mx::array& up, Activation activation) {
  if (gate.dtype() != mx::float32 || up.dtype() != mx::float32 || gate.shape() != up.shape())
    throw std::invalid_argument("glu: expected two float32 arrays of one shape");
  const size_t count = gate.size();
  return make_op("glu", {gate, up}, {gate.shape()}, {mx::float32}, [=](const Pointers& in, const Pointers& out) {
    glu(activation, reinterpret_cast<float*>(in[0]), reinterpret_cast<float*>(in[1]), reinterpret_cast<float*>(out[0]),
        count);
  })[0];
}

mx::array run_log_softmax(const mx::array& x) {
  expect_floats("log_softmax", x, x.shape(-1));
  const int rows = num_rows(x), size = x.shape(-1);
  return make_op("log_softmax", {x}, {x.shape()}, {mx::float32}, [=](const Pointers& in, const Pointers& out) {
    log_softmax(reinterpret_cast<float*>(in[0]), reinterpret_cast<float*>(out[0]), rows, size);
  })[0];
}

mx::array run_argmax(const mx::array& x) {
  expect_floats("argmax", x, x.shape(-1));
  const int rows = num_rows(x), size = x.shape(-1);
  mx::Shape shape(x.shape().begin(), x.shape().end() - 1);
  return make_op("argmax", {x}, {shape}, {mx::int32}, [=](const Pointers& in, const Pointers& out) {
    argmax(reinterpret_cast<float*>(in[0]), reinterpret_cast<int*>(out[0]), rows, size);
  })[0];
}

}  // namespace

NB_MODULE(_cpu, m) {
  nb::module_::import_("mlx.core");
  bind_records(m);
  m.def("linear", &run_linear, "x"_a, "weight"_a, "precision"_a);
  m.def("attention_block", &run_attention, "x"_a, "layer"_a, "kv"_a, "tickets"_a, "step"_a, "precision"_a);
  m.def("append", &run_append, "keys"_a, "values"_a, "kv"_a, "ticket"_a.none(), "step"_a);
  m.def("read", &run_read, "kv"_a, "ticket"_a.none(), "start"_a, "count"_a);
  m.def("mlp_block", &run_mlp, "x"_a, "layer"_a, "precision"_a);
  m.def("head", &run_head, "x"_a, "layer"_a, "precision"_a);
  m.def("moe_block", &run_moe, "x"_a, "layer"_a, "precision"_a);
  m.def("attention_within", &run_attention_within, "q"_a, "k"_a, "v"_a, "lengths"_a, "scale"_a);
  m.def("embed", &run_embed, "tokens"_a, "table"_a, "scale"_a = 1.0f);
  m.def("rms_norm", &run_rms_norm, "x"_a, "norm"_a);
  m.def("glu", &run_glu, "gate"_a, "up"_a, "activation"_a);
  m.def("log_softmax", &run_log_softmax, "x"_a);
  m.def("argmax", &run_argmax, "x"_a);
  m.def("adopt_pages", &adopt_pages, "descriptor"_a, "begin"_a, "num_bytes"_a);
  m.def("connect_blas", &connect_blas, "libmlx"_a, "openblas"_a);
  m.def("blas_products", &blas_products);
  // What was freed goes back to the system: a tokenizer's loading leaves tens of megabytes.
  m.def("trim_memory", [] {
#if defined(__GLIBC__)
    malloc_trim(0);
#endif
  });
  m.def("instruction_set", [] { return std::string(kernels().name); });
  m.def("num_threads", [] { return Pool::of_process().num_threads(); });
  m.def("set_threads", &set_threads, "num_threads"_a);
  m.def("set_page_limit", &set_page_limit, "num_bytes"_a.none());
  m.def("page_bytes", &held_page_bytes);
  m.attr("FAILURE") = FAILURE;
  m.attr("OUT_OF_MEMORY") = OUT_OF_MEMORY;
  m.attr("mlx_version") = MLX_VERSION_NUMERIC;
}
