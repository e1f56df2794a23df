// The kernels over one row of one instruction set against doubles. No MLX.
//
// Compiled with the flags of the instruction set that MLX_EDGE_ISA names; ends with 1 at the first thing that is wrong.
#include <cmath>
#include <cstdio>
#include <vector>

#include "check.h"
#include "vector.h"

using namespace mlx_edge;
namespace isa = mlx_edge::MLX_EDGE_ISA;
using check::expect, check::random_row, check::Floats32;

namespace {

void check_rms_norm() {
  for (int n : {1, 7, 8, 33, 64, 2048, 2051}) {
    const Floats32 x = random_row(n, 3.0f), weight = random_row(n);
    Floats32 y(n);
    isa::rms_norm(x.data(), weight.data(), 1e-5f, y.data(), n);
    double sum = 0;
    for (float v : x) sum += static_cast<double>(v) * v;
    for (int i = 0; i < n; i++) {
      const double truth = x[i] / std::sqrt(sum / n + 1e-5) * weight[i];
      expect(std::fabs(y[i] - truth) <= 1e-6 * std::fabs(truth), "rms_norm n=%d: %.8g, not %.8g", n, y[i], truth);
    }
  }
}

void check_glu() {
  for (int n : {1, 15, 16, 1003}) {
    for (Activation activation : {Activation::silu, Activation::gelu_tanh, Activation::swiglu_oai}) {
      const Floats32 gate = random_row(n, n == 1003 ? 100.0f : 5.0f), up = random_row(n);
      Floats32 y = gate;
      isa::glu(activation, y.data(), up.data(), y.data(), n);
      for (int i = 0; i < n; i++) {
        const bool is_oai = activation == Activation::swiglu_oai;
        const double x = is_oai ? std::fmin(gate[i], 7.0) : gate[i], u = 0.7978845608028654 * (x + 0.044715 * x * x * x);
        const double exponent = is_oai ? 1.702 * x : activation == Activation::silu ? x : 2 * u;
        const double factor = is_oai ? std::fmax(-7.0, std::fmin(up[i], 7.0)) + 1 : up[i];
        const double truth = x / (1 + std::exp(-exponent)) * factor;
        // The exponent is rounded to a float, so the error grows with it; what is far below 1 may be less exact.
        const double bound = (1e-6 + 2e-7 * std::fmin(std::fabs(exponent), 90)) * std::fabs(truth) + 1e-30;
        expect(std::fabs(y[i] - truth) <= bound, "glu of %.8g: %.8g, not %.8g", x, y[i], truth);
      }
    }
  }
}

void check_cap() {
  for (int n : {1, 16, 1003}) {
    for (float softcap : {0.0f, 30.0f, 0.5f}) {
      const Floats32 x = random_row(n, 100.0f);
      Floats32 y = x;
      y.push_back(12345.0f);
      isa::cap(y.data(), 0.75f, softcap, n);
      for (int i = 0; i < n; i++) {
        const double scaled = 0.75 * x[i], truth = softcap > 0 ? softcap * std::tanh(scaled / softcap) : scaled;
        const double bound = softcap > 0 ? 3e-7 * softcap : 1e-7 * std::fabs(truth);
        expect(std::fabs(y[i] - truth) <= bound, "cap of %.8g at %g: %.8g, not %.8g", x[i], softcap, y[i], truth);
      }
      expect(y[n] == 12345.0f, "cap of %d wrote beyond", n);
    }
  }
}

void check_rotate() {
  for (int dims : {2, 6, 16, 34, 64, 80}) {
    for (bool is_interleaved : {false, true}) {
      const int half = dims / 2;
      Floats32 head = random_row(dims + 4), cosines(half), sines(half);
      for (int i = 0; i < half; i++) cosines[i] = std::cos(i + 1.0f), sines[i] = std::sin(i + 1.0f);
      const Floats32 before = head;
      isa::rotate(head.data(), cosines.data(), sines.data(), dims, is_interleaved);
      for (int i = 0; i < half; i++) {
        const int a = is_interleaved ? 2 * i : i, b = is_interleaved ? 2 * i + 1 : i + half;
        const double c = cosines[i], s = sines[i];
        expect(std::fabs(head[a] - (before[a] * c - before[b] * s)) < 3e-7, "rotate dims=%d first of pair %d", dims, i);
        expect(std::fabs(head[b] - (before[b] * c + before[a] * s)) < 3e-7, "rotate dims=%d second of pair %d", dims, i);
      }
      for (int i = dims; i < dims + 4; i++) expect(head[i] == before[i], "rotate dims=%d changed element %d", dims, i);
    }
  }
}

void check_argmax() {
  for (int n : {1, 5, 16, 1024, 5000}) {
    Floats32 x = random_row(n);
    for (int where : {0, n / 2, n - 1}) {
      Floats32 y = x;
      y[where] = 7.0f;
      y[n - 1] = 7.0f;  // an equal one later on
      if (n > 4 && where > 1) y[1] = NAN;
      expect(isa::argmax(y.data(), n) == where, "argmax n=%d: %d, not %d", n, isa::argmax(y.data(), n), where);
    }
  }
  Floats32 low(2000, NAN);
  expect(isa::argmax(low.data(), 2000) == 0, "argmax of nothing but NaN is not 0");
  low[1500] = -INFINITY;
  expect(isa::argmax(low.data(), 2000) == 1500, "NaN won over -inf");
}

}  // namespace

int main() {
  check_rms_norm();
  check_glu();
  check_cap();
  check_rotate();
  check_argmax();
  std::printf("%d checks\n", check::checks);
}
