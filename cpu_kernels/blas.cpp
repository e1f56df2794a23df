// MLX's float matrix products and its LAPACK calls on OpenBLAS, instead of the reference BLAS of MLX's Linux wheel.
//
// libmlx reaches BLAS through the slots of its procedure linkage table. Here OpenBLAS's addresses are written into those
// slots, whenever libmlx was loaded and whether or not it has called them before: nothing has to be preloaded, and no
// other library of the process is affected. An MLX that was built with another BLAS is left alone. OpenBLAS is told to
// run one thread per call, because its own threads wait for each other by spinning: on a busy core that costs more than
// they bring. Large float32 products are shared out to our pool instead. Knows neither MLX's headers nor a kernel.

#include "blas.h"

#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <mutex>

#include "pool.h"

namespace mlx_edge {
namespace {

// What CBLAS calls its enumerations' values.
enum Layout : int { row_major = 101 };
enum Transpose : int { plain = 111, transposed = 112 };

using Gemm = void (*)(int layout, int transpose_a, int transpose_b, int m, int n, int k, float alpha, const float* a,
                      int lda, const float* b, int ldb, float beta, float* c, int ldc);
using Gemv = void (*)(int layout, int transpose, int rows, int columns, float alpha, const float* a, int lda,
                      const float* x, int step_x, float beta, float* y, int step_y);
Gemm openblas_gemm = nullptr;
Gemv openblas_gemv = nullptr;

constexpr int64_t SMALL = int64_t{1} << 21;  // multiply-adds that take less time than waking the pool
constexpr int PIECE = 64;                    // rows or columns; a multiple of OpenBLAS's tiles
constexpr int FEW = 4;                       // rows that do not pay for a packed copy of the other matrix

std::atomic<int64_t> num_products{0};

// C (m, n) = alpha * op(A) (m, k) * op(B) (k, n) + beta * C, all with rows behind one another.
struct Product {
  int transpose_a, transpose_b, m, n, k;
  float alpha;
  const float* a;
  int lda;
  const float* b;
  int ldb;
  float beta;
  float* c;
  int ldc;

  // From one row of op(A) to the next, and along it.
  ptrdiff_t row_step() const { return transpose_a == plain ? lda : 1; }
  ptrdiff_t row_stride() const { return transpose_a == plain ? 1 : lda; }
  // From one column of op(B) to the next, and along it.
  ptrdiff_t column_step() const { return transpose_b == plain ? 1 : ldb; }
  ptrdiff_t column_stride() const { return transpose_b == plain ? ldb : 1; }

  Product rows(ptrdiff_t begin, int count) const {
    Product part = *this;
    part.m = count;
    part.a += begin * row_step();
    part.c += begin * ldc;
    return part;
  }

  Product columns(ptrdiff_t begin, int count) const {
    Product part = *this;
    part.n = count;
    part.b += begin * column_step();
    part.c += begin;
    return part;
  }
};

// In the calling thread. Few rows or columns go one by one, as matrix times vector: that reads the matrix where it lies.
void compute(const Product& p) {
  if (p.m > FEW && p.n > FEW) {
    return openblas_gemm(row_major, p.transpose_a, p.transpose_b, p.m, p.n, p.k, p.alpha, p.a, p.lda, p.b, p.ldb,
                         p.beta, p.c, p.ldc);
  }
  if (p.m <= p.n) {
    const int transpose = p.transpose_b == plain ? transposed : plain;  // a row of C is op(B)^T times a row of op(A)
    const int height = p.transpose_b == plain ? p.k : p.n, width = p.transpose_b == plain ? p.n : p.k;
    for (int i = 0; i < p.m; i++) {
      openblas_gemv(row_major, transpose, height, width, p.alpha, p.b, p.ldb, p.a + i * p.row_step(), p.row_stride(),
                    p.beta, p.c + ptrdiff_t{i} * p.ldc, 1);
    }
    return;
  }
  const int height = p.transpose_a == plain ? p.m : p.k, width = p.transpose_a == plain ? p.k : p.m;
  for (int j = 0; j < p.n; j++) {
    openblas_gemv(row_major, p.transpose_a, height, width, p.alpha, p.a, p.lda, p.b + j * p.column_step(),
                  p.column_stride(), p.beta, p.c + j, p.ldc);
  }
}

// What libmlx calls: the product in pieces of its longer side, which the pool shares out.
void sgemm(int layout, int transpose_a, int transpose_b, int m, int n, int k, float alpha, const float* a, int lda,
           const float* b, int ldb, float beta, float* c, int ldc) {
  num_products.fetch_add(1, std::memory_order_relaxed);
  if (layout != row_major) {
    return openblas_gemm(layout, transpose_a, transpose_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
  }
  const Product product{transpose_a, transpose_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc};
  if (int64_t{m} * n * k < SMALL || std::max(m, n) <= PIECE) return compute(product);
  Pool& pool = Pool::of_process();
  const std::lock_guard turn(pool.turn());
  const int length = std::max(m, n);
  // Long pieces keep the repeated packing of the other operand small; their number depends on the shape alone.
  const int piece = std::max(PIECE, (length / 16 + PIECE - 1) / PIECE * PIECE);
  pool.run((length + piece - 1) / piece, 1, [&](int first, int last) {
    for (int i = first; i < last; i++) {
      const ptrdiff_t begin = ptrdiff_t{i} * piece;
      const int count = std::min<ptrdiff_t>(piece, length - begin);
      compute(n >= m ? product.columns(begin, count) : product.rows(begin, count));
    }
  });
}

// What a loaded library says of the functions that it calls in others.
struct Calls {
  explicit Calls(const link_map& library) : base(library.l_addr) {
    for (const ElfW(Dyn)* entry = library.l_ld; entry->d_tag != DT_NULL; entry++) {
      const auto value = entry->d_un.d_val;
      if (entry->d_tag == DT_JMPREL) relocations = at<ElfW(Rela)>(value);
      if (entry->d_tag == DT_PLTRELSZ) count = value / sizeof(ElfW(Rela));
      if (entry->d_tag == DT_SYMTAB) symbols = at<ElfW(Sym)>(value);
      if (entry->d_tag == DT_STRTAB) names = at<char>(value);
      if (entry->d_tag == DT_BIND_NOW) is_read_only = true;
      if (entry->d_tag == DT_FLAGS && (value & DF_BIND_NOW)) is_read_only = true;
      if (entry->d_tag == DT_FLAGS_1 && (value & DF_1_NOW)) is_read_only = true;
    }
  }

  const char* name(size_t i) const { return names + symbols[ELF64_R_SYM(relocations[i].r_info)].st_name; }
  void** slot(size_t i) const { return reinterpret_cast<void**>(base + relocations[i].r_offset); }

  // glibc has already added the base to these, other loaders have not.
  template <class T>
  const T* at(uintptr_t value) const {
    return reinterpret_cast<const T*>(value < base ? base + value : value);
  }

  uintptr_t base;
  const ElfW(Rela)* relocations = nullptr;
  const ElfW(Sym)* symbols = nullptr;
  const char* names = nullptr;
  size_t count = 0;
  bool is_read_only = false;
};

bool write_slot(void** slot, void* function, bool is_read_only) {
  const uintptr_t page_size = sysconf(_SC_PAGESIZE);
  void* page = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(slot) / page_size * page_size);
  if (is_read_only && mprotect(page, page_size, PROT_READ | PROT_WRITE)) return false;
  __atomic_store_n(slot, function, __ATOMIC_RELEASE);
  if (is_read_only) mprotect(page, page_size, PROT_READ);
  return true;
}

std::string file_of(const void* function) {
  Dl_info info;
  return function && dladdr(function, &info) && info.dli_fname ? info.dli_fname : "";
}

// The wheel's own libraries lie in a folder of this name; another build, or a preloaded library, is somebody's choice.
bool is_reference(const std::string& file) {
  return file.find("/mlx_cpu.libs/libblas") != std::string::npos ||
         file.find("/mlx_cpu.libs/liblapack") != std::string::npos;
}

// One thread from the start: threads that OpenBLAS makes when it is loaded spin for a while before they sleep.
void* load_alone(const std::string& openblas) {
  constexpr const char* variable = "OPENBLAS_NUM_THREADS";
  const char* value = std::getenv(variable);
  const std::string before = value ? value : "";
  setenv(variable, "1", 1);
  void* library = dlopen(openblas.c_str(), RTLD_NOW | RTLD_LOCAL);
  value ? setenv(variable, before.c_str(), 1) : unsetenv(variable);
  return library;
}

std::string connect(const std::string& libmlx, const std::string& openblas) {
  void* mlx = dlopen(libmlx.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  link_map* library = nullptr;
  if (!mlx || dlinfo(mlx, RTLD_DI_LINKMAP, &library)) return libmlx + " is not loaded";
  void* fast = load_alone(openblas);
  if (!fast) return dlerror();
  const auto set_threads = reinterpret_cast<void (*)(int)>(dlsym(fast, "scipy_openblas_set_num_threads"));
  openblas_gemm = reinterpret_cast<Gemm>(dlsym(fast, "scipy_cblas_sgemm"));
  openblas_gemv = reinterpret_cast<Gemv>(dlsym(fast, "scipy_cblas_sgemv"));
  if (!set_threads || !openblas_gemm || !openblas_gemv) return openblas + " has no scipy_cblas_sgemm";
  set_threads(1);

  std::string reason = "libmlx calls no cblas_sgemm";
  const Calls calls(*library);
  for (size_t i = 0; i < calls.count; i++) {
    const std::string name = calls.name(i);
    const bool is_sgemm = name == "cblas_sgemm";
    void* function = is_sgemm ? reinterpret_cast<void*>(&sgemm) : dlsym(fast, ("scipy_" + name).c_str());
    if (!function) continue;
    std::string file = file_of(*calls.slot(i));
    if (file == library->l_name) file = file_of(dlsym(mlx, name.c_str()));  // not bound yet: it comes from there
    if (!is_reference(file)) {
      if (is_sgemm) reason = "MLX's BLAS is not the one of its wheel and is left alone: " + file;
    } else if (!write_slot(calls.slot(i), function, calls.is_read_only)) {
      return "libmlx's call slots cannot be written";
    } else if (is_sgemm) {
      reason.clear();
    }
  }
  return reason;
}

}  // namespace

std::string connect_blas(const std::string& libmlx, const std::string& openblas) {
  static std::mutex mutex;
  static std::string reason;
  static bool is_tried = false;
  const std::lock_guard lock(mutex);
  if (!is_tried) reason = connect(libmlx, openblas);
  is_tried = true;
  return reason;
}

int64_t blas_products() { return num_products.load(std::memory_order_relaxed); }

}  // namespace mlx_edge
