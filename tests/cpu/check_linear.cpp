// The matmul kernels of one instruction set against doubles. No MLX.
//
//   check_linear           all checks
//   check_linear FILE      the same, and results against those in FILE, which another set wrote; written if it is not there
//
// Compiled with the flags of the instruction set that MLX_EDGE_ISA names; ends with 1 at the first thing that is wrong.
#include <memory>
#include <string>

#include "check.h"
#include "linear.h"

using namespace mlx_edge;
using namespace check;
namespace isa = mlx_edge::MLX_EDGE_ISA;

namespace {

Floats32 results;             // of the largest products, for another instruction set
std::vector<double> allowed;  // how far they may be apart

// Rows of activations with the room that a kernel writes their codes to, all exactly as long as promised.
struct Activations {
  Floats32 values;
  std::unique_ptr<uint8_t[]> codes;
  Floats32 scales, sums;
  Rows rows;

  Activations(const Floats32& x, int stride, int count, int columns, int group, bool is_int8)
      : values(x.begin(), x.begin() + (count - 1) * stride + columns) {
    rows = {values.data(), stride, count, columns, group, nullptr, nullptr, nullptr};
    if (!is_int8) return;
    codes.reset(new uint8_t[isa::codes_bytes(count, columns)]);
    scales.resize(isa::scales_count(count, columns, group), -1.0f);
    sums = scales;
    rows.codes = reinterpret_cast<int8_t*>(codes.get()), rows.scales = scales.data(), rows.sums = sums.data();
    const int groups = columns / group, half = groups / 2;  // in pieces, as threads do
    isa::quantize(rows, 0, count, half, groups);
    for (int m = 0; m < count; m++) isa::quantize(rows, m, m + 1, 0, half);
  }
};

// x as int8 codes say it, from the definition.
std::vector<double> rounded(const Floats32& x, int stride, int count, int columns, int group) {
  std::vector<double> y(x.begin(), x.end());
  for (int m = 0; m < count; m++)
    for (int k = 0; k < columns; k += group) {
      float top = 0;
      for (int i = 0; i < group; i++) top = std::max(top, std::fabs(x[m * stride + k + i]));
      const float inverse = 127.0f / top;
      for (int i = 0; i < group; i++) {
        const size_t at = m * stride + k + i;
        y[at] = static_cast<double>(top) / 127.0 * std::nearbyint(x[at] * inverse);
      }
    }
  return y;
}

constexpr float CANARY = 12345.0f;

// y (count, N + 3) for blocks in the order and the pieces given by `step`.
Floats32 multiply(const Matrix& w, const Activations& x, const Floats32* add, int step) {
  const int stride = w.rows + 3, blocks = num_blocks(w);
  Floats32 y(x.rows.count * stride, CANARY);
  y.resize((x.rows.count - 1) * stride + w.rows);
  const int last = (blocks - 1) / step * step;
  for (int b = last; b >= 0; b -= step)
    isa::multiply(w, x.rows, add ? add->data() : nullptr, y.data(), stride, b, std::min(b + step, blocks));
  for (int m = 0; m + 1 < x.rows.count; m++)
    for (int i = w.rows; i < stride; i++) expect(y[m * stride + i] == CANARY, "wrote beyond row %d, N = %d", m, w.rows);
  return y;
}

struct Case {
  std::string name;
  bool is_int8;
  int group;  // of the activations
};

bool same_bits(const float* a, const float* b, int n) { return std::memcmp(a, b, n * sizeof(float)) == 0; }

// All rows and columns against the oracle; keeps the results for the other instruction sets.
Floats32 check_values(const Case& c, const Weight& w, const Floats32& x, int stride, int count) {
  const int n = w.matrix.rows, k = w.matrix.columns;
  const Floats32 y = multiply(w.matrix, {x, stride, count, k, c.group, c.is_int8}, nullptr, num_blocks(w.matrix));
  const std::vector<double> exact(x.begin(), x.end()), codes = c.is_int8 ? rounded(x, stride, count, k, c.group) : exact;
  double error = 0, size = 0;
  for (int m = 0; m < count; m++)
    for (int row = 0; row < n; row++) {
      double truth = 0, seen = 0, parts = 0;
      for (int i = 0; i < k; i++) {
        const double a = exact[m * stride + i], b = codes[m * stride + i], v = w.value(row, i);
        truth += a * v, seen += b * v, parts += std::fabs(b) * w.part(row, i);
        size += a * a * v * v;
      }
      const float got = y[m * (n + 3) + row];
      expect(std::fabs(got - seen) <= 1e-6 * parts, "%s K=%d row %d column %d: %.9g, not %.9g (parts %g)", c.name.c_str(), k,
             m, row, got, seen, parts);
      error += (got - truth) * (got - truth);
      results.push_back(got), allowed.push_back(1e-6 * parts);
    }
  if (c.is_int8)
    expect(std::sqrt(error / size) < 0.015, "%s K=%d: int8 activations are %.2f %% off", c.name.c_str(), k,
           100 * std::sqrt(error / size));
  return y;
}

// A row's bits depend neither on its neighbours nor on how blocks are shared out nor on rows of the weight after it.
void check_promises(const Case& c, const Weight& w, const Floats32& x, int stride, const Floats32& y) {
  const int n = w.matrix.rows, k = w.matrix.columns;
  const auto compare = [&](const Floats32& part, int first, int count, int rows, const char* what) {
    for (int m = 0; m < count; m++)
      expect(same_bits(&part[m * (rows + 3)], &y[(first + m) * (n + 3)], rows), "%s K=%d M=%d N=%d: other bits %s",
             c.name.c_str(), k, count, rows, what);
  };
  for (int count : {1, 2, 5, 8, 19}) {
    const int first = count % 3;
    const Activations some({x.begin() + first * stride, x.end()}, stride, count, k, c.group, c.is_int8);
    compare(multiply(w.matrix, some, nullptr, 1), first, count, n, "with fewer rows, block by block");
  }
  for (int rows : {1, 15, 16, 17}) {
    Weight fewer = w;
    fewer.matrix.rows = rows;
    if (w.matrix.format == Format::dense) {
      fewer.rows.resize(fewer.rows.size() / n * rows), fewer.rows.shrink_to_fit();
      fewer.matrix.data = fewer.rows.data();
    } else {
      fewer.packed.clear(), fewer.packed.shrink_to_fit();
      repack(fewer);
    }
    compare(multiply(fewer.matrix, {x, stride, 5, k, c.group, c.is_int8}, nullptr, 1), 0, 5, rows, "with a shorter weight");
  }
}

// y = add + x . W^T + bias, `add` apart or y itself.
void check_sum(const Case& c, Weight& w, const Floats32& x, int stride, const Floats32& y) {
  const int n = w.matrix.rows, count = 7;
  const Activations some(x, stride, count, w.matrix.columns, c.group, c.is_int8);
  const Floats32 plus = random_row(count * (n + 3));
  w.matrix.bias = w.bias.data();
  const Floats32 sum = multiply(w.matrix, some, &plus, 1);
  Floats32 in_place = plus;
  isa::multiply(w.matrix, some.rows, in_place.data(), in_place.data(), n + 3, 0, num_blocks(w.matrix));
  w.matrix.bias = nullptr;
  for (int m = 0; m < count; m++) {
    for (int i = 0; i < n; i++) {
      const float whole = y[m * (n + 3) + i] + w.bias[i] + plus[m * (n + 3) + i];
      expect(sum[m * (n + 3) + i] == whole, "%s: a sum is %g, not %g", c.name.c_str(), sum[m * (n + 3) + i], whole);
    }
    expect(same_bits(&sum[m * (n + 3)], &in_place[m * (n + 3)], n), "%s: other bits when add is y", c.name.c_str());
  }
}

void check_all(const Case& c, Weight& w) {
  const int k = w.matrix.columns, stride = k + 5, count = 64 + 3;
  const Floats32 x = random_row(count * stride);
  const Floats32 y = check_values(c, w, x, stride, count);
  check_promises(c, w, x, stride, y);
  check_sum(c, w, x, stride, y);
}

void check_layout(const Weight& w) {
  Floats32 row(w.matrix.columns);
  for (int n = 0; n < w.matrix.rows; n++) {
    unpack_row(w.matrix, n, row.data());
    for (int k = 0; k < w.matrix.columns; k++)
      expect(std::fabs(row[k] - w.value(n, k)) <= 1.2e-7 * std::fabs(w.value(n, k)), "%d bits: unpacked %.9g, not %.9g",
             w.matrix.bits, row[k], w.value(n, k));
  }
  if (w.matrix.format == Format::dense) return;
  std::vector<uint8_t> other(w.packed.size(), 0xcc);
  for (int b = num_blocks(w.matrix) - 1; b >= 0; b--)
    pack(w.matrix, w.packs.data(), w.scales.data(), w.offsets.data(), other.data(), b, b + 1);
  expect(other == w.packed, "%d bits: packed block by block it is another matrix", w.matrix.bits);
}

void check_packed() {
  const char* types[] = {"f32", "f16", "bf16"};
  for (int bits : {2, 3, 4, 5, 6, 8, 104})
    for (int group : {32, 64, 128})
      for (int type = 0; type < 3; type++) {
        const bool is_mxfp4 = bits == 104;
        if (is_mxfp4 && (group != 32 || type != 0)) continue;
        for (int k : {group, 3 * group, 1152 + group}) {
          if (k > 1000 && !is_mxfp4 && type != (bits + group / 32) % 3) continue;  // long rows with one of the types
          Weight w = random_packed(is_mxfp4 ? Format::mxfp4 : Format::affine, is_mxfp4 ? 4 : bits, group,
                                   static_cast<Float>(type), 40, k);
          expect(!refuse(w.matrix), "%d bits were refused", bits);
          const std::string name = (is_mxfp4 ? "mxfp4" : std::to_string(bits) + " bits, group " + std::to_string(group) +
                                                             ", scales " + types[type]);
          check_layout(w);
          check_all({name + ", int8", true, group}, w);
          if (k <= 1000 || group == 64 || is_mxfp4) check_all({name + ", float", false, group}, w);
        }
      }
}

void check_dense() {
  for (Float type : {Float::f32, Float::f16, Float::bf16})
    for (int k : {1, 7, 16, 45, 1031}) {
      Weight w = random_dense(type, 40, k);
      check_layout(w);
      check_all({"dense " + std::to_string(static_cast<int>(type)), false, 64}, w);
    }
}

// Values that are no numbers are seen in their own row and in no other; what is next to nothing is nothing.
void check_unusual_values() {
  Weight w = random_packed(Format::affine, 4, 64, Float::f16, 17, 192);
  Floats32 x = random_row(6 * 192);
  const Floats32 before = multiply(w.matrix, {x, 192, 6, 192, 64, true}, nullptr, 2);
  x[192 + 70] = INFINITY, x[2 * 192 + 3] = NAN;
  for (int i = 0; i < 192; i++) x[3 * 192 + i] = 1e-39f, x[4 * 192 + i] = 0.0f;
  const Floats32 y = multiply(w.matrix, {x, 192, 6, 192, 64, true}, nullptr, 2);
  for (int n = 0; n < 17; n++) {
    expect(std::isnan(y[20 + n]) && std::isnan(y[40 + n]), "a value that is no number was lost");
    expect(y[60 + n] == 0.0f && y[80 + n] == 0.0f, "nothing became %g", y[60 + n]);
    expect(y[n] == before[n] && y[100 + n] == before[100 + n], "a neighbour's values were changed");
  }
}

void check_refusals() {
  const auto refuses = [](Format format, int n, int k, int bits, int group) {
    return refuse({format, n, k, bits, group, Float::f16, nullptr, nullptr}) != nullptr;
  };
  expect(refuses(Format::affine, 16, 96, 4, 64), "96 columns in groups of 64 were taken");
  expect(refuses(Format::affine, 16, 128, 7, 64), "7 bits were taken");
  expect(refuses(Format::affine, 16, 128, 1, 64), "1 bit was taken");
  expect(refuses(Format::affine, 16, 128, 4, 16), "groups of 16 were taken");
  expect(refuses(Format::mxfp4, 16, 128, 4, 64), "mxfp4 in groups of 64 was taken");
  expect(refuses(Format::affine, 0, 128, 4, 64), "no rows were taken");
  expect(!refuses(Format::dense, 3, 7, 0, 0), "a dense 3 x 7 was refused");
}

// The results of another instruction set, in the same order.
void compare_or_write(const char* path) {
  if (FILE* file = std::fopen(path, "rb")) {
    Floats32 other(results.size() + 1);
    const size_t count = std::fread(other.data(), sizeof(float), other.size(), file);
    std::fclose(file);
    expect(count == results.size(), "%zu results in %s, %zu here", count, path, results.size());
    for (size_t i = 0; i < count; i++)
      expect(std::fabs(results[i] - other[i]) <= allowed[i], "result %zu is %.9g, in %s %.9g", i, results[i], path, other[i]);
    return;
  }
  FILE* file = std::fopen(path, "wb");
  expect(file && std::fwrite(results.data(), sizeof(float), results.size(), file) == results.size(), "cannot write %s", path);
  std::fclose(file);
}

}  // namespace

int main(int argc, char** argv) {
  check_refusals();
  check_unusual_values();
  check_dense();
  check_packed();
  if (argc > 1) compare_or_write(argv[1]);
  std::printf("%d checks\n", checks);
}
