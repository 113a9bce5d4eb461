// Sums over the elements of a sample that involve its noise: the loss, and the inner product its derivatives need.
#pragma once
#include "isa.h"
#include "nest.h"
#include "philox.h"

namespace fastscore {

enum ReduceMode : int { kLoss, kDot };   // 1/2 |sigma s + z|^2, or s . z

struct ReduceArgs {
  double* partial;         // (samples, chunks)
  const void* score;
  const void* noise;       // given; null: drawn under the key
  DType dtype;
  Nest nest;               // of the score, and of noise that is given
  const void* sigma_each;  // (B,) in the compute type, or null
  double sigma;
  ReduceMode mode;
  int64_t per_sample, chunks;
  NoiseKey key;
};

constexpr int64_t kChunk = 16384;   // elements per partial sum: fixed, so the result does not depend on the threads

// Tasks are chunks of long samples, or runs of whole samples that fit a tile.
FS_DECLARE(noise_reduce, const ReduceArgs&, int64_t begin, int64_t end)
void launch(ReduceArgs& p, int64_t batch, void* out);   // the copy for this processor, on all threads; out (B,) in the compute type

}  // namespace fastscore
