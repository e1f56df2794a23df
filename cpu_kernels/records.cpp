// The records for Python, and the memory that weights lie in: buffers of Python's that steps in flight may outlive.
#include "records.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "pool.h"
#include "products.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace mlx_edge {
namespace {

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

void bind_weights(nb::module_& m) {
  nb::enum_<Format>(m, "Format").value("affine", Format::affine).value("mxfp4", Format::mxfp4).value("dense", Format::dense);
  nb::enum_<Float>(m, "Float").value("f32", Float::f32).value("f16", Float::f16).value("bf16", Float::bf16);
  nb::enum_<Precision>(m, "Precision").value("int8", Precision::int8).value("floating", Precision::floating);
  nb::enum_<Activation>(m, "Activation")
      .value("silu", Activation::silu)
      .value("gelu_tanh", Activation::gelu_tanh)
      .value("swiglu_oai", Activation::swiglu_oai);
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
      .def_prop_ro("num_bytes", &packed_bytes)
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
            auto bytes = share(memory, packed_bytes(sizes), "weight");
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
  nb::class_<Rope>(m, "Rope").def(
      "__init__",
      [](Rope* self, std::vector<float> periods, int dims, bool is_interleaved, float magnitude, std::vector<int> axes) {
        const auto is_axis = [](int axis) { return axis >= 0 && axis < 3; };
        if (!axes.empty() && (axes.size() != periods.size() || !std::all_of(axes.begin(), axes.end(), is_axis)))
          throw std::invalid_argument("axes: expected 0, 1 or 2 for each of " + std::to_string(periods.size()) + " pairs");
        new (self) Rope{std::move(periods), dims, is_interleaved, magnitude, std::move(axes)};
      },
      "periods"_a, "dims"_a, "is_interleaved"_a, "magnitude"_a, "axes"_a = std::vector<int>{});
  nb::class_<Step>(m, "Step").def(
      nb::init<std::vector<int>, std::vector<int>, int, bool, std::vector<int>, std::vector<int>>(), "starts"_a, "lengths"_a,
      "width"_a, "is_ragged"_a = false, "shifts"_a = std::vector<int>{}, "turns"_a = std::vector<int>{});
}

void bind_layers(nb::module_& m) {
  using MaybeNorm = const Held<const Norm>*;
  const auto value_of = [](MaybeNorm norm) { return norm ? std::optional<Norm>(*norm->it) : std::nullopt; };
  nb::class_<HeldAttention>(m, "AttentionLayer")
      .def(
          "__init__",
          [value_of](HeldAttention* self, MaybeNorm norm, const HeldWeight& q, const HeldWeight& k, const HeldWeight& v,
                     const HeldWeight& o, int num_heads, int num_kv_heads, int head_dim, float scale, MaybeNorm q_norm,
                     MaybeNorm k_norm, std::optional<Rope> rope, int window, MaybeNorm post_norm, float residual_scale,
                     float softcap, std::vector<float> sinks) {
            if (!sinks.empty() && sinks.size() != static_cast<size_t>(num_heads))
              throw std::invalid_argument("sinks: expected one for each of " + std::to_string(num_heads) + " heads");
            new (self) HeldAttention{std::make_shared<const AttentionLayer>(AttentionLayer{
                value_of(norm), q.it, k.it, v.it, o.it, num_heads, num_kv_heads, head_dim, scale, value_of(q_norm),
                value_of(k_norm), std::move(rope), window, {value_of(post_norm), residual_scale}, softcap,
                std::move(sinks)})};
          },
          "norm"_a.none(), "q"_a, "k"_a, "v"_a, "o"_a, "num_heads"_a, "num_kv_heads"_a, "head_dim"_a, "scale"_a,
          "q_norm"_a.none(), "k_norm"_a.none(), "rope"_a.none(), "window"_a, "post_norm"_a.none() = nb::none(),
          "residual_scale"_a = 1.0f, "softcap"_a = 0.0f, "sinks"_a = std::vector<float>{});
  nb::class_<HeldMLP>(m, "MLPLayer")
      .def(
          "__init__",
          [value_of](HeldMLP* self, MaybeNorm norm, const HeldWeight& gate, const HeldWeight& up, const HeldWeight& down,
                     Activation activation, MaybeNorm post_norm, float residual_scale) {
            new (self) HeldMLP{std::make_shared<const MLPLayer>(
                MLPLayer{value_of(norm), gate.it, up.it, down.it, activation, {value_of(post_norm), residual_scale}})};
          },
          "norm"_a.none(), "gate"_a, "up"_a, "down"_a, "activation"_a, "post_norm"_a.none() = nb::none(),
          "residual_scale"_a = 1.0f);
  nb::class_<HeldMoE>(m, "MoELayer")
      .def(
          "__init__",
          [value_of](HeldMoE* self, MaybeNorm norm, const HeldWeight& router, const HeldWeight& gate, const HeldWeight& up,
                     const HeldWeight& down, int num_experts, int top_k, bool is_normalized, Activation activation,
                     MaybeNorm post_norm, float residual_scale) {
            const MoELayer layer{value_of(norm), router.it, gate.it, up.it, down.it, num_experts, top_k, is_normalized,
                                 activation, {value_of(post_norm), residual_scale}};
            check_experts(layer);
            new (self) HeldMoE{std::make_shared<const MoELayer>(layer)};
          },
          "norm"_a.none(), "router"_a, "gate"_a, "up"_a, "down"_a, "num_experts"_a, "top_k"_a, "is_normalized"_a,
          "activation"_a, "post_norm"_a.none() = nb::none(), "residual_scale"_a = 1.0f);
  nb::class_<HeldHead>(m, "HeadLayer")
      .def(
          "__init__",
          [](HeldHead* self, const Held<const Norm>& norm, const HeldWeight& projection, float scale, float softcap) {
            new (self) HeldHead{std::make_shared<const HeadLayer>(HeadLayer{*norm.it, projection.it, scale, softcap})};
          },
          "norm"_a, "projection"_a, "scale"_a = 1.0f, "softcap"_a = 0.0f);
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
      .def_prop_ro("shared_bytes", [](const HeldStore& kv) { return kv.it->shared_bytes(); })
      .def(
          "fork", [](const HeldStore& kv, const std::vector<int>& lengths) { return HeldStore{kv.it->fork(lengths)}; },
          "lengths"_a)
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

void bind_records(nb::module_& m) {
  bind_weights(m);
  bind_layers(m);
  bind_store(m);
  m.def("pack", &run_pack, "sizes"_a, "packs"_a, "scales"_a, "offsets"_a.none(), "to"_a);
}

}  // namespace mlx_edge
