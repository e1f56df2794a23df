// The blocks as MLX primitives, and the records they take, for mlx_edge/ops/cpu.py. No arithmetic here.
//
// A primitive is a closure over raw pointers that runs on the stream's thread; it keeps alive what it points into. A KV store
// is written in place, so steps over it must run in order: each takes the ticket that the one before it gave.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <malloc.h>

#include <mutex>
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

namespace mx = mlx::core;
namespace nb = nanobind;
using namespace nb::literals;

namespace {

using namespace mlx_edge;

// What Python holds of a record. The steps share the record itself, never its Python object: a stream's thread that dropped
// one would wait for the interpreter.
template <class T>
struct Held {
  std::shared_ptr<T> it;
};
using HeldWeight = Held<const Weight>;
using HeldAttention = Held<const AttentionLayer>;
using HeldMLP = Held<const MLPLayer>;
using HeldHead = Held<const HeadLayer>;
using HeldStore = Held<KVStore>;

using Pointers = std::vector<char*>;
using Work = std::function<void(const Pointers& in, const Pointers& out)>;

// One op of ours in MLX's graph. Inputs are made contiguous, the outputs are new.
class EdgeOp : public mx::Primitive {
 public:
  EdgeOp(mx::Stream stream, const char* name, Work work) : Primitive(stream), name_(name), work_(std::move(work)) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    Pointers in, out;
    for (const mx::array& input : inputs) in.push_back(const_cast<char*>(input.data<char>()));
    for (mx::array& output : outputs) {
      output.set_data(allocate(output.nbytes()));
      out.push_back(output.data<char>());
    }
    mx::cpu::get_command_encoder(stream()).dispatch(
        [work = work_, in = std::move(in), out = std::move(out)] { work(in, out); });
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
  Work work_;
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

// Bytes of a weight as the kernels read it.
size_t weight_bytes(const Matrix& w) {
  if (w.format != Format::dense) return packed_bytes(w);
  return static_cast<size_t>(w.rows) * w.columns * float_size(w.float_type);
}

// One step of a KV store: what to wait for before it is touched, and what tells that it has been.
std::pair<mx::array, mx::array> run_attention(const mx::array& x, const HeldAttention& held, const HeldStore& store,
                                              const std::optional<mx::array>& ticket, const Step& step,
                                              Precision precision) {
  const auto layer = held.it;
  const auto kv = store.it;
  expect_floats("attention_block", x, layer->q->matrix.columns);
  std::vector<mx::array> inputs{x};
  if (ticket) inputs.push_back(*ticket);
  auto outputs = make_op("attention_block", inputs, {x.shape(), mx::Shape{}}, {mx::float32, mx::int32},
                         [=](const Pointers& in, const Pointers& out) {
                           attention_block(*layer, precision, *kv, step, reinterpret_cast<float*>(in[0]),
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

mx::array run_embed(const mx::array& tokens, const HeldWeight& weight) {
  const auto table = weight.it;
  mx::Shape shape = tokens.shape();
  shape.push_back(table->matrix.columns);
  const int count = static_cast<int>(tokens.size());
  const mx::array whole = tokens.dtype() == mx::int32 ? tokens : mx::astype(tokens, mx::int32, mx::Device(mx::Device::cpu));
  return make_op("embed", {whole}, {shape}, {mx::float32}, [=](const Pointers& in, const Pointers& out) {
    embed(*table, reinterpret_cast<int*>(in[0]), reinterpret_cast<float*>(out[0]), count);
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

// A Python buffer of at least `size` bytes, for as long as this lives.
class Bytes {
 public:
  Bytes(nb::handle object, size_t size, const char* what, bool is_writable = false) {
    if (PyObject_GetBuffer(object.ptr(), &view_, is_writable ? PyBUF_WRITABLE : PyBUF_SIMPLE)) throw nb::python_error();
    if (static_cast<size_t>(view_.len) != size) {
      const std::string found = std::to_string(view_.len);
      PyBuffer_Release(&view_);
      throw std::invalid_argument(std::string(what) + ": " + found + " bytes, expected " + std::to_string(size));
    }
  }
  Bytes(const Bytes&) = delete;
  ~Bytes() { PyBuffer_Release(&view_); }

  uint8_t* data() const { return static_cast<uint8_t*>(view_.buf); }

 private:
  Py_buffer view_;
};

// Buffers that were dropped where Python cannot be called: in a stream's thread, which may not wait for the interpreter.
struct Dropped {
  std::mutex mutex;
  std::vector<const Bytes*> bytes;

  static Dropped& of_process() {
    static Dropped& it = *new Dropped;
    return it;
  }
  void add(const Bytes* dropped) {
    const std::lock_guard lock(mutex);
    bytes.push_back(dropped);
  }
  static int release(void*) {
    Dropped& it = of_process();
    std::vector<const Bytes*> all;
    {
      const std::lock_guard lock(it.mutex);
      all.swap(it.bytes);
    }
    for (const Bytes* bytes : all) delete bytes;
    return 0;
  }
};

// A buffer that outlives the call: weights are read by steps in flight, and whoever drops them last gives the buffer back; a
// thread without Python leaves that to the interpreter, when it comes by. One that is ending never does.
std::shared_ptr<const Bytes> share(nb::handle object, size_t size, const char* what) {
  return {new Bytes(object, size, what), [](const Bytes* bytes) {
            if (PyGILState_Check()) {
              delete bytes;
            } else {
              Dropped::of_process().add(bytes);
              Py_AddPendingCall(Dropped::release, nullptr);
            }
          }};
}

void run_pack(const Matrix& w, nb::handle packs, nb::handle scales, nb::handle offsets, nb::handle to) {
  if (const char* reason = refuse(w)) throw std::invalid_argument(reason);
  const size_t groups = static_cast<size_t>(w.rows) * (w.columns / w.group_size);
  const size_t scale_size = w.format == Format::mxfp4 ? 1 : float_size(w.float_type);
  const Bytes codes(packs, static_cast<size_t>(w.rows) * w.columns * w.bits / 8, "packs");
  const Bytes steps(scales, groups * scale_size, "scales");
  std::optional<Bytes> zeros;
  if (w.format == Format::affine) zeros.emplace(offsets, groups * scale_size, "offsets");
  const Bytes target(to, packed_bytes(w), "to", true);
  const nb::gil_scoped_release release;
  Pool& pool = Pool::of_process();
  const std::lock_guard turn(pool.turn());
  pool.run(num_blocks(w), piece_of(pool, num_blocks(w)), [&](int begin, int end) {
    pack(w, reinterpret_cast<const uint32_t*>(codes.data()), steps.data(), zeros ? zeros->data() : nullptr, target.data(),
         begin, end);
  });
}

using Plane = nb::ndarray<nb::c_contig, nb::device::cpu>;

void bind_records(nb::module_& m) {
  nb::enum_<Format>(m, "Format").value("affine", Format::affine).value("mxfp4", Format::mxfp4).value("dense", Format::dense);
  nb::enum_<Float>(m, "Float").value("f32", Float::f32).value("f16", Float::f16).value("bf16", Float::bf16);
  nb::enum_<Precision>(m, "Precision").value("int8", Precision::int8).value("floating", Precision::floating);
  nb::enum_<Activation>(m, "Activation")
      .value("silu", Activation::silu)
      .value("gelu_tanh", Activation::gelu_tanh);
  nb::enum_<KVFormat>(m, "KVFormat")
      .value("f32", KVFormat::f32)
      .value("f16", KVFormat::f16)
      .value("int8", KVFormat::int8)
      .value("int4", KVFormat::int4);
  nb::class_<Matrix>(m, "Matrix")
      .def(
          "__init__",
          [](Matrix* self, Format format, int rows, int columns, int bits, int group_size, Float float_type) {
            new (self) Matrix{format, rows, columns, bits, group_size, float_type, nullptr, nullptr};
          },
          "format"_a, "rows"_a, "columns"_a, "bits"_a = 0, "group_size"_a = 0, "float_type"_a = Float::f32)
      .def_ro("rows", &Matrix::rows)
      .def_ro("columns", &Matrix::columns)
      .def_prop_ro("num_bytes", &weight_bytes)
      .def_prop_ro("refusal", [](const Matrix& w) -> std::optional<std::string> {
        const char* reason = refuse(w);
        return reason ? std::optional<std::string>(reason) : std::nullopt;
      });
  nb::class_<HeldWeight>(m, "Weight")
      .def(
          "__init__",
          [](HeldWeight* self, const Matrix& sizes, nb::handle memory, std::vector<float> bias) {
            if (const char* reason = refuse(sizes)) throw std::invalid_argument(reason);
            if (!bias.empty() && bias.size() != static_cast<size_t>(sizes.rows))
              throw std::invalid_argument("bias: expected one number a row");
            auto bytes = share(memory, weight_bytes(sizes), "weight");
            Matrix matrix = sizes;
            matrix.data = bytes->data();
            new (self) HeldWeight{std::make_shared<const Weight>(Weight{matrix, std::move(bias), std::move(bytes)})};
          },
          "sizes"_a, "memory"_a, "bias"_a = std::vector<float>{});
  nb::class_<Held<const Norm>>(m, "Norm")
      .def(
          "__init__",
          [](Held<const Norm>* self, std::vector<float> weight, float eps) {
            new (self) Held<const Norm>{std::make_shared<const Norm>(Norm{std::move(weight), eps})};
          },
          "weight"_a, "eps"_a);
  nb::class_<Rope>(m, "Rope").def(nb::init<std::vector<float>, int, bool, float>(), "periods"_a, "dims"_a,
                                  "is_interleaved"_a, "magnitude"_a);
  nb::class_<Step>(m, "Step").def(nb::init<std::vector<int>, std::vector<int>, int>(), "starts"_a, "lengths"_a, "width"_a);
}

void bind_layers(nb::module_& m) {
  using MaybeNorm = const Held<const Norm>*;
  const auto value_of = [](MaybeNorm norm) { return norm ? std::optional<Norm>(*norm->it) : std::nullopt; };
  nb::class_<HeldAttention>(m, "AttentionLayer")
      .def(
          "__init__",
          [value_of](HeldAttention* self, const Held<const Norm>& norm, const HeldWeight& q, const HeldWeight& k,
                     const HeldWeight& v, const HeldWeight& o, int num_heads, int num_kv_heads, int head_dim, float scale,
                     MaybeNorm q_norm, MaybeNorm k_norm, std::optional<Rope> rope, int window) {
            new (self) HeldAttention{std::make_shared<const AttentionLayer>(
                AttentionLayer{*norm.it, q.it, k.it, v.it, o.it, num_heads, num_kv_heads, head_dim, scale, value_of(q_norm),
                               value_of(k_norm), std::move(rope), window})};
          },
          "norm"_a, "q"_a, "k"_a, "v"_a, "o"_a, "num_heads"_a, "num_kv_heads"_a, "head_dim"_a, "scale"_a,
          "q_norm"_a.none(), "k_norm"_a.none(), "rope"_a.none(), "window"_a);
  nb::class_<HeldMLP>(m, "MLPLayer")
      .def(
          "__init__",
          [](HeldMLP* self, const Held<const Norm>& norm, const HeldWeight& gate, const HeldWeight& up,
             const HeldWeight& down, Activation activation) {
            new (self) HeldMLP{std::make_shared<const MLPLayer>(MLPLayer{*norm.it, gate.it, up.it, down.it, activation})};
          },
          "norm"_a, "gate"_a, "up"_a, "down"_a, "activation"_a);
  nb::class_<HeldHead>(m, "HeadLayer")
      .def(
          "__init__",
          [](HeldHead* self, const Held<const Norm>& norm, const HeldWeight& projection) {
            new (self) HeldHead{std::make_shared<const HeadLayer>(HeadLayer{*norm.it, projection.it})};
          },
          "norm"_a, "projection"_a);
}

void bind_store(nb::module_& m) {
  nb::class_<HeldStore>(m, "KVStore")
      .def(
          "__init__",
          [](HeldStore* self, int batch, int num_heads, int head_dim, KVFormat format, int group_size, int window, int keep) {
            new (self)
                HeldStore{std::make_shared<KVStore>(batch, num_heads, head_dim, format, group_size, window, keep)};
          },
          "batch"_a, "num_heads"_a, "head_dim"_a, "format"_a, "group_size"_a, "window"_a, "keep"_a)
      .def_prop_ro("bytes", [](const HeldStore& kv) { return kv.it->bytes(); })
      .def("copy", [](const HeldStore& kv) { return HeldStore{kv.it->copy()}; })
      .def(
          "prepare", [](HeldStore& kv, int row, int start, int count) { kv.it->prepare(row, start, count); }, "row"_a,
          "start"_a, "count"_a)
      .def(
          "read_packed",
          [](const HeldStore& kv, int row, int start, int count, bool values, Plane packs, Plane scales, Plane offsets) {
            kv.it->read_packed(row, start, count, values, static_cast<uint32_t*>(packs.data()),
                           static_cast<float*>(scales.data()), static_cast<float*>(offsets.data()));
          },
          "row"_a, "start"_a, "count"_a, "values"_a, "packs"_a, "scales"_a, "offsets"_a)
      .def(
          "write_packed",
          [](HeldStore& kv, int row, int start, int count, bool values, Plane packs, Plane scales, Plane offsets) {
            kv.it->write_packed(row, start, count, values, static_cast<const uint32_t*>(packs.data()),
                            static_cast<const float*>(scales.data()), static_cast<const float*>(offsets.data()));
          },
          "row"_a, "start"_a, "count"_a, "values"_a, "packs"_a, "scales"_a, "offsets"_a)
      .def(
          "read",
          [](const HeldStore& kv, int row, int start, int count, bool values, Plane to) {
            kv.it->read(row, start, count, values, static_cast<float*>(to.data()));
          },
          "row"_a, "start"_a, "count"_a, "values"_a, "to"_a)
      .def(
          "write",
          [](HeldStore& kv, int row, int start, int count, Plane keys, Plane values) {
            kv.it->prepare(row, start, count);
            for (int head = 0; head < kv.it->num_heads(); head++) {
              const size_t at = static_cast<size_t>(head) * count * kv.it->head_dim();
              kernels().append(*kv.it, row, head, start, count, static_cast<const float*>(keys.data()) + at,
                               static_cast<const float*>(values.data()) + at, kv.it->head_dim());
            }
          },
          "row"_a, "start"_a, "count"_a, "keys"_a, "values"_a);
}

}  // namespace

NB_MODULE(_cpu, m) {
  nb::module_::import_("mlx.core");
  bind_records(m);
  bind_layers(m);
  bind_store(m);
  m.def("pack", &run_pack, "sizes"_a, "packs"_a, "scales"_a, "offsets"_a.none(), "to"_a);
  m.def("linear", &run_linear, "x"_a, "weight"_a, "precision"_a);
  m.def("attention_block", &run_attention, "x"_a, "layer"_a, "kv"_a, "ticket"_a.none(), "step"_a, "precision"_a);
  m.def("append", &run_append, "keys"_a, "values"_a, "kv"_a, "ticket"_a.none(), "step"_a);
  m.def("read", &run_read, "kv"_a, "ticket"_a.none(), "start"_a, "count"_a);
  m.def("mlp_block", &run_mlp, "x"_a, "layer"_a, "precision"_a);
  m.def("head", &run_head, "x"_a, "layer"_a, "precision"_a);
  m.def("embed", &run_embed, "tokens"_a, "table"_a);
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
  m.attr("mlx_version") = MLX_VERSION_NUMERIC;
}
