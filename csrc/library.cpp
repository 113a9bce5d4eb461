// The choice of instruction set.
#include <cstdlib>
#include <cstring>

#include "isa.h"
#include "torch_cpu.h"

namespace fastscore {

int isa_level() {
  static const int level = [] {
#if defined(FASTSCORE_X86)
    __builtin_cpu_init();
    int best = 0;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = 1;
    if (best == 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw"))
      best = 2;
    const char* limit = std::getenv("FASTSCORE_ISA");
    if (limit && !std::strcmp(limit, "baseline")) best = 0;
    if (limit && !std::strcmp(limit, "avx2") && best > 1) best = 1;
    return best;
#else
    return 0;
#endif
  }();
  return level;
}

namespace {
int64_t isa(int64_t) { return isa_level(); }
}  // namespace

STABLE_TORCH_LIBRARY(fastscore, m) { m.def("isa(int unused) -> int"); }
STABLE_TORCH_LIBRARY_IMPL(fastscore, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&isa)); }

}  // namespace fastscore
