// Rademacher projections, and their transpose: signs are bits of Philox words, never numbers in memory.
#pragma once
#include "isa.h"
#include "nest.h"
#include "philox.h"

namespace fastscore {

constexpr int64_t kSignChunk = 8192;   // elements per partial sum: fixed, so the result does not depend on the threads

struct ProjectArgs {
  const void *js, *s;           // (M, B, *) and (B, *), or null
  void *vjv, *vs, *ss;          // (M, B), (M, B) and (B) in the compute type
  double* partial;              // (tasks, 2 M + 1) where a sample has several chunks
  DType dtype;
  Nest js_nest, s_nest;
  int64_t projections, samples, per_sample, chunks;
  NoiseKey key;                 // of projection 0: the substream counts them
};

struct SpreadArgs {
  const void *g_vjv, *g_vs, *g_ss, *s;   // (M, B), (M, B), (B) in the compute type; (B, *); each may be null
  void *gjs, *gs;                        // (M, B, *), (B, *), or null
  DType dtype;
  Nest gjs_nest, gs_nest, s_nest;
  int64_t projections, samples, per_sample, chunks;
  bool bypass_cache;
  NoiseKey key;
};

// Tasks are chunks of long samples, or whole samples, of which runs share their words.
FS_DECLARE(rademacher_project, const ProjectArgs&, int64_t begin, int64_t end)
FS_DECLARE(rademacher_spread, const SpreadArgs&, int64_t begin, int64_t end)

// The copy for this processor, on all threads; chunks, partial sums and bypass_cache are theirs to set.
void launch(ProjectArgs& p);
void launch(SpreadArgs& p);

}  // namespace fastscore
