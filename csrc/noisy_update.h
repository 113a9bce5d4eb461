// x' = x + a d + b z: the arguments of one call, shared by the three CPU copies.
#pragma once
#include "isa.h"
#include "nest.h"
#include "philox.h"

namespace fastscore {

struct UpdateArgs {
  void* out;
  const void* x;           // null: no x term
  const void* direction;   // null: no direction term
  DType dtype;
  Nest nest;               // tensors: out, x, direction
  const void *drift_each, *diffusion_each;   // (B,) in the compute type, or null
  double drift, diffusion;
  int64_t n, per_sample;
  bool bypass_cache;
  NoiseKey key;
};

FS_DECLARE(noisy_update, const UpdateArgs&, int64_t begin, int64_t end)
void launch(UpdateArgs& p);   // the copy for this processor, on all threads

}  // namespace fastscore
