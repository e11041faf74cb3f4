// What the operators of implicit GEMMs share: how they read their arguments, and how they launch.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <limits>
#include <optional>
#include <vector>

#include "arguments.h"
#include "gpu.h"
#include "implicit_gemm_body.h"
#include "split_k_launch.h"
#include "stream.h"

namespace smart::cuda {

template <template <class, class> class Body, class Traits, class Problem>
__global__ void __launch_bounds__(Traits::kThreads) implicit_gemm(const __grid_constant__ Problem p) {
  extern __shared__ __align__(128) char shared[];
  Body<Traits, Gpu>(Gpu(), p, shared).run();
}

template <class Traits>
int64_t thread_blocks(const ImplicitGemm& p) {
  const int64_t rows = (p.slabs + Traits::kSlabs - 1) / Traits::kSlabs;
  // The last tile of the first path's pixels may be cut short: that can make one more.
  return ((static_cast<int64_t>(p.pixels) + Traits::kPixels - 1) / Traits::kPixels + (p.order != nullptr)) * rows;
}

// `splits` is 0 to choose.
template <template <class, class> class Body, class Traits, class Problem>
void launch_gemm(Problem p, int shared_bytes, int64_t splits, const Tensor& x, cudaStream_t stream) {
  const int64_t tiles = thread_blocks<Traits>(p);
  SMART_CHECK(tiles <= std::numeric_limits<int>::max(), tiles, " tiles are more than one launch takes");
  const std::optional<Tensor> partial = split(&p, tiles, splits, x);
  constexpr auto kernel = implicit_gemm<Body, Traits, Problem>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        "asking for shared memory");
  const dim3 blocks(static_cast<unsigned>(tiles), p.splits);
  kernel<<<blocks, Traits::kThreads, shared_bytes, stream>>>(p);
  check(cudaGetLastError(), "launching a convolution on tensor cores");
  launch_add<typename Traits::Element, ImplicitGemm>(p, stream);
}

// Sets what shapes and geometry tell.
inline void read_gemm(const Tensor& x, const std::vector<int64_t>& geometry, ImplicitGemm* p) {
  SMART_CHECK(geometry.size() == 13, "geometry has ", geometry.size(), " numbers: 13 are needed");
  SMART_CHECK(
      x.is_cuda() && x.dim() == 4 && (x.scalar_type() == ScalarType::Half || x.scalar_type() == ScalarType::BFloat16),
      "input has shape ", shape_of(x), ": float16 or bfloat16 (N, C, H, W) on a GPU is needed");
  const cpu::Problem c = read_problem(x.size(0), x.size(1), x.size(2), x.size(3), geometry.data());
  SMART_CHECK(c.groups == 1 && c.in_channels % kCopyElements == 0, "one group of input channels, a multiple of ",
              kCopyElements, ", is needed, not ", c.groups, " of ", c.in_channels / c.groups);
  read_pixels(c, p);
  p->columns = narrowed(c.kernel_h * c.kernel_w * c.in_channels, "columns");
  p->slabs = (p->out_channels + kSlabChannels - 1) / kSlabChannels;
}

inline void cut_columns(ImplicitGemm* p) {
  p->steps = (p->columns + kStepColumns - 1) / kStepColumns;
  p->blocks = (p->columns + kBlockColumns - 1) / kBlockColumns;
}

// Sets where the path's slabs begin, of all that the weight has.
inline void read_first_slab(int64_t first_slab, int64_t slabs, ImplicitGemm* p) {
  SMART_CHECK(0 <= first_slab && first_slab + p->slabs <= slabs, "first_slab is ", first_slab, ": the weight has ",
              slabs, " slabs, of which ", p->slabs, " are a path's");
  p->first_slab = static_cast<int>(first_slab);
}

inline const uint16_t* read_words(const Tensor& tensor, const char* name) {
  const void* const data = tensor.const_data_ptr();
  SMART_CHECK(is_aligned(data), name,
              " does not begin at a multiple of 16 bytes, since it is a part of another tensor: clone() it");
  return static_cast<const uint16_t*>(data);
}

// A second result of the epilogue.
struct Affine {
  const Tensor &scale, &bias;
  bool relu;
};

// What follows the sums, and whose samples run on which path.
struct Finish {
  const std::optional<Tensor>&scale, &bias, &residual;
  bool relu;
  const std::optional<Tensor>&order, &first;
  const Affine* affine;  // null: there is no second result
};

struct Results {
  Tensor y;
  std::optional<Tensor> second;
};

// Calls `launch` with the whole problem, of which `p` has the weight.
template <class Problem, class Launch>
Results convolve(Problem p, const Tensor& x, const Finish& finish, const Launch& launch) {
  SMART_CHECK(finish.order.has_value() == finish.first.has_value(),
              "order and first go together: give both, or neither");
  p.order = read_indices(finish.order, "order", x, p.batch), p.first = read_indices(finish.first, "first", x, 1);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const std::vector<int64_t> shape = {p.batch, p.out_channels, p.out_height, p.out_width};
  Results results = {empty_result(shape, x), std::nullopt};
  const Tensor pixels = channels_last(x);
  p.x = read_words(pixels, "input");
  p.y = static_cast<uint16_t*>(results.y.mutable_data_ptr());
  const auto channels = [&](const std::optional<Tensor>& tensor, const char* name) {
    return read_channels(tensor, name, p.out_channels, p.order != nullptr, x);
  };
  p.scale = channels(finish.scale, "scale"), p.bias = channels(finish.bias, "bias"), p.relu = finish.relu;
  const std::optional<Tensor> added = read_residual(finish.residual, results.y);
  if (added) p.residual = read_words(*added, "residual");
  if (finish.affine) {
    results.second = empty_result(shape, x);
    p.second = static_cast<uint16_t*>(results.second->mutable_data_ptr());
    p.second_scale = channels(finish.affine->scale, "affine_scale");
    p.second_bias = channels(finish.affine->bias, "affine_bias");
    p.second_relu = finish.affine->relu;
  }
  if (p.pixels > 0) launch(p);
  return results;
}

}  // namespace smart::cuda
