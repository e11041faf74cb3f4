#include "cpu/winograd_plan.h"

#include <limits>
#include <memory>
#include <utility>

namespace smart::cpu {

namespace {

// Cycles, as those of cpu/layout.cpp.
constexpr double kProduct = 1.1;                      // of a vector, in the matrix products
constexpr double kInImages = 300, kInPixels = 550;    // a vector of patches of one input channel
constexpr double kOutImages = 250, kOutPixels = 260;  // a vector of tiles of one output channel
constexpr double kPatchReads = 28;                    // vectors of pixels, for a patch beside others
constexpr double kTransform = 17;                     // a 3x3 weight
constexpr double kUnpack = 5;                         // a non-zero
constexpr int64_t kMostVectors = 3;
constexpr int64_t kMostPointBytes = 900 * 1024;  // of a block's points, in the L2 cache

bool can_run(const Problem& p) {
  return p.kernel_h == 3 && p.kernel_w == 3 && p.stride_h == 1 && p.stride_w == 1 && p.dilation_h == 1 &&
         p.dilation_w == 1 && p.groups == 1;
}

// Blocks of the shape that needs the fewest vectors for all tiles; of equally good ones the largest.
Winograd choose_blocks(const Problem& p, int64_t tiles_a_vector, int64_t width, double& vectors) {
  const int64_t rows = ceil_div(p.out_height, 4), cols = ceil_div(p.out_width, 4);
  int64_t most = kMostPointBytes / static_cast<int64_t>(36 * p.in_channels * width * sizeof(float));
  most = max(1, min(most, kMostVectors));
  Winograd best = {};
  vectors = std::numeric_limits<double>::infinity();
  for (int64_t parts = 1; parts <= cols; ++parts) {
    const int64_t w = ceil_div(cols, parts);
    const int64_t h = min(rows, most * tiles_a_vector / w);
    if (h == 0) continue;
    for (int64_t r = h; r > 0; --r) {
      const int64_t each = ceil_div(r * w, tiles_a_vector);
      // Halves of a vector more for each block: products of few vectors wait for their weights.
      const double all = static_cast<double>(ceil_div(rows, r) * ceil_div(cols, w)) * (each + 0.15);
      if (all < vectors) best = {r, w, each}, vectors = all;
    }
    if (h == rows || w < tiles_a_vector) break;
  }
  return best;
}

}  // namespace

Plan cheaper_by_winograd(Plan direct, const Problem& p, int64_t path_nonzeros, const Kernels& kernels) {
  if (kernels.winograd == Choice::kNever || !can_run(p) || !direct.fits) return direct;
  const bool by_pixel = direct.layout.lanes == 1;
  Plan plan = {};
  plan.layout.lanes = direct.layout.lanes;
  double vectors;
  plan.winograd = choose_blocks(p, by_pixel ? kernels.width : 1, kernels.width, vectors);
  const double weights = static_cast<double>(p.in_channels) * p.out_channels;
  plan.cycles = vectors * (weights * 36 * kProduct + p.in_channels * (by_pixel ? kInPixels : kInImages) +
                           p.out_channels * (by_pixel ? kOutPixels : kOutImages));
  if (!by_pixel) plan.cycles += block_cycles(p, vectors * p.in_channels * kPatchReads, kernels.width);
  plan.cycles += (weights * kTransform + path_nonzeros * kUnpack) / (by_pixel ? max(1, p.batch) : 1);
  if (kernels.winograd == Choice::kAuto && plan.cycles >= direct.cycles) return direct;
  plan.fits = true;
  plan.direct = std::make_shared<const Plan>(std::move(direct));
  return plan;
}

}  // namespace smart::cpu
