// An activation of a value and of its first and second derivatives along directions: one call, forward or (with g) backward.
#pragma once
#include "isa.h"
#include "nest.h"

namespace fastscore {

struct ActivateJetArgs {
  void* out;               // (1 + 2M, n): y, y', y''; or, backward, like s
  const void *s, *g;       // (1 + 2M, n), or (1 + M, n) where u'' = 0: u, u', u''; null, or (1 + 2M, n): the cotangents
  DType dtype;
  int64_t n, directions;
  bool straight;           // u'' = 0
  int activation;
};

FS_DECLARE(activate_jet, const ActivateJetArgs&, int64_t begin, int64_t end)

}  // namespace fastscore
