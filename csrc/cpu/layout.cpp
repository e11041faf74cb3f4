#include "cpu/layout.h"

#include <algorithm>
#include <limits>

#include "cpu/tiles.h"
#include "cpu/winograd_plan.h"

namespace smart::cpu {

namespace {

// Cycles of AVX-512 cores, by measurement; only their ratios matter.
constexpr double kLoadNonzero = 1.7;  // its value, code and offset
constexpr double kFma = 1.2;          // of a vector in the L1 cache
constexpr double kFmaFar = 0.5;       // more than that when the panel is in the L2 cache
constexpr double kFill = 3.0;         // a vector of the panel
constexpr double kRow = 15.0;         // a row of non-zeros: its end is mispredicted
constexpr double kPark = 2.0;         // a vector of sums, to and fro
constexpr double kFar = 16.0;         // a vector of images that lie beyond the L2 cache, more than within it
constexpr double kInterleave = 6.0;   // a vector of images that lie one after another
constexpr double kSeparate = 30.0;    // likewise, of results, which go to each image in short runs
constexpr double kL1Bytes = 32 * 1024, kL2Bytes = 1024 * 1024;

// Tap row r reads, for output row p, row p + row_shift(r) of the rows of stride phase row_phase(r).
int64_t row_phase(const Problem& p, int64_t r) { return r * p.dilation_h % p.stride_h; }
int64_t row_shift(const Problem& p, int64_t r) { return r * p.dilation_h / p.stride_h; }

// For each of `count` taps, the number of its class: taps of one key are one class, numbered by first appearance.
template <class Key>
std::vector<int64_t> classes(int64_t count, int64_t keys, const Key& key) {
  std::vector<int64_t> of_key(keys, -1), of_tap(count);
  int64_t found = 0;
  for (int64_t tap = 0; tap < count; ++tap) {
    int64_t& number = of_key[key(tap)];
    if (number < 0) number = found++;
    of_tap[tap] = number;
  }
  return of_tap;
}

int64_t class_count(const std::vector<int64_t>& of_tap) { return 1 + *std::max_element(of_tap.begin(), of_tap.end()); }

// Pixel layout: tap rows that share planes; `pitch` floats lie between rows of outputs.
std::vector<int64_t> shared_rows(const Problem& p, int64_t width, int64_t pitch) {
  return classes(p.kernel_h, p.stride_h * width,
                 [&](int64_t r) { return row_phase(p, r) * width + row_shift(p, r) * pitch % width; });
}

// Image layout: stride phases that taps use.
std::vector<int64_t> used_phases(int64_t taps, int64_t dilation, int64_t stride) {
  return classes(taps, stride, [&](int64_t tap) { return tap * dilation % stride; });
}

int64_t first_of(const std::vector<int64_t>& of_tap, int64_t number) {
  return std::find(of_tap.begin(), of_tap.end(), number) - of_tap.begin();
}

// What the images of one block cost beside the products: bringing them to a panel, and the results away.
double image_cycles(const Problem& p, const Layout& l, int64_t width) {
  const double panel_vectors = static_cast<double>(tiles(l)) * p.in_channels * (l.channel / width);
  return panel_vectors * kFill + (l.lanes == 1 ? 0.0 : block_cycles(p, panel_vectors, width));
}

double cycles(const Problem& p, int64_t slab_channels, int64_t path_nonzeros, const Layout& l, int64_t width) {
  const double vectors = l.tile_rows * l.tile_cols;
  const double slab_count = static_cast<double>(ceil_div(p.in_channels / p.groups, slab_channels));
  const double panel_bytes = static_cast<double>(l.channel) * std::min(slab_channels, p.in_channels) * sizeof(float);
  const double far = std::clamp(panel_bytes / kL1Bytes - 1, 0.0, 1.0);
  const double sums = path_nonzeros * (vectors * (kFma + far * kFmaFar) + kLoadNonzero);
  const double rows = p.out_channels * slab_count * (kRow + (slab_count > 1 ? vectors * kPark : 0));
  return image_cycles(p, l, width) + tiles(l) * (sums + rows);
}

// The cheapest of the plans that `make` gives for tiles.
template <class Make>
Plan best_plan(const Problem& p, int64_t slab_channels, int64_t path_nonzeros, const Kernels& kernels,
               const Make& make) {
  Plan best = {};
  best.cycles = std::numeric_limits<double>::infinity();
  for (const Tile tile : kTiles) {
    if (tile.rows * tile.cols > kernels.max_tile) continue;
    Plan plan = {};
    plan.layout.tile_rows = tile.rows, plan.layout.tile_cols = tile.cols;
    if (!make(plan)) continue;
    plan.cycles = cycles(p, slab_channels, path_nonzeros, plan.layout, kernels.width);
    if (plan.cycles < best.cycles) best = plan;
  }
  return best;
}

}  // namespace

namespace {

// The planes of a pixel layout whose tile is chosen; rows of outputs are `pitch` floats apart.
void add_planes(const Problem& p, int64_t width, int64_t pitch, Plan& plan) {
  Layout& l = plan.layout;
  const std::vector<int64_t> sharing = shared_rows(p, width, pitch);
  std::vector<int64_t> first(class_count(sharing), -1), last(first.size());
  for (int64_t r = 0; r < p.kernel_h; ++r) {
    if (first[sharing[r]] < 0) first[sharing[r]] = r;
    last[sharing[r]] = r;
  }
  for (std::size_t n = 0; n < first.size(); ++n) {
    const int64_t span = (row_shift(p, last[n]) - row_shift(p, first[n])) * pitch;
    for (int64_t s = 0; s < p.kernel_w; ++s) {
      const int64_t length = l.tile_rows * l.tile_cols * width + span;
      plan.planes.push_back({first[n] * p.dilation_h, s * p.dilation_w, l.channel, length});
      l.channel += length;
    }
  }
}

std::vector<int32_t> code_offsets(const Problem& p, const Plan& plan, int64_t width, int64_t slab_channels) {
  const Layout& l = plan.layout;
  const int64_t taps = p.kernel_h * p.kernel_w;
  const bool by_pixel = l.lanes == 1;
  const int64_t pitch = l.flat ? p.out_width : l.row_stride;
  const std::vector<int64_t> rows =
      by_pixel ? shared_rows(p, width, pitch) : used_phases(p.kernel_h, p.dilation_h, p.stride_h);
  const std::vector<int64_t> columns = used_phases(p.kernel_w, p.dilation_w, p.stride_w);
  std::vector<int32_t> offsets(slab_channels * taps);
  for (int64_t r = 0; r < p.kernel_h; ++r) {
    for (int64_t s = 0; s < p.kernel_w; ++s) {
      int64_t at;
      if (by_pixel) {
        const int64_t shift = row_shift(p, r) - row_shift(p, first_of(rows, rows[r]));
        at = plan.planes[rows[r] * p.kernel_w + s].start + shift * pitch;
      } else {
        const Plane& plane = plan.planes[rows[r] * class_count(columns) + columns[s]];
        at = plane.start + row_shift(p, r) * l.row_stride + s * p.dilation_w / p.stride_w * width;
      }
      offsets[r * p.kernel_w + s] = static_cast<int32_t>(at);
    }
  }
  for (int64_t code = taps; code < slab_channels * taps; ++code) {
    offsets[code] = offsets[code - taps] + static_cast<int32_t>(l.channel);
  }
  return offsets;
}

Plan completed(Plan plan, const Problem& p, int64_t slab_channels, int64_t width) {
  const Layout& l = plan.layout;
  plan.fits = l.channel <= std::numeric_limits<int32_t>::max() / slab_channels;
  if (!plan.fits) return plan;
  plan.offsets = code_offsets(p, plan, width, slab_channels);
  plan.linear = l.tile_rows == 1;
  for (std::size_t code = 0; plan.linear && code < plan.offsets.size(); ++code)
    plan.linear = plan.offsets[code] == static_cast<int64_t>(code) * l.tile_cols * width;
  return plan;
}

}  // namespace

double block_cycles(const Problem& p, double vectors_read, int64_t width) {
  const double in = static_cast<double>(p.in_channels) * p.height * p.width;
  const double out = static_cast<double>(p.out_channels) * p.out_height * p.out_width;
  const double far = std::clamp((in + out) * width * sizeof(float) / kL2Bytes - 0.5, 0.0, 1.0) * kFar;
  // Results are stored, and often added to what is loaded from elsewhere.
  const double together = (vectors_read + 2 * out) * far;
  return p.interleaved ? together : together + in * kInterleave + out * kSeparate;
}

Plan pixel_plan(const Problem& p, int64_t slab_channels, int64_t path_nonzeros, const Kernels& kernels) {
  const int64_t width = kernels.width;
  if (reads_in_place(p, width)) return depthwise_plan(p, path_nonzeros, kernels);
  const Plan flat = best_plan(p, slab_channels, path_nonzeros, kernels, [&](Plan& plan) {
    Layout& l = plan.layout;
    if (l.tile_rows > 1) return false;
    l.lanes = 1, l.flat = true;
    l.grid_rows = 1, l.grid_cols = ceil_div(p.out_height * p.out_width, width);
    add_planes(p, width, p.out_width, plan);
    return true;
  });
  const Plan by_rows = best_plan(p, slab_channels, path_nonzeros, kernels, [&](Plan& plan) {
    Layout& l = plan.layout;
    l.lanes = 1;
    l.grid_rows = p.out_height, l.grid_cols = ceil_div(p.out_width, width);
    l.pitch = l.tile_cols, l.row_stride = l.pitch * width;
    add_planes(p, width, l.row_stride, plan);
    return true;
  });
  const Plan& best = by_rows.cycles < flat.cycles ? by_rows : flat;
  return cheaper_by_winograd(completed(best, p, slab_channels, width), p, path_nonzeros, kernels);
}

Plan image_plan(const Problem& p, int64_t slab_channels, int64_t path_nonzeros, const Kernels& kernels) {
  if (p.interleaved && reads_in_place(p, kernels.width)) return depthwise_plan(p, path_nonzeros, kernels);
  const std::vector<int64_t> rows = used_phases(p.kernel_h, p.dilation_h, p.stride_h);
  const std::vector<int64_t> columns = used_phases(p.kernel_w, p.dilation_w, p.stride_w);
  const Plan best = best_plan(p, slab_channels, path_nonzeros, kernels, [&](Plan& plan) {
    Layout& l = plan.layout;
    l.lanes = kernels.width;
    l.grid_rows = p.out_height, l.grid_cols = p.out_width;
    l.rows = l.tile_rows + (p.kernel_h - 1) * p.dilation_h / p.stride_h;
    l.pitch = l.tile_cols + (p.kernel_w - 1) * p.dilation_w / p.stride_w;
    l.row_stride = l.pitch * kernels.width;
    const int64_t plane = l.rows * l.row_stride;
    for (int64_t i = 0; i < class_count(rows); ++i) {
      for (int64_t j = 0; j < class_count(columns); ++j) {
        const int64_t row = first_of(rows, i) * p.dilation_h % p.stride_h;
        const int64_t column = first_of(columns, j) * p.dilation_w % p.stride_w;
        plan.planes.push_back({row, column, l.channel, plane});
        l.channel += plane;
      }
    }
    return true;
  });
  return cheaper_by_winograd(completed(best, p, slab_channels, kernels.width), p, path_nonzeros, kernels);
}

}  // namespace smart::cpu
