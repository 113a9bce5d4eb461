// The door to an emulated operator: its tensors are what its kernels may touch; what they did wrong is an error of the call.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <optional>

#include "driver.h"

namespace on_host {

using torch::stable::Tensor;

inline void may_access_tensor(const Tensor& t) {
  if (t.numel() == 0) return;
  int64_t extent = 1;
  for (int64_t d = 0; d < t.dim(); ++d) extent += (t.size(d) - 1) * t.stride(d);
  may_access(t.const_data_ptr(), static_cast<size_t>(extent) * t.element_size());
}
inline void may_access_tensor(const std::optional<Tensor>& t) {
  if (t) may_access_tensor(*t);
}
template <class T>
void may_access_tensor(const T&) {}

inline void* writable(const Tensor& t) {
  void* p = t.mutable_data_ptr();
  may_write(p);
  return p;
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t index) : before(set_device(index)) {}
  ~DeviceGuard() { set_device(before); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int32_t before;
};

inline int32_t device_index(const Tensor& t) { return device_of(t.const_data_ptr()); }

template <class... Options>
Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> size, Options... options) {
  auto owner = std::make_shared<Tensor>(torch::stable::new_empty(like, size, options...));
  const size_t bytes = static_cast<size_t>(owner->numel()) * owner->element_size();
  std::memset(owner->mutable_data_ptr(), 0xff, bytes);   // not a number, until it is written
  fresh(owner->const_data_ptr(), bytes, owner);
  return *owner;
}

template <auto f>
struct checked;

template <class... P, void (*f)(P...)>
struct checked<f> {
  static void call(P... arguments) {
    call_begins();
    (may_access_tensor(arguments), ...);
    try {
      f(arguments...);
    } catch (...) {
      const char* unread;
      call_ends(&unread);
      throw;
    }
    const char* fault = nullptr;
    call_ends(&fault);
    STD_TORCH_CHECK(!fault, "an emulated operator did not look at the error of its launch: ", fault);
  }
};

}  // namespace on_host

#define __CUDACC__   // for csrc/; PyTorch's headers, all of them above, would look for CUDA's
