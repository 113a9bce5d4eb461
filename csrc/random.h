// A tensor of words, uniforms, normals or signs: the arguments of one call.
#pragma once
#include "isa.h"
#include "nest.h"
#include "philox.h"

namespace fastscore {

enum FillKind : int { kWords, kUniform, kNormal, kRademacher };

struct FillArgs {
  void* out;
  DType dtype;
  FillKind kind;
  NoiseKey key;
};

FS_DECLARE(fill, const FillArgs&, int64_t begin, int64_t end)
void launch(const FillArgs& p, int64_t n);   // the copy for this processor, on all threads

}  // namespace fastscore
