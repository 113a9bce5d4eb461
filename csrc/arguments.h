// What the operators that run on more than one device ask of their arguments, so that each device refuses the same in the same words.
#pragma once
#include <vector>

#include "activate.h"
#include "denoising_loss.h"
#include "normalise.h"
#include "random.h"
#include "refuse.h"

namespace fastscore {

inline void check_fill(const Checks& check, const Tensor& out, int64_t kind, const OptionalTensor& key, int64_t stream, int64_t offset) {
  check.number("kind", kind, kWords, kRademacher);
  if (kind == kWords) check.dtype("out", out, kInt64);
  else check.floating("out", out);
  check.memory("out", out);
  if (!out.is_contiguous()) check.refuse("out must be contiguous");
  check.key(key, stream, offset);
}

inline void check_update(const Checks& check, const Tensor& out, const OptionalTensor& x, const OptionalTensor& direction,
                         const OptionalTensor& drift_each, const OptionalTensor& diffusion_each, const OptionalTensor& key, int64_t stream,
                         int64_t offset) {
  const int64_t batch = out.dim() == 0 ? 1 : out.size(0);
  const DType dtype = check.floating("out", out);
  check.like("x", x, out);
  check.like("direction", direction, out);
  check.coefficient("drift_each", drift_each, dtype, batch);
  check.coefficient("diffusion_each", diffusion_each, dtype, batch);
  check.key(key, stream, offset);
  if (out.numel() == 0) return;
  check.written("out", out);
  check.apart("out", out, "x", x, true);
  check.apart("out", out, "direction", direction, true);
  check.apart("out", out, "drift_each", drift_each);
  check.apart("out", out, "diffusion_each", diffusion_each);
}

inline void check_reduce(const Checks& check, const Tensor& out, const Tensor& score, const OptionalTensor& sigma_each,
                         const OptionalTensor& key, int64_t stream, int64_t offset, int64_t mode) {
  const DType dtype = check.floating("score", score);
  if (score.dim() == 0) check.refuse("score must be (B, *); got ()");
  const int64_t batch = score.size(0);
  check.table("out", out, compute_dtype(dtype), {batch});
  check.coefficient("sigma_each", sigma_each, dtype, batch);
  check.number("reduction", mode, kLoss, kDot);
  check.key(key, stream, offset);
  check.apart("out", out, "score", score);
  check.apart("out", out, "sigma_each", sigma_each);
}

// Whether the trailing dimensions of an image, or of a stack of images, lie as (B, S, C).
inline bool lies_channels_last(const Tensor& t, int64_t image_dims) {
  const int64_t leading = t.dim() - image_dims;
  int64_t expected = 1;
  const auto next = [&](int64_t d) {
    const bool fits = t.size(d) == 1 || t.stride(d) == expected;
    expected *= t.size(d);
    return fits;
  };
  bool fits = next(leading + 1);
  for (int64_t d = t.dim() - 1; d >= leading + 2; --d) fits = next(d) && fits;
  for (int64_t d = leading; d >= 0; --d) fits = next(d) && fits;
  return fits;
}

// A tensor laid out as x is, shaped like it, or like M of it.
inline void check_image(const Checks& check, const char* name, const OptionalTensor& t, const Tensor& x, bool channels_last,
                        int64_t tangents = -1) {
  if (!t) return;
  check.memory(name, *t);
  check.dtype(name, *t, dtype_of(x));
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  if (tangents >= 0) sizes.insert(sizes.begin(), tangents);
  check.shape(name, *t, Sizes(sizes.data(), sizes.size()));
  if (t->numel() > 0 && !(channels_last ? lies_channels_last(*t, x.dim()) : t->is_contiguous()))
    check.refuse(name, " must lie in memory as x does");
}

// Of a norm and of its gradient; what the labels hold is only known where they lie.
inline NormArgs norm_arguments(const Checks& check, const Tensor& x, const OptionalTensor& t, const Tensor& coef, const OptionalTensor& tcoef,
                               const OptionalTensor& labels, int64_t groups, bool alpha, bool beta, double eps, int64_t activation) {
  NormArgs p{};
  p.dtype = check.floating("x", x);
  if (x.dim() < 2) check.refuse("x must be (B, C, *); got ", shown(x.sizes()));
  p.channels_last = !x.is_contiguous();
  if (p.channels_last && !lies_channels_last(x, x.dim())) check.refuse("x must be contiguous or channels-last");
  p.batch = x.size(0), p.channels = x.size(1);
  p.pixels = p.batch * p.channels ? x.numel() / (p.batch * p.channels) : 0;
  if (t && t->dim() == 0) check.refuse("t must be (M, B, C, *); got ()");
  p.tangents = t ? t->size(0) : 0;
  check_image(check, "t", t, x, p.channels_last, p.tangents);

  const DType wide = compute_dtype(p.dtype);
  const int64_t width = p.channels * (1 + alpha + beta), rows = coef.dim() == 2 ? coef.size(0) : 1;
  check.table("coef", coef, wide, {rows, width});
  if (!labels && rows != 1 && rows != p.batch) check.refuse("coef must have 1 or ", p.batch, " rows; got ", rows);
  if (!t) check.present("tcoef", tcoef, false, "t");
  check.table("tcoef", tcoef, wide, {p.tangents, rows, width});
  check.table("labels", labels, kInt64, {p.batch});
  check.number("groups", groups, 0, p.channels);
  if (groups && p.channels % groups) check.refuse("groups must divide ", p.channels, " channels; got ", groups);
  if (groups && alpha) check.refuse("alpha must not come with groups");
  if (!(eps > 0)) check.refuse("eps must be positive; got ", eps);
  check.number("activation", activation, kIdentity, kGeluTanh);

  p.groups = groups, p.has_alpha = alpha, p.has_beta = beta, p.eps = eps, p.activation = static_cast<int>(activation);
  p.x = x.const_data_ptr(), p.t = pointer(t);
  p.coef = coef.const_data_ptr(), p.tcoef = pointer(tcoef), p.coef_rows = coef.size(0);
  p.labels = static_cast<const int64_t*>(pointer(labels));
  return p;
}

// What a norm writes.
inline void check_norm(const Checks& check, const NormArgs& p, const OptionalTensor& y, const OptionalTensor& ty, const Tensor& stats,
                       const Tensor& x, const OptionalTensor& t, const Tensor& coef, const OptionalTensor& tcoef,
                       const OptionalTensor& labels) {
  if (!t) check.present("ty", ty, false, "t");
  check_image(check, "y", y, x, p.channels_last);
  check_image(check, "ty", ty, x, p.channels_last, p.tangents);
  check.table("stats", stats, compute_dtype(p.dtype), {1 + p.tangents, p.batch, p.channels, 2});
  check.apart({{"y", y}, {"ty", ty}, {"stats", stats}}, {{"x", x}, {"t", t}, {"coef", coef}, {"tcoef", tcoef}, {"labels", labels}});
}

// A tensor by its name and its device.
struct Located {
  const char* name;
  bool there = false, gpu = false;
  int32_t index = 0;

  Located(const char* name, const OptionalTensor& given) : name(name), there(given.has_value()) {
    if (!there) return;
    const Tensor& t = *given;
    gpu = t.is_cuda();
    index = t.get_device_index();
  }
  std::string device() const {
    const std::string kind = gpu ? "cuda" : "cpu";
    return gpu || index > 0 ? kind + ":" + std::to_string(index) : kind;
  }
};

// A kernel cannot reach another device's memory, nor the host's; an operator of the CPU is never called with a GPU's tensor.
inline void check_devices(const Checks& check, const Located& out, std::initializer_list<Located> others) {
  for (const Located& t : others)
    if (t.there && (t.gpu != out.gpu || t.index != out.index))
      check.refuse(t.name, " must lie on the device of ", out.name, ", ", out.device(), "; got ", t.device());
}

}  // namespace fastscore
