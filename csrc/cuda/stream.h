// What a launch needs of torch: the current stream, and errors as exceptions.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>

#include "checks.h"

namespace smart::cuda {

inline void check(cudaError_t error, const char* what) {
  SMART_CHECK(error == cudaSuccess, what, " failed: ", cudaGetErrorString(error));
}

inline int attribute(cudaDeviceAttr of, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, of, device), "asking for an attribute of the device");
  return value;
}

// Its function is in the part of torch that only CUDA builds have. This library must load without it, so it is looked
// up when first needed: by then there is a CUDA tensor, and that part is loaded. Linking it would need a CUDA build of
// torch.
inline cudaStream_t current_stream(int32_t device) {
  using Function = int32_t (*)(int32_t, void**);
  static const auto function = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Function>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  SMART_CHECK(function != nullptr, "this torch has no CUDA streams: install a CUDA build of torch");
  void* stream = nullptr;
  SMART_CHECK(function(device, &stream) == 0, "torch has no current stream for CUDA device ", device);
  return static_cast<cudaStream_t>(stream);
}

}  // namespace smart::cuda
