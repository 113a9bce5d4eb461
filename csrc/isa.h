// Every kernel source is compiled three times (build_support/native.py): FASTSCORE_ISA names the copy, and the baseline
// copy also holds the operator that picks one of the three when it runs.
#pragma once

#define FS_JOIN_(a, b) a##_##b
#define FS_JOIN(a, b) FS_JOIN_(a, b)
#define FS_KERNEL(name) FS_JOIN(name, FASTSCORE_ISA)

#define FS_DECLARE(name, ...)       \
  void name##_baseline(__VA_ARGS__); \
  void name##_avx2(__VA_ARGS__);     \
  void name##_avx512(__VA_ARGS__);

#if defined(FASTSCORE_X86)
#define FS_PICK(name)                               \
  (::fastscore::isa_level() == 2   ? name##_avx512 \
   : ::fastscore::isa_level() == 1 ? name##_avx2   \
                                   : name##_baseline)
#else
#define FS_PICK(name) name##_baseline
#endif

namespace fastscore {
int isa_level();   // 0 baseline, 1 AVX2, 2 AVX-512: what the processor has, or less where FASTSCORE_ISA says so
}
