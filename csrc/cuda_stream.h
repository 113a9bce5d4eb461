// torch's current stream, from the libtorch_cuda that this process has loaded.
// Not linked: the extension then loads where torch has no CUDA, and may be built there. A weak symbol would not do, since torch's
// libraries are no part of the global scope and --as-needed drops a library that only weak symbols need.
#pragma once
#include <cstdint>
#include <dlfcn.h>

namespace fastscore {

inline bool torch_cuda_stream(int32_t device, void** stream) {
  using Getter = int32_t (*)(int32_t, void**);   // an AOTITorchError: 0 is success
  static const Getter getter = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return torch_cuda ? reinterpret_cast<Getter>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  return getter && getter(device, stream) == 0;
}

}  // namespace fastscore
