// The door to an emulated operator: its tensors are what its kernels may touch; what they did wrong is an error of the call.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <optional>
#include <type_traits>

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

// Tensors as DLPack has them (csrc/direct.h, which is read later).
template <class T>
concept View = requires(T t) { t.byte_offset; };

template <View T>
int32_t device_index(const T& t) { return device_of(static_cast<const char*>(t.data) + t.byte_offset); }

template <View T>
void may_access_argument(const T& t) {
  int64_t extent = 1;
  for (int32_t d = 0; d < t.ndim; ++d) extent += (t.shape[d] - 1) * t.strides[d];
  may_access(static_cast<const char*>(t.data) + t.byte_offset, static_cast<size_t>(extent) * t.bits / 8);
}
template <class T>
void may_access_argument(const T& t) {
  if constexpr (requires { t->byte_offset; }) {
    if (t) may_access_argument(*t);
  } else if constexpr (requires { t.each; }) {   // a coefficient
    may_access_argument(t.each);
  }
}

class Call {
 public:
  Call() { call_begins(); }
  Call(const Call&) = delete;
  ~Call() {
    const char* unread;
    if (!ended) call_ends(&unread);
  }
  void end() {
    ended = true;
    const char* fault = nullptr;
    call_ends(&fault);
    STD_TORCH_CHECK(!fault, "an emulated operator did not look at the error of its launch: ", fault);
  }

 private:
  bool ended = false;
};

// A launch that the door calls: what it throws is an error of the call; its first argument is what is written.
template <auto f>
struct checked_direct;

template <class R, class First, class... P, R (*f)(const First&, P...)>
struct checked_direct<f> {
  static R call(const First& out, P... arguments) {
    Call call;
    may_access_argument(out);
    (may_access_argument(arguments), ...);
    may_write(static_cast<const char*>(out.data) + out.byte_offset);
    if constexpr (std::is_void_v<R>) {
      f(out, arguments...);
      call.end();
    } else {
      const R result = f(out, arguments...);
      call.end();
      return result;
    }
  }
};

// A question to the device, which touches no memory.
template <class... P, bool (*f)(int32_t, P...)>
struct checked_direct<f> {
  static bool call(int32_t device, P... arguments) { return f(device, arguments...); }
};

template <auto f>
struct checked;

// A question to the device, which touches no memory.
template <class... P, int64_t (*f)(P...)>
struct checked<f> {
  static int64_t call(P... arguments) { return f(arguments...); }
};

template <class... P, void (*f)(P...)>
struct checked<f> {
  static void call(P... arguments) {
    Call call;
    (may_access_tensor(arguments), ...);
    f(arguments...);
    call.end();
  }
};

}  // namespace on_host

#define __CUDACC__   // for csrc/; PyTorch's headers, all of them above, would look for CUDA's
