// The 2:4 convolution as operators. The body is in two_four_body.h; the operand is that of
// smart_kernels/packing/two_four.py, which validates all indices when it is packed or loaded.
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "implicit_gemm_launch.h"
#include "two_four_body.h"
#include "wgmma_launch.h"

namespace smart::cuda {
namespace {

template <class Traits>
void launch(const TwoFour& p, int64_t splits, const Tensor& x, cudaStream_t stream) {
  launch_gemm<TwoFourBody, Traits>(p, Traits::kSharedBytes, splits, x, stream);
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
      return launch_add<Element, ImplicitGemm>(with_splits, stream);
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
  TwoFour p = {};
  read_gemm(x, geometry, &p);
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
  cut_columns(&p);
  const int64_t step = static_cast<int64_t>(kSlabChannels) * kStepColumns / 2, slabs = w.values.size(0);
  const int64_t extra = w.extra_values.size(0);
  read_first_slab(w.first_slab, slabs, &p);
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
  return p;
}

Results run(const Tensor& x, const Operand& weight, const std::vector<int64_t>& geometry, const Finish& finish,
            int64_t tile, const std::optional<Tensor>& column_runs, int64_t splits) {
  return convolve(read(x, weight, geometry, column_runs), x, finish, [&](const TwoFour& p) {
    if (x.scalar_type() == ScalarType::Half)
      launch_tile<Half>(p, tile, splits, x);
    else
      launch_tile<Brain>(p, tile, splits, x);
  });
}

Tensor sparse_conv2d_two_four(Tensor x, Tensor values, Tensor metadata, Tensor extra_values, Tensor extra_metadata,
                              Tensor extra_columns, Tensor extra_starts, int64_t first_slab,
                              std::vector<int64_t> geometry, std::optional<Tensor> scale, std::optional<Tensor> bias,
                              std::optional<Tensor> residual, bool relu, std::optional<Tensor> order,
                              std::optional<Tensor> first, int64_t tile, std::optional<Tensor> column_runs,
                              int64_t splits) {
  const Operand w = {values, metadata, extra_values, extra_metadata, extra_columns, extra_starts, first_slab};
  return run(x, w, geometry, {scale, bias, residual, relu, order, first, nullptr}, tile, column_runs, splits).y;
}

// Also returns relu(y * affine_scale + affine_bias).
std::tuple<Tensor, Tensor> sparse_conv2d_affine_two_four(
    Tensor x, Tensor values, Tensor metadata, Tensor extra_values, Tensor extra_metadata, Tensor extra_columns,
    Tensor extra_starts, int64_t first_slab, std::vector<int64_t> geometry, std::optional<Tensor> scale,
    std::optional<Tensor> bias, std::optional<Tensor> residual, bool relu, std::optional<Tensor> order,
    std::optional<Tensor> first, Tensor affine_scale, Tensor affine_bias, bool affine_relu, int64_t tile,
    std::optional<Tensor> column_runs, int64_t splits) {
  const Operand w = {values, metadata, extra_values, extra_metadata, extra_columns, extra_starts, first_slab};
  const Affine affine = {affine_scale, affine_bias, affine_relu};
  Results results =
      run(x, w, geometry, {scale, bias, residual, relu, order, first, &affine}, tile, column_runs, splits);
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
