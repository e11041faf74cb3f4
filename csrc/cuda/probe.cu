// Whether this library's GPU code runs on the current device: `smart info` asks before anything relies on it.
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>

#include <string>

namespace smart::cuda {
namespace {

__global__ void probe(int* answer) { *answer = 1; }

// "" if the kernels run here, else why not.
std::string cuda_missing() {
  int devices = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&devices); error != cudaSuccess || devices == 0) {
    return std::string("no CUDA device: ") + cudaGetErrorString(error == cudaSuccess ? cudaErrorNoDevice : error);
  }
  // Fails when the library holds no code for this generation of GPU, without launching anything.
  cudaFuncAttributes attributes;
  if (const cudaError_t error = cudaFuncGetAttributes(&attributes, probe); error != cudaSuccess) {
    return std::string("the library's GPU code does not run on this device: ") + cudaGetErrorString(error);
  }
  return "";
}

}  // namespace
}  // namespace smart::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(smart_kernels, m) { m.def("cuda_missing() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(smart_kernels, CompositeExplicitAutograd, m) {
  m.impl("cuda_missing", TORCH_BOX(&smart::cuda::cuda_missing));
}
