// An activation of a value and of its tangents: arguments of one call, forward or (with g) backward.
#pragma once
#include "isa.h"
#include "nest.h"

namespace fastscore {

struct ActivateArgs {
  void* out;               // (1 + M, n): y and dy, or gu and gdu
  const void *s, *g;       // (1 + M, n): u and du; null, or gy and gdy
  DType dtype;
  int64_t n, tangents;
  int activation;
};

FS_DECLARE(activate_dual, const ActivateArgs&, int64_t begin, int64_t end)

}  // namespace fastscore
