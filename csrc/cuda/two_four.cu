// The 2:4 convolution as operators. The body is in two_four_body.h; the operand is that of
// smart_kernels/packing/two_four.py, which validates all indices when it is packed or loaded.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "arguments.h"
#include "gpu.h"
#include "split_k_launch.h"
#include "stream.h"
#include "two_four_body.h"
#include "wgmma_launch.h"

namespace smart::cuda {
namespace {

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads) two_four(const __grid_constant__ TwoFour p) {
  extern __shared__ __align__(128) char shared[];
  TwoFourBody<Traits, Gpu>(Gpu(), p, shared).run();
}

template <class Traits>
int64_t thread_blocks(const TwoFour& p) {
  const int64_t rows = (p.slabs + Traits::kSlabs - 1) / Traits::kSlabs;
  // The last tile of the first path's pixels may be cut short: that can make one more.
  return ((static_cast<int64_t>(p.pixels) + Traits::kPixels - 1) / Traits::kPixels + (p.order != nullptr)) * rows;
}

template <class Traits>
void launch(TwoFour p, int64_t splits, const Tensor& x, cudaStream_t stream) {
  const int64_t tiles = thread_blocks<Traits>(p);
  SMART_CHECK(tiles <= std::numeric_limits<int>::max(), tiles, " tiles are more than one launch takes");
  const std::optional<Tensor> partial = split(&p, tiles, splits, x);
  check(cudaFuncSetAttribute(two_four<Traits>, cudaFuncAttributeMaxDynamicSharedMemorySize, Traits::kSharedBytes),
        "asking for shared memory");
  const dim3 blocks(static_cast<unsigned>(tiles), p.splits);
  two_four<Traits><<<blocks, Traits::kThreads, Traits::kSharedBytes, stream>>>(p);
  check(cudaGetLastError(), "launching the 2:4 convolution");
  launch_add<typename Traits::Element>(p, stream);
}

// Large tiles where they fill the GPU, else small ones; no taller than there are channels. So many small ones as would
// not fill it either are split.
template <class Element>
int choose_tile(const TwoFour& p, int device) {
  if (p.slabs == 1 || p.run_slabs == 1) return 3;
  const int processors = multiprocessors(device);
  if (p.slabs == 2 || p.column_runs) return thread_blocks<Flat<Element>>(p) >= processors ? 1 : 2;
  return thread_blocks<Large<Element>>(p) >= processors ? 0 : 2;
}

template <class Element>
void launch_tile(const TwoFour& p, int64_t tile, int64_t splits, const Tensor& x) {
  const int device = x.get_device_index();
  const cudaStream_t stream = current_stream(device);
  SMART_CHECK(!p.column_runs || tile < 0 || tile == 3 || (p.run_slabs == 2 && (tile == 1 || tile == 2)), "tile is ",
              tile, ", but ", p.run_slabs * kSlabChannels,
              " channels of the weight leave out columns together: accepted "
              "are 3 (narrow), for 64 also 1 (flat) and 2 (small), and -1");
  switch (tile < 0 ? choose_tile<Element>(p, device) : tile) {
    case 0: return launch<Large<Element>>(p, splits, x, stream);
    case 1: return launch<Flat<Element>>(p, splits, x, stream);
    case 2: return launch<Small<Element>>(p, splits, x, stream);
    case 3: return launch<Narrow<Element>>(p, splits, x, stream);
    case 4:
    case 5: {
      const std::string missing = wgmma_missing(device), refuses = wgmma_refuses(p);
      SMART_CHECK(missing.empty() && refuses.empty(), "tile is ", tile, ", but ", missing.empty() ? refuses : missing);
      TwoFour with_splits = p;
      const std::optional<Tensor> partial = split(&with_splits, wgmma_tiles(p, tile - 4), splits, x);
      launch_wgmma(with_splits, std::is_same_v<Element, Brain>, tile - 4, stream);
      return launch_add<Element>(with_splits, stream);
    }
    default:
      refuse("tile is ", tile, ": accepted are 0 (large), 1 (flat), 2 (small), 3 (narrow), 4 (wgmma tall), 5 (wgmma ",
             "twin), and -1 to choose among the first four");
  }
}

// Tensors of a packed weight, in the order of TwoFourWeight.operand.
struct Operand {
  const Tensor &values, &metadata, &extra_values, &extra_metadata, &extra_columns, &extra_starts;
  int64_t first_slab;
};

TwoFour read(const Tensor& x, const Operand& w, const std::vector<int64_t>& geometry,
             const std::optional<Tensor>& column_runs) {
  SMART_CHECK(geometry.size() == 13, "geometry has ", geometry.size(), " numbers: 13 are needed");
  SMART_CHECK(
      x.is_cuda() && x.dim() == 4 && (x.scalar_type() == ScalarType::Half || x.scalar_type() == ScalarType::BFloat16),
      "input has shape ", shape_of(x), ": float16 or bfloat16 (N, C, H, W) on a GPU is needed");
  const cpu::Problem c = read_problem(x.size(0), x.size(1), x.size(2), x.size(3), geometry.data());
  SMART_CHECK(c.groups == 1 && c.in_channels % kCopyElements == 0, "one group of input channels, a multiple of ",
              kCopyElements, ", is needed, not ", c.groups, " of ", c.in_channels / c.groups);
  TwoFour p = {};
  read_pixels(c, &p);
  p.columns = narrowed(c.kernel_h * c.kernel_w * c.in_channels, "columns");
  p.slabs = (p.out_channels + kSlabChannels - 1) / kSlabChannels;
  if (column_runs) {
    const int64_t paths = w.values.size(0) / p.slabs, tiles = column_runs->dim() == 3 ? column_runs->size(1) : 0;
    const int64_t runs = tiles > 0 ? column_runs->size(2) : 0;
    p.run_slabs = tiles == (p.slabs + 1) / 2 ? 2 : 1;
    SMART_CHECK((tiles == p.slabs || tiles == (p.slabs + 1) / 2) && 0 < runs && runs * kRunColumns <= p.columns &&
                    p.channels % kRunColumns == 0,
                "column_runs has shape ", shape_of(*column_runs), ": the weight has no such runs of columns");
    check_kind(*column_runs, "column_runs", x, ScalarType::Int, paths * tiles * runs);
    p.column_runs = static_cast<const int32_t*>(column_runs->const_data_ptr());
    p.columns = static_cast<int>(runs * kRunColumns);
  }
  p.steps = (p.columns + kStepColumns - 1) / kStepColumns;
  p.blocks = (p.columns + kBlockColumns - 1) / kBlockColumns;
  const int64_t step = static_cast<int64_t>(kSlabChannels) * kStepColumns / 2, slabs = w.values.size(0);
  const int64_t extra = w.extra_values.size(0);
  SMART_CHECK(0 <= w.first_slab && w.first_slab + p.slabs <= slabs, "first_slab is ", w.first_slab, ": the weight has ",
              slabs, " slabs, of which ", p.slabs, " are a path's");
  check_kind(w.values, "values", x, x.scalar_type(), slabs * p.steps * step);
  check_kind(w.metadata, "metadata", x, ScalarType::Int, slabs * p.steps * 32);
  check_kind(w.extra_values, "extra_values", x, x.scalar_type(), extra * step);
  check_kind(w.extra_metadata, "extra_metadata", x, ScalarType::Int, extra * 32);
  check_kind(w.extra_columns, "extra_columns", x, ScalarType::Byte, extra * kStepColumns);
  check_kind(w.extra_starts, "extra_starts", x, ScalarType::Int, slabs * p.blocks + 1);
  p.values = static_cast<const uint16_t*>(w.values.const_data_ptr());
  p.metadata = static_cast<const uint32_t*>(w.metadata.const_data_ptr());
  p.extra_values = static_cast<const uint16_t*>(w.extra_values.const_data_ptr());
  p.extra_metadata = static_cast<const uint32_t*>(w.extra_metadata.const_data_ptr());
  p.extra_columns = static_cast<const uint8_t*>(w.extra_columns.const_data_ptr());
  p.extra_starts = static_cast<const int32_t*>(w.extra_starts.const_data_ptr());
  p.first_slab = static_cast<int>(w.first_slab);
  return p;
}

const uint16_t* read_words(const Tensor& tensor, const char* name) {
  const void* const data = tensor.const_data_ptr();
  SMART_CHECK(is_aligned(data), name,
              " does not begin at a multiple of 16 bytes, since it is a part of another tensor: clone() it");
  return static_cast<const uint16_t*>(data);
}

struct Results {
  Tensor y;
  std::optional<Tensor> second;
};

// `affine` has second_scale, second_bias and second_relu set. Null: there is no second result.
Results convolve(const Tensor& x, const Operand& weight, const std::vector<int64_t>& geometry,
                 const std::optional<Tensor>& scale, const std::optional<Tensor>& bias,
                 const std::optional<Tensor>& residual, bool relu, const std::optional<Tensor>& order,
                 const std::optional<Tensor>& first, int64_t tile, const std::optional<Tensor>& column_runs,
                 int64_t splits, bool with_second, const std::optional<Tensor>& second_scale,
                 const std::optional<Tensor>& second_bias, bool second_relu) {
  TwoFour p = read(x, weight, geometry, column_runs);
  SMART_CHECK(order.has_value() == first.has_value(), "order and first go together: give both, or neither");
  p.order = read_indices(order, "order", x, p.batch), p.first = read_indices(first, "first", x, 1);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const std::vector<int64_t> shape = {p.batch, p.out_channels, p.out_height, p.out_width};
  Results results = {empty_result(shape, x), std::nullopt};
  const Tensor pixels = channels_last(x);
  p.x = read_words(pixels, "input");
  p.y = static_cast<uint16_t*>(results.y.mutable_data_ptr());
  const auto channels = [&](const std::optional<Tensor>& tensor, const char* name) {
    return read_channels(tensor, name, p.out_channels, p.order != nullptr, x);
  };
  p.scale = channels(scale, "scale"), p.bias = channels(bias, "bias");
  p.relu = relu;
  const std::optional<Tensor> added = read_residual(residual, results.y);
  if (added) p.residual = read_words(*added, "residual");
  if (with_second) {
    results.second = empty_result(shape, x);
    p.second = static_cast<uint16_t*>(results.second->mutable_data_ptr());
    p.second_scale = channels(second_scale, "affine_scale");
    p.second_bias = channels(second_bias, "affine_bias");
    p.second_relu = second_relu;
  }
  if (p.pixels > 0) {
    if (x.scalar_type() == ScalarType::Half)
      launch_tile<Half>(p, tile, splits, x);
    else
      launch_tile<Brain>(p, tile, splits, x);
  }
  return results;
}

Tensor sparse_conv2d_two_four(Tensor x, Tensor values, Tensor metadata, Tensor extra_values, Tensor extra_metadata,
                              Tensor extra_columns, Tensor extra_starts, int64_t first_slab,
                              std::vector<int64_t> geometry, std::optional<Tensor> scale, std::optional<Tensor> bias,
                              std::optional<Tensor> residual, bool relu, std::optional<Tensor> order,
                              std::optional<Tensor> first, int64_t tile, std::optional<Tensor> column_runs,
                              int64_t splits) {
  const Operand w = {values, metadata, extra_values, extra_metadata, extra_columns, extra_starts, first_slab};
  return convolve(x, w, geometry, scale, bias, residual, relu, order, first, tile, column_runs, splits, false,
                  std::nullopt, std::nullopt, false)
      .y;
}

// Also returns relu(y * affine_scale + affine_bias).
std::tuple<Tensor, Tensor> sparse_conv2d_affine_two_four(
    Tensor x, Tensor values, Tensor metadata, Tensor extra_values, Tensor extra_metadata, Tensor extra_columns,
    Tensor extra_starts, int64_t first_slab, std::vector<int64_t> geometry, std::optional<Tensor> scale,
    std::optional<Tensor> bias, std::optional<Tensor> residual, bool relu, std::optional<Tensor> order,
    std::optional<Tensor> first, Tensor affine_scale, Tensor affine_bias, bool affine_relu, int64_t tile,
    std::optional<Tensor> column_runs, int64_t splits) {
  const Operand w = {values, metadata, extra_values, extra_metadata, extra_columns, extra_starts, first_slab};
  Results results = convolve(x, w, geometry, scale, bias, residual, relu, order, first, tile, column_runs, splits, true,
                             affine_scale, affine_bias, affine_relu);
  return {results.y, *results.second};
}

// Threads and bytes of shared memory of a thread block, which the compiled kernels do not tell.
std::tuple<int64_t, int64_t> two_four_resources(int64_t tile) {
  switch (tile) {
    case 0: return {Large<Half>::kThreads, Large<Half>::kSharedBytes};
    case 1: return {Flat<Half>::kThreads, Flat<Half>::kSharedBytes};
    case 2: return {Small<Half>::kThreads, Small<Half>::kSharedBytes};
    case 3: return {Narrow<Half>::kThreads, Narrow<Half>::kSharedBytes};
    case 4:
    case 5: {
      const auto [threads, bytes] = wgmma_resources(tile - 4);
      return {threads, bytes};
    }
    default: refuse("tile is ", tile, ": accepted are 0 to 5");
  }
}

// Why tiles 4 and 5 do not run on this GPU; "" if they do.
std::string wgmma_missing_on(int64_t device) { return wgmma_missing(static_cast<int>(device)); }

}  // namespace
}  // namespace smart::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(smart_kernels, m) {
  m.def(
      "sparse_conv2d_two_four(Tensor x, Tensor values, Tensor metadata, Tensor extra_values, Tensor extra_metadata, "
      "Tensor extra_columns, Tensor extra_starts, int first_slab, int[] geometry, Tensor? scale, Tensor? bias, "
      "Tensor? residual, bool relu, Tensor? order, Tensor? first, int tile=-1, Tensor? column_runs=None, int splits=0) "
      "-> Tensor");
  m.def(
      "sparse_conv2d_affine_two_four(Tensor x, Tensor values, Tensor metadata, Tensor extra_values, "
      "Tensor extra_metadata, Tensor extra_columns, Tensor extra_starts, int first_slab, int[] geometry, "
      "Tensor? scale, Tensor? bias, Tensor? residual, bool relu, Tensor? order, Tensor? first, Tensor affine_scale, "
      "Tensor affine_bias, bool affine_relu, int tile=-1, Tensor? column_runs=None, int splits=0) -> (Tensor, Tensor)");
  m.def("two_four_resources(int tile) -> (int, int)");
  m.def("wgmma_missing(int device) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(smart_kernels, CompositeExplicitAutograd, m) {
  m.impl("two_four_resources", TORCH_BOX(&smart::cuda::two_four_resources));
  m.impl("wgmma_missing", TORCH_BOX(&smart::cuda::wgmma_missing_on));
}

STABLE_TORCH_LIBRARY_IMPL(smart_kernels, CUDA, m) {
  m.impl("sparse_conv2d_two_four", TORCH_BOX(&smart::cuda::sparse_conv2d_two_four));
  m.impl("sparse_conv2d_affine_two_four", TORCH_BOX(&smart::cuda::sparse_conv2d_affine_two_four));
}
