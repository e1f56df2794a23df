// Which instruction set this machine gets.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace mlx_edge {

#if defined(__x86_64__)
namespace avx512 {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
#elif defined(__aarch64__)
namespace neon {
extern const Kernels kernels;
}
#endif
namespace scalar {
extern const Kernels kernels;
}

namespace {

struct Choice {
  const Kernels* kernels;
  bool can_run;
};

#if defined(__aarch64__)
bool has_dot_products() {
#if defined(__linux__)
  constexpr unsigned long asimd_dot_product = 1ul << 20;  // HWCAP_ASIMDDP
  return getauxval(AT_HWCAP) & asimd_dot_product;
#else
  return true;  // every Apple chip
#endif
}
#endif

}  // namespace

const Kernels* find_kernels(const char* name) {
  const Choice choices[] = {  // the best first
#if defined(__x86_64__)
      {&avx512::kernels, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                             __builtin_cpu_supports("avx512vnni")},
      {&avx2::kernels,
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
#elif defined(__aarch64__)
      {&neon::kernels, has_dot_products()},
#endif
      {&scalar::kernels, true},
  };
  if (!name) name = std::getenv("MLX_EDGE_CPU_ISA");
  for (const Choice& choice : choices)
    if (choice.can_run && (!name || !*name || std::strcmp(name, choice.kernels->name) == 0)) return choice.kernels;
  return nullptr;
}

}  // namespace mlx_edge
