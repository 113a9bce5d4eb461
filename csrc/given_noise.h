// x' = x + (a d + b z) where z is given: the arguments of one call, shared by the three CPU copies.
#pragma once
#include "isa.h"
#include "nest.h"

namespace fastscore {

// All tensors lie in memory alike, element by element; samples one after another if a coefficient is one for each.
struct GivenArgs {
  void* out;
  const void *x, *direction, *noise;   // direction null: no direction term
  DType dtype;
  const void *drift_each, *diffusion_each;   // (B,) in the compute type, or null
  double drift, diffusion;
  int64_t n, per_sample;
};

FS_DECLARE(given_noise, const GivenArgs&, int64_t begin, int64_t end)
void launch(const GivenArgs& p);   // the copy for this processor, on all threads

}  // namespace fastscore
