// Normalisation with tangents: y = f(u), dy_m = f'(u) du_m, u = gamma (h + alpha m) + beta. Arguments of one call, forward or backward.
#pragma once
#include "isa.h"
#include "nest.h"

namespace fastscore {

struct NormArgs {
  DType dtype;
  bool channels_last;          // (B, S, C) in memory instead of (B, C, S)
  int64_t batch, channels, pixels, tangents, groups;   // groups 0: one per channel
  bool has_alpha, has_beta;
  double eps;
  int activation;
  // Of the element type: (B, C, S), tangents (M, B, C, S). Null: not there, or not wanted.
  const void *x, *t, *gy, *gty;
  void *y, *ty, *gx, *gt;
  // Of the compute type.
  const void *coef, *tcoef;    // (R, K C), (M, R, K C): columns gamma, alpha, beta
  void *gcoef, *gtcoef;        // (B, K C), (M, B, K C)
  void* stats;                 // (1 + M, B, C, 2): mean and variance over pixels, then mean t and mean t (x - mean) per tangent
  const int64_t* labels;       // (B,), the row of each sample; null: row b, or the only one
  int64_t coef_rows;
};

// A sample is done in phases: (backward only) tables from the saved statistics, sums over the pixels of channels [begin, end), the
// algebra between channels, the elementwise pass over channels [begin, end).
enum NormPhase : int { kRestore, kSums, kCombine, kApply, kAll };

FS_DECLARE(normalise, const NormArgs&, bool backward, NormPhase, int64_t sample, int64_t begin, int64_t end, void* scratch)
void launch(const NormArgs& p, bool backward);   // the copy for this processor, on all threads

// Tables over channels, in scratch memory of the compute type: one of each kind, then one of each kind for every tangent.
enum NormTable : int { kMean, kVariance, kScale, kShift, kRstd, kOffset, kHat, kSumG, kSumGx, kC4, kC5, kWork, kWork2, kFixed };
enum NormTangentTable : int { kTau, kXi, kP, kQ, kPool, kInner, kHatDot, kG, kGx, kGt, kC2, kC3, kD3, kPerTangent };

constexpr int64_t kPadding = 16;   // lanes of the longest vector: one of channels may be read past the last of them
inline int64_t scratch_size(const NormArgs& p) { return (kFixed + kPerTangent * p.tangents) * (p.channels + kPadding); }

}  // namespace fastscore
