// An activation of a value and of its derivatives, of first or of first and second order: arguments of one call, forward or (with g) backward.
#pragma once
#include "isa.h"
#include "nest.h"

namespace fastscore {

enum Activation : int { kIdentity, kElu, kSilu, kRelu, kGelu, kSoftplus, kTanh, kSigmoid, kGeluTanh };   // as numbered in fastscore/ops

// First order: stacks (1 + M, n) of u and du, y and dy. Second: (1 + 2M, n) of u, all u', all u''; or (1 + M, n) where u'' = 0.
struct ActivateArgs {
  void* out;               // y and its derivatives, or the cotangents of s
  const void *s, *g;       // u and its derivatives; null, or the cotangents of y and its derivatives
  DType dtype;
  int64_t n, directions;   // M
  bool straight;           // second order: u'' = 0
  int activation;
};

FS_DECLARE(activate_dual, const ActivateArgs&, int64_t begin, int64_t end)
FS_DECLARE(activate_jet, const ActivateArgs&, int64_t begin, int64_t end)
void launch(const ActivateArgs& p, bool second);   // the copy of first or second order for this processor, on all threads

}  // namespace fastscore
