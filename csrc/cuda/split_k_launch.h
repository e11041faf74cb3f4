// Launches of split-K (split_k.h), whatever kernel writes the partial sums. Only for files that are compiled for all
// GPUs: of a kernel that several files have, any one's code may be what runs.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "arguments.h"
#include "gpu.h"
#include "split_k.h"
#include "stream.h"

namespace smart::cuda {

template <class Element, class Problem>
__global__ void __launch_bounds__(kAddThreads) add_splits(const __grid_constant__ Problem p) {
  __shared__ __align__(16) char shared[kAddBytes];
  add_partial<Element>(Gpu(), p, shared);
}

inline int multiprocessors(int device) { return attribute(cudaDevAttrMultiProcessorCount, device); }

// Sets `splits` and `partial`, for a launch of `tiles` thread blocks without splits. `asked` is 0 to choose. Returns
// the memory of the partial sums, which may be given back as soon as both kernels are launched on the current stream.
template <class Problem>
std::optional<Tensor> split(Problem* p, int64_t tiles, int64_t asked, const Tensor& x) {
  const int most = std::min(p->blocks, kMaxSplits);
  SMART_CHECK(0 <= asked && asked <= most, "splits is ", asked, ": accepted are 1 to ", most,
              ", for as many blocks of columns, and 0 to choose");
  p->splits = asked ? static_cast<int>(asked) : choose_splits(tiles, p->blocks, multiprocessors(x.get_device_index()));
  p->partial = nullptr;
  if (p->splits == 1) return std::nullopt;
  narrowed(static_cast<int64_t>(p->pixels) * parts_of(*p), "outputs");
  const std::vector<int64_t> shape = {p->splits, p->pixels, parts_of(*p), kStoreChannels};
  Tensor sums = torch::stable::empty(shape, ScalarType::Float, std::nullopt, x.device());
  p->partial = static_cast<float*>(sums.mutable_data_ptr());
  return sums;
}

// The second kernel, where there are splits.
template <class Element, class Problem>
void launch_add(const Problem& p, cudaStream_t stream) {
  if (p.splits == 1) return;
  add_splits<Element><<<add_blocks(p), kAddThreads, 0, stream>>>(p);
  check(cudaGetLastError(), "launching the sum of splits");
}

}  // namespace smart::cuda
