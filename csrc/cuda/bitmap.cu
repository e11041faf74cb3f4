// The convolution by weights as bitmaps, as operators. The body is in bitmap_body.h; the operand is that of
// smart_kernels/packing/bitmap.py, which validates all bits and starts when it is packed or loaded.
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "bitmap_body.h"
#include "implicit_gemm_launch.h"

namespace smart::cuda {
namespace {

template <class Traits>
void launch(const Bitmap& p, int64_t splits, const Tensor& x, int available) {
  const int bytes = Traits::shared_bytes(p.largest);
  SMART_CHECK(bytes <= available, "this tile and weight take ", bytes, " bytes of shared memory, this GPU has ",
              available, ": take a smaller tile, or -1 to choose");
  launch_gemm<BitmapBody, Traits>(p, bytes, splits, x, current_stream(x.get_device_index()));
}

// Large tiles where they fill the GPU and their values fit it, else small ones, which are split where they do not fill
// it either; no taller than there are channels.
template <class Element>
int choose_tile(const Bitmap& p, int device, int available) {
  const int processors = multiprocessors(device);
  const auto good = [&](auto traits) {
    using Traits = decltype(traits);
    return thread_blocks<Traits>(p) >= processors && Traits::shared_bytes(p.largest) <= available;
  };
  if (p.slabs == 1 && good(BitmapNarrow<Element>())) return 4;
  if (p.slabs == 2 && good(BitmapFlat<Element>())) return 2;
  if (p.slabs > 2 && good(BitmapLarge<Element>())) return 0;
  return p.slabs > 2 && good(BitmapTall<Element>()) ? 1 : 3;
}

template <class Element>
void launch_tile(const Bitmap& p, int64_t tile, int64_t splits, const Tensor& x) {
  const int device = x.get_device_index();
  const int available = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  switch (tile < 0 ? choose_tile<Element>(p, device, available) : tile) {
    case 0: return launch<BitmapLarge<Element>>(p, splits, x, available);
    case 1: return launch<BitmapTall<Element>>(p, splits, x, available);
    case 2: return launch<BitmapFlat<Element>>(p, splits, x, available);
    case 3: return launch<BitmapSmall<Element>>(p, splits, x, available);
    case 4: return launch<BitmapNarrow<Element>>(p, splits, x, available);
    default:
      refuse("tile is ", tile, ": accepted are 0 (large), 1 (tall), 2 (flat), 3 (small), 4 (narrow), and -1 to choose");
  }
}

// Tensors of a packed weight, in the order of BitmapWeight.operand.
struct Operand {
  const Tensor &values, &bits, &starts;
  int64_t first_slab, largest;
};

Bitmap read(const Tensor& x, const Operand& w, const std::vector<int64_t>& geometry) {
  Bitmap p = {};
  read_gemm(x, geometry, &p);
  cut_columns(&p);
  const int64_t chunks = w.bits.size(0);
  read_first_slab(w.first_slab, chunks / p.blocks, &p);
  SMART_CHECK(0 <= w.largest && w.largest <= kChunkWeights && w.largest % kCopyElements == 0, "largest is ", w.largest,
              ": a multiple of ", kCopyElements, " up to ", kChunkWeights, " is needed");
  check_kind(w.values, "values", x, x.scalar_type(), w.values.numel());
  check_kind(w.bits, "bits", x, ScalarType::Int, chunks * 32 * kBlockSteps);
  check_kind(w.starts, "starts", x, ScalarType::Int, chunks + 1);
  p.values = read_words(w.values, "values");
  SMART_CHECK(is_aligned(w.bits.const_data_ptr()), "bits do not begin at a multiple of 16 bytes: clone() them");
  p.bits = static_cast<const uint32_t*>(w.bits.const_data_ptr());
  p.starts = static_cast<const int32_t*>(w.starts.const_data_ptr());
  p.largest = static_cast<int>(w.largest);
  return p;
}

Results run(const Tensor& x, const Operand& weight, const std::vector<int64_t>& geometry, const Finish& finish,
            int64_t tile, int64_t splits) {
  return convolve(read(x, weight, geometry), x, finish, [&](const Bitmap& p) {
    if (x.scalar_type() == ScalarType::Half)
      launch_tile<Half>(p, tile, splits, x);
    else
      launch_tile<Brain>(p, tile, splits, x);
  });
}

Tensor sparse_conv2d_bitmap(Tensor x, Tensor values, Tensor bits, Tensor starts, int64_t first_slab, int64_t largest,
                            std::vector<int64_t> geometry, std::optional<Tensor> scale, std::optional<Tensor> bias,
                            std::optional<Tensor> residual, bool relu, std::optional<Tensor> order,
                            std::optional<Tensor> first, int64_t tile, int64_t splits) {
  const Operand weight = {values, bits, starts, first_slab, largest};
  return run(x, weight, geometry, {scale, bias, residual, relu, order, first, nullptr}, tile, splits).y;
}

// Also returns relu(y * affine_scale + affine_bias).
std::tuple<Tensor, Tensor> sparse_conv2d_affine_bitmap(
    Tensor x, Tensor values, Tensor bits, Tensor starts, int64_t first_slab, int64_t largest,
    std::vector<int64_t> geometry, std::optional<Tensor> scale, std::optional<Tensor> bias,
    std::optional<Tensor> residual, bool relu, std::optional<Tensor> order, std::optional<Tensor> first,
    Tensor affine_scale, Tensor affine_bias, bool affine_relu, int64_t tile, int64_t splits) {
  const Operand weight = {values, bits, starts, first_slab, largest};
  const Affine affine = {affine_scale, affine_bias, affine_relu};
  Results results = run(x, weight, geometry, {scale, bias, residual, relu, order, first, &affine}, tile, splits);
  return {results.y, *results.second};
}

// Threads and bytes of shared memory of a thread block, with at most so many values a slab and block.
std::tuple<int64_t, int64_t> bitmap_resources(int64_t tile, int64_t largest) {
  SMART_CHECK(0 <= largest && largest <= kChunkWeights, "largest is ", largest, ": 0 to ", kChunkWeights,
              " are accepted");
  const int of_chunk = static_cast<int>(largest);
  switch (tile) {
    case 0: return {BitmapLarge<Half>::kThreads, BitmapLarge<Half>::shared_bytes(of_chunk)};
    case 1: return {BitmapTall<Half>::kThreads, BitmapTall<Half>::shared_bytes(of_chunk)};
    case 2: return {BitmapFlat<Half>::kThreads, BitmapFlat<Half>::shared_bytes(of_chunk)};
    case 3: return {BitmapSmall<Half>::kThreads, BitmapSmall<Half>::shared_bytes(of_chunk)};
    case 4: return {BitmapNarrow<Half>::kThreads, BitmapNarrow<Half>::shared_bytes(of_chunk)};
    default: refuse("tile is ", tile, ": accepted are 0 to 4");
  }
}

}  // namespace
}  // namespace smart::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(smart_kernels, m) {
  m.def(
      "sparse_conv2d_bitmap(Tensor x, Tensor values, Tensor bits, Tensor starts, int first_slab, int largest, "
      "int[] geometry, Tensor? scale, Tensor? bias, Tensor? residual, bool relu, Tensor? order, Tensor? first, "
      "int tile=-1, int splits=0) -> Tensor");
  m.def(
      "sparse_conv2d_affine_bitmap(Tensor x, Tensor values, Tensor bits, Tensor starts, int first_slab, int largest, "
      "int[] geometry, Tensor? scale, Tensor? bias, Tensor? residual, bool relu, Tensor? order, Tensor? first, "
      "Tensor affine_scale, Tensor affine_bias, bool affine_relu, int tile=-1, int splits=0) -> (Tensor, Tensor)");
  m.def("bitmap_resources(int tile, int largest) -> (int, int)");
}

STABLE_TORCH_LIBRARY_IMPL(smart_kernels, CompositeExplicitAutograd, m) {
  m.impl("bitmap_resources", TORCH_BOX(&smart::cuda::bitmap_resources));
}

STABLE_TORCH_LIBRARY_IMPL(smart_kernels, CUDA, m) {
  m.impl("sparse_conv2d_bitmap", TORCH_BOX(&smart::cuda::sparse_conv2d_bitmap));
  m.impl("sparse_conv2d_affine_bitmap", TORCH_BOX(&smart::cuda::sparse_conv2d_affine_bitmap));
}
