// The 2:4 convolution as operators. The body is in two_four_body.h; the operand is that of
// smart_kernels/packing/two_four.py, which validates all indices when it is packed or loaded.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "gpu.h"
#include "stream.h"
#include "two_four_body.h"

namespace smart::cuda {
namespace {

using torch::headeronly::MemoryFormat;

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
void launch(const TwoFour& p, cudaStream_t stream) {
  const int64_t blocks = thread_blocks<Traits>(p);
  SMART_CHECK(blocks <= std::numeric_limits<int>::max(), blocks, " tiles are more than one launch takes");
  check(cudaFuncSetAttribute(two_four<Traits>, cudaFuncAttributeMaxDynamicSharedMemorySize, Traits::kSharedBytes),
        "asking for shared memory");
  two_four<Traits><<<static_cast<int>(blocks), Traits::kThreads, Traits::kSharedBytes, stream>>>(p);
  check(cudaGetLastError(), "launching the 2:4 convolution");
}

// Large tiles where they fill the GPU, else small ones; no taller than there are channels.
template <class Element>
int choose_tile(const TwoFour& p, int device) {
  if (p.slabs == 1) return 3;
  int processors = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "counting multiprocessors");
  if (p.slabs == 2) return thread_blocks<Flat<Element>>(p) >= processors ? 1 : 2;
  return thread_blocks<Large<Element>>(p) >= processors ? 0 : 2;
}

template <class Element>
void launch_tile(const TwoFour& p, int64_t tile, int device) {
  const cudaStream_t stream = current_stream(device);
  switch (tile < 0 ? choose_tile<Element>(p, device) : tile) {
    case 0: return launch<Large<Element>>(p, stream);
    case 1: return launch<Flat<Element>>(p, stream);
    case 2: return launch<Small<Element>>(p, stream);
    case 3: return launch<Narrow<Element>>(p, stream);
    default: refuse("tile is ", tile, ": accepted are 0 (large), 1 (flat), 2 (small), 3 (narrow), and -1 to choose");
  }
}

// Tensors of a packed weight, in the order of TwoFourWeight.operand.
struct Operand {
  const Tensor &values, &metadata, &extra_values, &extra_metadata, &extra_columns, &extra_starts;
  int64_t first_slab;
};

void check_kind(const Tensor& tensor, const char* name, const Tensor& x, ScalarType type, int64_t numel) {
  SMART_CHECK(tensor.scalar_type() == type && tensor.is_contiguous() && tensor.numel() == numel && tensor.is_cuda() &&
                  tensor.get_device_index() == x.get_device_index(),
              name, " has shape ", shape_of(tensor), ": ", numel,
              " contiguous numbers, of the type that packing gives them and on the input's device, are needed");
}

int narrowed(int64_t number, const char* what) {
  SMART_CHECK(number >= 0 && number <= std::numeric_limits<int>::max() - (1 << 16), what, " are ", number,
              ": too many for 32-bit indices, split the batch");
  return static_cast<int>(number);
}

TwoFour read(const Tensor& x, const Operand& w, const std::vector<int64_t>& geometry) {
  SMART_CHECK(geometry.size() == 13, "geometry has ", geometry.size(), " numbers: 13 are needed");
  SMART_CHECK(
      x.is_cuda() && x.dim() == 4 && (x.scalar_type() == ScalarType::Half || x.scalar_type() == ScalarType::BFloat16),
      "input has shape ", shape_of(x), ": float16 or bfloat16 (N, C, H, W) on a GPU is needed");
  const cpu::Problem c = read_problem(x.size(0), x.size(1), x.size(2), x.size(3), geometry.data());
  SMART_CHECK(c.groups == 1 && c.in_channels % kCopyElements == 0 && c.out_channels % kCopyElements == 0,
              "one group, and channels that are multiples of ", kCopyElements, ", are needed");
  TwoFour p = {};
  p.batch = narrowed(c.batch, "samples"), p.channels = narrowed(c.in_channels, "channels");
  p.height = narrowed(c.height, "rows"), p.width = narrowed(c.width, "columns");
  p.out_channels = narrowed(c.out_channels, "channels");
  p.out_height = narrowed(c.out_height, "rows"), p.out_width = narrowed(c.out_width, "columns");
  p.pixels = narrowed(c.batch * c.out_height * c.out_width, "output pixels");
  // Padding and what the kernel reaches beyond the last pixel count too.
  narrowed((c.batch * c.height + 2048 + c.kernel_h * c.dilation_h) * (c.width + 2048), "input pixels");
  p.kernel_w = narrowed(c.kernel_w, "taps");
  p.stride_h = static_cast<int>(c.stride_h), p.stride_w = static_cast<int>(c.stride_w);
  p.pad_top = static_cast<int>(c.pad_top), p.pad_left = static_cast<int>(c.pad_left);
  p.dilation_h = static_cast<int>(c.dilation_h), p.dilation_w = static_cast<int>(c.dilation_w);

  p.columns = narrowed(c.kernel_h * c.kernel_w * c.in_channels, "columns");
  p.steps = (p.columns + kStepColumns - 1) / kStepColumns;
  p.blocks = (p.columns + kBlockColumns - 1) / kBlockColumns;
  p.slabs = (p.out_channels + kSlabChannels - 1) / kSlabChannels;
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

// (K,), or (2, K) where samples have their own paths.
const float* read_channels(const std::optional<Tensor>& tensor, const char* name, const TwoFour& p, const Tensor& x) {
  if (!tensor) return nullptr;
  check_kind(*tensor, name, x, ScalarType::Float, static_cast<int64_t>(p.out_channels) * (p.order ? 2 : 1));
  return static_cast<const float*>(tensor->const_data_ptr());
}

const int32_t* read_indices(const std::optional<Tensor>& tensor, const char* name, const Tensor& x, int64_t numel) {
  if (!tensor) return nullptr;
  check_kind(*tensor, name, x, ScalarType::Int, numel);
  return static_cast<const int32_t*>(tensor->const_data_ptr());
}

const uint16_t* read_words(const Tensor& tensor, const char* name) {
  const void* const data = tensor.const_data_ptr();
  SMART_CHECK(reinterpret_cast<uintptr_t>(data) % 16 == 0, name,
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
                 const std::optional<Tensor>& first, int64_t tile, bool with_second,
                 const std::optional<Tensor>& second_scale, const std::optional<Tensor>& second_bias,
                 bool second_relu) {
  TwoFour p = read(x, weight, geometry);
  SMART_CHECK(order.has_value() == first.has_value(), "order and first go together: give both, or neither");
  p.order = read_indices(order, "order", x, p.batch), p.first = read_indices(first, "first", x, 1);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const std::vector<int64_t> shape = {p.batch, p.out_channels, p.out_height, p.out_width};
  const auto empty = [&] {
    return torch::stable::empty(shape, x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                                MemoryFormat::ChannelsLast);
  };
  Results results = {empty(), std::nullopt};
  const Tensor pixels = torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
  p.x = read_words(pixels, "input");
  p.y = static_cast<uint16_t*>(results.y.mutable_data_ptr());
  p.scale = read_channels(scale, "scale", p, x), p.bias = read_channels(bias, "bias", p, x);
  p.relu = relu;
  std::optional<Tensor> added;
  if (residual) {
    bool as_output = residual->scalar_type() == x.scalar_type() && residual->dim() == 4 && residual->is_cuda() &&
                     residual->get_device_index() == x.get_device_index();
    for (int64_t i = 0; as_output && i < 4; ++i) as_output = residual->size(i) == shape[i];
    SMART_CHECK(as_output, "residual has shape ", shape_of(*residual), ": ", shape_of(results.y),
                " of the input's type and device is needed, the shape of the output");
    added = torch::stable::contiguous(*residual, MemoryFormat::ChannelsLast);
    p.residual = read_words(*added, "residual");
  }
  if (with_second) {
    results.second = empty();
    p.second = static_cast<uint16_t*>(results.second->mutable_data_ptr());
    p.second_scale = read_channels(second_scale, "affine_scale", p, x);
    p.second_bias = read_channels(second_bias, "affine_bias", p, x);
    p.second_relu = second_relu;
  }
  if (p.pixels > 0) {
    if (x.scalar_type() == ScalarType::Half)
      launch_tile<Half>(p, tile, x.get_device_index());
    else
      launch_tile<Brain>(p, tile, x.get_device_index());
  }
  return results;
}

Tensor sparse_conv2d_two_four(Tensor x, Tensor values, Tensor metadata, Tensor extra_values, Tensor extra_metadata,
                              Tensor extra_columns, Tensor extra_starts, int64_t first_slab,
                              std::vector<int64_t> geometry, std::optional<Tensor> scale, std::optional<Tensor> bias,
                              std::optional<Tensor> residual, bool relu, std::optional<Tensor> order,
                              std::optional<Tensor> first, int64_t tile) {
  const Operand w = {values, metadata, extra_values, extra_metadata, extra_columns, extra_starts, first_slab};
  return convolve(x, w, geometry, scale, bias, residual, relu, order, first, tile, false, std::nullopt, std::nullopt,
                  false)
      .y;
}

// Also returns relu(y * affine_scale + affine_bias).
std::tuple<Tensor, Tensor> sparse_conv2d_affine_two_four(
    Tensor x, Tensor values, Tensor metadata, Tensor extra_values, Tensor extra_metadata, Tensor extra_columns,
    Tensor extra_starts, int64_t first_slab, std::vector<int64_t> geometry, std::optional<Tensor> scale,
    std::optional<Tensor> bias, std::optional<Tensor> residual, bool relu, std::optional<Tensor> order,
    std::optional<Tensor> first, Tensor affine_scale, Tensor affine_bias, bool affine_relu, int64_t tile) {
  const Operand w = {values, metadata, extra_values, extra_metadata, extra_columns, extra_starts, first_slab};
  Results results = convolve(x, w, geometry, scale, bias, residual, relu, order, first, tile, true, affine_scale,
                             affine_bias, affine_relu);
  return {results.y, *results.second};
}

// Threads and bytes of shared memory of a thread block, which the compiled kernels do not tell.
std::tuple<int64_t, int64_t> two_four_resources(int64_t tile) {
  switch (tile) {
    case 0: return {Large<Half>::kThreads, Large<Half>::kSharedBytes};
    case 1: return {Flat<Half>::kThreads, Flat<Half>::kSharedBytes};
    case 2: return {Small<Half>::kThreads, Small<Half>::kSharedBytes};
    case 3: return {Narrow<Half>::kThreads, Narrow<Half>::kSharedBytes};
    default: refuse("tile is ", tile, ": accepted are 0 to 3");
  }
}

}  // namespace
}  // namespace smart::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(smart_kernels, m) {
  m.def(
      "sparse_conv2d_two_four(Tensor x, Tensor values, Tensor metadata, Tensor extra_values, Tensor extra_metadata, "
      "Tensor extra_columns, Tensor extra_starts, int first_slab, int[] geometry, Tensor? scale, Tensor? bias, "
      "Tensor? residual, bool relu, Tensor? order, Tensor? first, int tile=-1) -> Tensor");
  m.def(
      "sparse_conv2d_affine_two_four(Tensor x, Tensor values, Tensor metadata, Tensor extra_values, "
      "Tensor extra_metadata, Tensor extra_columns, Tensor extra_starts, int first_slab, int[] geometry, "
      "Tensor? scale, Tensor? bias, Tensor? residual, bool relu, Tensor? order, Tensor? first, Tensor affine_scale, "
      "Tensor affine_bias, "
      "bool affine_relu, int tile=-1) -> (Tensor, Tensor)");
  m.def("two_four_resources(int tile) -> (int, int)");
}

STABLE_TORCH_LIBRARY_IMPL(smart_kernels, CompositeExplicitAutograd, m) {
  m.impl("two_four_resources", TORCH_BOX(&smart::cuda::two_four_resources));
}

STABLE_TORCH_LIBRARY_IMPL(smart_kernels, CUDA, m) {
  m.impl("sparse_conv2d_two_four", TORCH_BOX(&smart::cuda::sparse_conv2d_two_four));
  m.impl("sparse_conv2d_affine_two_four", TORCH_BOX(&smart::cuda::sparse_conv2d_affine_two_four));
}
