// Launches of the 2:4 convolution for Hopper; its operators are those of two_four.cu. setup.py compiles this file for
// sm_90a only, the one generation that has wgmma, and defines SMART_SM90A where it does.
#include <cuda_runtime.h>

#include <limits>

#include "checks.h"
#include "hopper.h"
#include "stream.h"
#include "wgmma_body.h"
#include "wgmma_launch.h"

namespace smart::cuda {
namespace {

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads)
    two_four_wgmma(const __grid_constant__ TwoFour p, const __grid_constant__ CUtensorMap map) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ char memory[];
  const auto begin = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
  char* const shared = memory + (Traits::kAlignment - begin % Traits::kAlignment) % Traits::kAlignment;
  const Hopper<Traits::kMultipliers> device;
  WgmmaBody<Traits, Hopper<Traits::kMultipliers>>(device, p, map, shared).run();
#else
  __trap();
#endif
}

using Encode = decltype(&cuTensorMapEncodeIm2col);

// Of the driver, which this library is not linked with: it loads where there is none.
Encode find_encode() {
  static const Encode function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeIm2col", &found, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeIm2col", &found, cudaEnableDefault, &result);
#endif
    const bool ok = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return reinterpret_cast<Encode>(ok ? found : nullptr);
  }();
  return function;
}

CUtensorMap encode(const InputMap& input, bool brain) {
  using Size = cuuint64_t;
  const Encode function = find_encode();
  SMART_CHECK(function != nullptr, "the CUDA driver has no cuTensorMapEncodeIm2col: install one of CUDA 12 or later");
  const Size sizes[] = {static_cast<Size>(input.channels), static_cast<Size>(input.width),
                        static_cast<Size>(input.height), static_cast<Size>(input.batch)};
  const Size bytes[] = {2 * sizes[0], 2 * sizes[0] * sizes[1], 2 * sizes[0] * sizes[1] * sizes[2]};
  const int lower[] = {input.lower_w, input.lower_h}, upper[] = {input.upper_w, input.upper_h};
  const cuuint32_t strides[] = {1, static_cast<cuuint32_t>(input.stride_w), static_cast<cuuint32_t>(input.stride_h), 1};
  CUtensorMap map;
  const CUresult result =
      function(&map, brain ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
               const_cast<uint16_t*>(input.x), sizes, bytes, lower, upper,
               static_cast<cuuint32_t>(input.copied_channels), kTilePixels, strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
               input.copied_channels == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  SMART_CHECK(result == CUDA_SUCCESS, "cuTensorMapEncodeIm2col failed with error ", static_cast<int>(result));
  return map;
}

template <class Traits>
int64_t tiles_of(const TwoFour& p) {
  const int64_t rows = (p.slabs + Traits::kSlabs - 1) / Traits::kSlabs;
  return (static_cast<int64_t>(p.pixels) + kTilePixels - 1) / kTilePixels * rows;
}

template <class Traits>
void launch(const TwoFour& p, cudaStream_t stream) {
  const int64_t tiles = tiles_of<Traits>(p);
  SMART_CHECK(tiles <= std::numeric_limits<int>::max(), tiles, " tiles are more than one launch takes");
  check(cudaFuncSetAttribute(two_four_wgmma<Traits>, cudaFuncAttributeMaxDynamicSharedMemorySize, Traits::kSharedBytes),
        "asking for shared memory");
  const CUtensorMap map = encode(map_input(p), std::is_same_v<typename Traits::Element, Brain>);
  const dim3 blocks(static_cast<unsigned>(tiles), p.splits);
  two_four_wgmma<Traits><<<blocks, Traits::kThreads, Traits::kSharedBytes, stream>>>(p, map);
  check(cudaGetLastError(), "launching the 2:4 convolution by wgmma");
}

template <class Element>
void launch_tile(const TwoFour& p, int64_t tile, cudaStream_t stream) {
  if (tile == 0)
    launch<Tall<Element>>(p, stream);
  else
    launch<Twin<Element>>(p, stream);
}

}  // namespace

std::string wgmma_missing(int device) {
#ifdef SMART_SM90A
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "asking for the capability");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "asking for the capability");
  if (major == 9) return "";
  return "wgmma needs compute capability 9.0, this GPU has " + std::to_string(major) + "." + std::to_string(minor);
#else
  return "the library was built without code for Hopper: build again with 9.0a in TORCH_CUDA_ARCH_LIST";
#endif
}

std::string wgmma_refuses(const TwoFour& p) {
  if (p.order) return "wgmma runs one path at a time";
  const InputMap map = map_input(p);
  return takes(map, p) ? "" : "wgmma's copies do not take these channels, strides or paddings";
}

int64_t wgmma_tiles(const TwoFour& p, int64_t tile) {
  return tile == 0 ? tiles_of<Tall<Half>>(p) : tiles_of<Twin<Half>>(p);
}

void launch_wgmma(const TwoFour& p, bool brain, int64_t tile, cudaStream_t stream) {
  if (brain)
    launch_tile<Brain>(p, tile, stream);
  else
    launch_tile<Half>(p, tile, stream);
}

std::pair<int64_t, int64_t> wgmma_resources(int64_t tile) {
  if (tile == 0) return {Tall<Half>::kThreads, Tall<Half>::kSharedBytes};
  return {Twin<Half>::kThreads, Twin<Half>::kSharedBytes};
}

}  // namespace smart::cuda
