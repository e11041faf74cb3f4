// Plans of depthwise convolutions; see `Reads` in cpu/problem.h.
#include <algorithm>
#include <limits>

#include "cpu/layout.h"

namespace smart::cpu {

namespace {

// Cycles of AVX-512 cores, by measurement, as in layout.cpp.
constexpr double kTap = 2.0;       // a vector that a tap reads and multiplies
constexpr double kVector = 6.0;    // a vector of results
constexpr double kChannel = 40.0;  // an output channel: the number of its taps is a surprise
constexpr int64_t kMostBits = 1 << 18;

// The first output of each vector, (row, column), and the numbers it holds.
struct Start {
  int64_t p, q, count;
};

// Outputs and pixels lie alike where each step to the next output, also from one row's end to the next, is a pixel.
bool lies_alike(const Problem& p) { return p.stride_h == 1 && p.stride_w == 1 && p.out_width == p.width; }

std::vector<Start> starts(const Problem& p, int64_t width) {
  std::vector<Start> found;
  const bool alike = lies_alike(p) && !p.interleaved;
  const int64_t rows = alike ? 1 : p.out_height, row = alike ? p.out_height * p.out_width : p.out_width;
  const int64_t step = p.interleaved ? 1 : width;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < row; j += step) {
      const int64_t output = i * row + j;
      found.push_back({output / p.out_width, output % p.out_width, p.interleaved ? width : std::min(width, row - j)});
    }
  }
  return found;
}

// Which lanes of a vector a tap reads inside the image.
int32_t lanes_inside(const Problem& p, const Start& start, int64_t r, int64_t s, int64_t width) {
  int32_t bits = 0;
  int64_t i = start.p, j = start.q;
  for (int64_t lane = 0; lane < start.count; ++lane) {
    const int64_t h = i * p.stride_h + r * p.dilation_h - p.pad_top;
    const int64_t w = j * p.stride_w + s * p.dilation_w - p.pad_left;
    const bool inside = h >= 0 && h < p.height && w >= 0 && w < p.width;
    if (p.interleaved) return inside ? static_cast<int32_t>((int64_t{1} << width) - 1) : 0;
    if (inside) bits |= 1 << lane;
    if (++j == p.out_width) j = 0, ++i;
  }
  return bits;
}

// The tile that leaves the fewest vectors empty; of equally good ones the largest.
int64_t best_tile(int64_t vectors) {
  int64_t best = kMostReads;
  for (int64_t tile = kMostReads; tile > 0; --tile) {
    // Each tile begins with the weights again.
    const auto cost = [&](int64_t t) { return ceil_div(vectors, t) * (t + 2); };
    if (cost(tile) < cost(best)) best = tile;
  }
  return best;
}

}  // namespace

bool reads_in_place(const Problem& p, int64_t width) {
  const int64_t lanes = p.interleaved ? width : 1, taps = p.kernel_h * p.kernel_w;
  const int64_t reach = (p.kernel_h * p.dilation_h + p.pad_top + 1) * p.width + p.kernel_w * p.dilation_w + p.pad_left;
  const int64_t numbers = (p.height * p.width + p.out_height * p.out_width + reach + width * p.stride_w) * lanes;
  const int64_t vectors = p.out_height * (p.interleaved ? p.out_width : ceil_div(p.out_width, width));
  return p.groups > 1 && p.groups == p.in_channels && numbers < std::numeric_limits<int32_t>::max() &&
         vectors <= kMostBits / taps;
}

Plan depthwise_plan(const Problem& p, int64_t path_nonzeros, const Kernels& kernels) {
  const int64_t width = kernels.width, lanes = p.interleaved ? width : 1;
  const std::vector<Start> found = starts(p, width);
  Plan plan = {};
  plan.layout.lanes = lanes, plan.fits = true, plan.depthwise = true;
  plan.tile = best_tile(static_cast<int64_t>(found.size()));
  const int64_t vectors = ceil_div(static_cast<int64_t>(found.size()), plan.tile) * plan.tile;
  plan.from.resize(vectors), plan.to.resize(vectors), plan.count.resize(vectors);
  plan.inside.resize(p.kernel_h * p.kernel_w * vectors);
  for (std::size_t v = 0; v < found.size(); ++v) {
    const Start& start = found[v];
    plan.from[v] = static_cast<int32_t>((start.p * p.stride_h * p.width + start.q * p.stride_w) * lanes);
    plan.to[v] = static_cast<int32_t>((start.p * p.out_width + start.q) * lanes);
    plan.count[v] = static_cast<int32_t>(start.count);
  }
  for (int64_t r = 0; r < p.kernel_h; ++r) {
    for (int64_t s = 0; s < p.kernel_w; ++s) {
      const int64_t tap = r * p.kernel_w + s;
      const int64_t shift = (r * p.dilation_h - p.pad_top) * p.width + s * p.dilation_w - p.pad_left;
      plan.shifts.push_back(static_cast<int32_t>(shift * lanes));
      for (std::size_t v = 0; v < found.size(); ++v)
        plan.inside[tap * vectors + v] = lanes_inside(p, found[v], r, s, width);
    }
  }
  const int64_t last = *std::max_element(plan.from.begin(), plan.from.end());
  plan.before = max(0, -*std::min_element(plan.shifts.begin(), plan.shifts.end()));
  plan.after = last + *std::max_element(plan.shifts.begin(), plan.shifts.end()) + width * (lanes > 1 ? 1 : p.stride_w);
  plan.after = max(plan.after, p.height * p.width * lanes);
  plan.cycles = vectors * (path_nonzeros * kTap + p.out_channels * kVector) + p.out_channels * kChannel;
  return plan;
}

}  // namespace smart::cpu
