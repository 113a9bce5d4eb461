// What an operator says of arguments that do not fit. The public functions have checked theirs; these checks are for whoever calls
// torch.ops.fastscore, whose kernel would read or write beyond a tensor.
#pragma once
#include <initializer_list>
#include <sstream>
#include <stdexcept>

#include "torch_tensor.h"

namespace fastscore {

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// A shape as Python prints it.
inline std::string shown(Sizes sizes) {
  std::ostringstream text;
  text << "(";
  for (size_t d = 0; d < sizes.size(); ++d) text << (d ? ", " : "") << sizes[d];
  text << (sizes.size() == 1 ? ",)" : ")");
  return text.str();
}

inline const char* shown(DType dtype) {
  constexpr const char* names[] = {"float32", "float64", "bfloat16", "float16", "int64"};
  return names[dtype];
}

inline DType compute_dtype(DType dtype) { return dtype == kFloat64 ? kFloat64 : kFloat32; }

// The first and the last byte but one of what a tensor may touch.
struct Extent {
  const char *begin, *end;

  explicit Extent(const Tensor& t) : begin(static_cast<const char*>(t.const_data_ptr())) {
    const Sizes sizes = t.sizes(), strides = t.strides();
    int64_t last = 0;
    for (size_t d = 0; d < sizes.size(); ++d) last += (sizes[d] - 1) * strides[d];
    end = begin + (last + 1) * static_cast<int64_t>(t.element_size());
  }
};

// What of an operator's tensors is told apart: a name, and the bytes, none where the tensor is missing or empty.
struct Place {
  const char *name, *begin = nullptr, *end = nullptr;

  Place(const char* name, const OptionalTensor& t) : name(name) {
    if (!t || t->numel() == 0) return;
    const Extent extent(*t);
    begin = extent.begin;
    end = extent.end;
  }
  bool meets(const Place& other) const { return begin < other.end && other.begin < end; }
};

inline bool same_view(const Tensor& a, const Tensor& b) {
  if (a.const_data_ptr() != b.const_data_ptr() || !a.sizes().equals(b.sizes())) return false;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  return true;
}

// The checks of one operator. Each throws one sentence: what, what is expected, what was found.
struct Checks {
  const char* op;

  template <class... Parts>
  [[noreturn]] void refuse(const Parts&... parts) const {
    std::ostringstream sentence;
    sentence << "fastscore: " << op << ": ";
    (sentence << ... << parts);
    sentence << ".";
    throw std::runtime_error(sentence.str());
  }

  void memory(const char* name, const Tensor& t) const {
    if (t.dim() > kMaxDims) refuse(name, " must have at most ", kMaxDims, " dimensions; got ", t.dim());
    if (t.numel() > 0 && !t.const_data_ptr()) refuse(name, " must have memory; its storage is empty");
  }

  // The dtype of a tensor that is read element by element.
  DType floating(const char* name, const Tensor& t) const {
    memory(name, t);
    if (!known(t) || dtype_of(t) == kInt64) refuse(name, " must be float32, float64, bfloat16 or float16; got ", found(t));
    return dtype_of(t);
  }

  void dtype(const char* name, const Tensor& t, DType wanted) const {
    if (!known(t) || dtype_of(t) != wanted) refuse(name, " must be ", shown(wanted), "; got ", found(t));
  }

  void shape(const char* name, const Tensor& t, Sizes wanted) const {
    if (!t.sizes().equals(wanted)) refuse(name, " must be ", shown(wanted), "; got ", shown(t.sizes()));
  }

  void like(const char* name, const OptionalTensor& t, const Tensor& x) const {
    if (!t) return;
    memory(name, *t);
    dtype(name, *t, dtype_of(x));
    shape(name, *t, x.sizes());
  }

  // A tensor that is read in C order, without its strides.
  void table(const char* name, const OptionalTensor& t, DType wanted, std::initializer_list<int64_t> sizes) const {
    if (!t) return;
    memory(name, *t);
    dtype(name, *t, wanted);
    shape(name, *t, Sizes(sizes.begin(), sizes.size()));
    if (!t->is_contiguous()) refuse(name, " must be contiguous");
  }

  // One number, or one for each sample.
  void coefficient(const char* name, const OptionalTensor& t, DType of, int64_t batch) const {
    if (!t) return;
    memory(name, *t);
    dtype(name, *t, compute_dtype(of));
    if (t->dim() > 1 || (t->numel() != 1 && t->numel() != batch))
      refuse(name, " must hold one number or ", batch, "; got ", shown(t->sizes()));
    if (!t->is_contiguous()) refuse(name, " must be contiguous");
  }

  void present(const char* name, const OptionalTensor& t, bool wanted, const char* with) const {
    if (t.has_value() != wanted) refuse(name, wanted ? " must come with " : " must not come without ", with);
  }

  // Threads write the elements in any order, each into a place of its own.
  void written(const char* name, const Tensor& out) const {
    int64_t extent = 1;
    bool done[kMaxDims] = {};
    for (int64_t k = 0; k < out.dim(); ++k) {
      int64_t least = -1;
      for (int64_t d = 0; d < out.dim(); ++d)
        if (!done[d] && (least < 0 || out.stride(d) < out.stride(least))) least = d;
      done[least] = true;
      if (out.size(least) <= 1) continue;
      if (out.stride(least) < extent) refuse(name, " must not share memory between its elements");
      extent += out.stride(least) * (out.size(least) - 1);
    }
  }

  // What is written must not be read as something else; element by element, it may be read as itself.
  void apart(const char* name, const OptionalTensor& out, const char* other, const OptionalTensor& t, bool as_itself = false) const {
    if (!out || !t || out->numel() == 0 || t->numel() == 0 || (as_itself && same_view(*out, *t))) return;
    const Extent a(*out), b(*t);
    if (a.begin < b.end && b.begin < a.end) refuse(name, " must not share memory with ", other, as_itself ? ", unless it is the same view" : "");
  }

  // No tensor that is written shares memory with another.
  void apart(std::initializer_list<Place> written, std::initializer_list<Place> read) const {
    const auto refuse_both = [&](const Place& a, const Place& b) {
      if (a.meets(b)) refuse(a.name, " must not share memory with ", b.name);
    };
    for (const Place* out = written.begin(); out != written.end(); ++out) {
      for (const Place& other : read) refuse_both(*out, other);
      for (const Place* before = written.begin(); before != out; ++before) refuse_both(*out, *before);
    }
  }

  void number(const char* name, int64_t value, int64_t least, int64_t most) const {
    if (value < least || value > most) refuse(name, " must be in ", least, "..", most, "; got ", value);
  }

  // stream holds the substream in its upper half.
  void key(const OptionalTensor& key, int64_t stream, int64_t offset) const {
    table("key", key, kInt64, {2});
    if (stream >> 32 || !(stream & 0xffff)) refuse("stream must be one of 1..65535, and the substream times 65536; got ", stream);
    if (offset < 0) refuse("offset must be at least 0; got ", offset);
  }

 private:
  static bool known(const Tensor& t) {
    using S = torch::headeronly::ScalarType;
    const S s = t.scalar_type();
    return s == S::Float || s == S::Double || s == S::BFloat16 || s == S::Half || s == S::Long;
  }
  static std::string found(const Tensor& t) {
    return known(t) ? shown(dtype_of(t)) : std::string("dtype ") + torch::headeronly::toString(t.scalar_type());
  }
};

}  // namespace fastscore
