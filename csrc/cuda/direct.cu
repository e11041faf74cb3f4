// The direct convolution in float32 as operators. The body is in direct_body.h; the weight is that of
// smart_kernels/packing/unstructured.py, which validates all codes and segments when it is packed or loaded.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "direct_body.h"
#include "gpu.h"
#include "stream.h"

namespace smart::cuda {
namespace {

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kResident) direct(const __grid_constant__ Direct p) {
  extern __shared__ __align__(128) char shared[];
  DirectBody<Traits, Gpu>(Gpu(), p, shared).run();
}

template <class Traits>
int64_t thread_blocks(const Direct& p) {
  const int64_t tiles = (p.group_outputs + Traits::kChannels - 1) / Traits::kChannels * static_cast<int64_t>(p.groups);
  // The last tile of the first path's pixels may be cut short: that can make one more.
  return ((static_cast<int64_t>(p.pixels) + Traits::kPixels - 1) / Traits::kPixels + (p.order != nullptr)) * tiles;
}

template <class Traits>
int shared_bytes(const Direct& p) {
  return Traits::shared_bytes(p.slab_channels * p.taps);
}

template <class Traits>
void launch(const Direct& p, cudaStream_t stream) {
  const int64_t blocks = thread_blocks<Traits>(p);
  SMART_CHECK(blocks <= std::numeric_limits<int>::max(), blocks, " tiles are more than one launch takes");
  const int bytes = shared_bytes<Traits>(p);
  check(cudaFuncSetAttribute(direct<Traits>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "asking for shared memory");
  direct<Traits><<<static_cast<int>(blocks), Traits::kThreads, bytes, stream>>>(p);
  check(cudaGetLastError(), "launching the direct convolution");
}

// Large tiles where they fill the GPU and their panel fits it, else smaller ones.
int choose_tile(const Direct& p, int device) {
  const int processors = attribute(cudaDevAttrMultiProcessorCount, device);
  const int available = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (thread_blocks<DirectLarge>(p) >= processors && shared_bytes<DirectLarge>(p) <= available) return 0;
  return thread_blocks<DirectMedium>(p) >= processors ? 1 : 2;
}

void launch_tile(const Direct& p, int64_t tile, int device) {
  const cudaStream_t stream = current_stream(device);
  switch (tile < 0 ? choose_tile(p, device) : tile) {
    case 0: return launch<DirectLarge>(p, stream);
    case 1: return launch<DirectMedium>(p, stream);
    case 2: return launch<DirectSmall>(p, stream);
    default: refuse("tile is ", tile, ": accepted are 0 (large), 1 (medium), 2 (small), and -1 to choose");
  }
}

// Tensors of a packed weight, and which of its segments are the path's.
struct Stream {
  const Tensor &values, &codes, &segments;
  int64_t slab_channels, first_segment, last_segment;
};

Direct read(const Tensor& x, const Stream& w, const std::vector<int64_t>& geometry) {
  SMART_CHECK(geometry.size() == 13, "geometry has ", geometry.size(), " numbers: 13 are needed");
  SMART_CHECK(x.is_cuda() && x.dim() == 4 && x.scalar_type() == ScalarType::Float, "input has shape ", shape_of(x),
              ": float32 (N, C, H, W) on a GPU is needed");
  const cpu::Problem c = read_problem(x.size(0), x.size(1), x.size(2), x.size(3), geometry.data());
  Direct p = {};
  read_pixels(c, &p);
  SMART_CHECK(0 <= w.first_segment && w.first_segment < w.last_segment && w.last_segment <= kSegments,
              "0 <= first_segment < last_segment <= 3 is needed");
  SMART_CHECK(w.slab_channels > 0 && w.slab_channels <= kMaxCodes && c.kernel_h <= kMaxCodes &&
                  c.kernel_w <= kMaxCodes && w.slab_channels * c.kernel_h * c.kernel_w <= kMaxCodes,
              "slabs of ", w.slab_channels, " channels and ", c.kernel_h, "x", c.kernel_w,
              " taps do not fit codes of one byte");
  p.taps = static_cast<int>(c.kernel_h * c.kernel_w);
  p.groups = static_cast<int>(c.groups);
  p.group_channels = static_cast<int>(c.in_channels / c.groups);
  p.group_outputs = static_cast<int>(c.out_channels / c.groups);
  p.slab_channels = static_cast<int>(w.slab_channels);
  p.slabs = (p.group_channels + p.slab_channels - 1) / p.slab_channels;
  p.first_segment = static_cast<int>(w.first_segment), p.last_segment = static_cast<int>(w.last_segment);
  check_kind(w.values, "values", x, ScalarType::Float, w.values.numel());
  check_kind(w.codes, "codes", x, ScalarType::Byte, w.values.numel());
  check_kind(w.segments, "segments", x, ScalarType::Int,
             static_cast<int64_t>(p.slabs) * c.out_channels * kSegments + 1);
  p.values = static_cast<const float*>(w.values.const_data_ptr());
  p.codes = static_cast<const uint8_t*>(w.codes.const_data_ptr());
  p.segments = static_cast<const int32_t*>(w.segments.const_data_ptr());
  return p;
}

struct Results {
  Tensor y;
  std::optional<Tensor> second;
};

// The epilogue that follows both results' sums. Null: there is no second result.
struct Affine {
  const Tensor &scale, &bias;
  bool relu;
};

Results convolve(const Tensor& x, const Stream& weight, const std::vector<int64_t>& geometry,
                 const std::optional<Tensor>& scale, const std::optional<Tensor>& bias,
                 const std::optional<Tensor>& residual, bool relu, const std::optional<Tensor>& order,
                 const std::optional<Tensor>& first, int64_t tile, const Affine* affine) {
  Direct p = read(x, weight, geometry);
  SMART_CHECK(order.has_value() == first.has_value(), "order and first go together: give both, or neither");
  p.order = read_indices(order, "order", x, p.batch), p.first = read_indices(first, "first", x, 1);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const std::vector<int64_t> shape = {p.batch, p.out_channels, p.out_height, p.out_width};
  Results results = {empty_result(shape, x), std::nullopt};
  const Tensor pixels = channels_last(x);
  p.x = static_cast<const float*>(pixels.const_data_ptr());
  p.y = static_cast<float*>(results.y.mutable_data_ptr());
  const auto channels = [&](const std::optional<Tensor>& tensor, const char* name) {
    return read_channels(tensor, name, p.out_channels, order.has_value(), x);
  };
  p.scale = channels(scale, "scale"), p.bias = channels(bias, "bias"), p.relu = relu;
  const std::optional<Tensor> added = read_residual(residual, results.y);
  if (added) p.residual = static_cast<const float*>(added->const_data_ptr());
  if (affine) {
    results.second = empty_result(shape, x);
    p.second = static_cast<float*>(results.second->mutable_data_ptr());
    p.second_scale = channels(affine->scale, "affine_scale"), p.second_bias = channels(affine->bias, "affine_bias");
    p.second_relu = affine->relu;
  }
  p.quads = p.group_channels % kQuad == 0 && p.slab_channels % kQuad == 0 && is_aligned(p.x);
  p.wide_output = p.group_outputs % kQuad == 0 && (!p.residual || is_aligned(p.residual));
  if (p.pixels > 0) launch_tile(p, tile, x.get_device_index());
  return results;
}

Tensor sparse_conv2d_direct(Tensor x, Tensor values, Tensor codes, Tensor segments, std::vector<int64_t> geometry,
                            int64_t slab_channels, int64_t first_segment, int64_t last_segment,
                            std::optional<Tensor> scale, std::optional<Tensor> bias, std::optional<Tensor> residual,
                            bool relu, std::optional<Tensor> order, std::optional<Tensor> first, int64_t tile) {
  const Stream w = {values, codes, segments, slab_channels, first_segment, last_segment};
  return convolve(x, w, geometry, scale, bias, residual, relu, order, first, tile, nullptr).y;
}

// Also returns relu(y * affine_scale + affine_bias).
std::tuple<Tensor, Tensor> sparse_conv2d_affine_direct(
    Tensor x, Tensor values, Tensor codes, Tensor segments, std::vector<int64_t> geometry, int64_t slab_channels,
    int64_t first_segment, int64_t last_segment, std::optional<Tensor> scale, std::optional<Tensor> bias,
    std::optional<Tensor> residual, bool relu, std::optional<Tensor> order, std::optional<Tensor> first,
    Tensor affine_scale, Tensor affine_bias, bool affine_relu, int64_t tile) {
  const Stream w = {values, codes, segments, slab_channels, first_segment, last_segment};
  const Affine affine = {affine_scale, affine_bias, affine_relu};
  Results results = convolve(x, w, geometry, scale, bias, residual, relu, order, first, tile, &affine);
  return {results.y, *results.second};
}

// Threads and bytes of shared memory of a thread block, with slabs of so many codes.
std::tuple<int64_t, int64_t> direct_resources(int64_t tile, int64_t codes) {
  SMART_CHECK(0 < codes && codes <= kMaxCodes, "codes is ", codes, ": 1 to ", kMaxCodes, " are accepted");
  const int of_slab = static_cast<int>(codes);
  switch (tile) {
    case 0: return {DirectLarge::kThreads, DirectLarge::shared_bytes(of_slab)};
    case 1: return {DirectMedium::kThreads, DirectMedium::shared_bytes(of_slab)};
    case 2: return {DirectSmall::kThreads, DirectSmall::shared_bytes(of_slab)};
    default: refuse("tile is ", tile, ": accepted are 0 to 2");
  }
}

}  // namespace
}  // namespace smart::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(smart_kernels, m) {
  m.def(
      "sparse_conv2d_direct(Tensor x, Tensor values, Tensor codes, Tensor segments, int[] geometry, int slab_channels, "
      "int first_segment, int last_segment, Tensor? scale, Tensor? bias, Tensor? residual, bool relu, Tensor? order, "
      "Tensor? first, int tile=-1) -> Tensor");
  m.def(
      "sparse_conv2d_affine_direct(Tensor x, Tensor values, Tensor codes, Tensor segments, int[] geometry, "
      "int slab_channels, int first_segment, int last_segment, Tensor? scale, Tensor? bias, Tensor? residual, "
      "bool relu, Tensor? order, Tensor? first, Tensor affine_scale, Tensor affine_bias, bool affine_relu, "
      "int tile=-1) -> (Tensor, Tensor)");
  m.def("direct_resources(int tile, int codes) -> (int, int)");
}

STABLE_TORCH_LIBRARY_IMPL(smart_kernels, CompositeExplicitAutograd, m) {
  m.impl("direct_resources", TORCH_BOX(&smart::cuda::direct_resources));
}

STABLE_TORCH_LIBRARY_IMPL(smart_kernels, CUDA, m) {
  m.impl("sparse_conv2d_direct", TORCH_BOX(&smart::cuda::sparse_conv2d_direct));
  m.impl("sparse_conv2d_affine_direct", TORCH_BOX(&smart::cuda::sparse_conv2d_affine_direct));
}
