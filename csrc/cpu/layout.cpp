#include "cpu/layout.h"

namespace smart::cpu {

namespace {

struct Tile {
  int64_t rows, cols;
};

// Exactly those compiled in cpu/kernels.h; of equally good ones the first wins, so longer runs of pixels come first.
// Up to eight vectors: two FMA ports times four cycles of latency keep eight sums in flight.
constexpr Tile kTiles[] = {{1, 8}, {1, 7}, {1, 6}, {1, 5}, {2, 4}, {4, 2}, {8, 1},
                           {1, 4}, {2, 2}, {4, 1}, {1, 3}, {1, 2}, {1, 1}};

int64_t vectors_with(const Layout& l, Tile t) {
  return ceil_div(l.grid_rows, t.rows) * t.rows * ceil_div(l.grid_cols, t.cols) * t.cols;
}

// A vector of a tile costs its FMAs; a tile also costs reading every non-zero and its offset once, about as much as
// two FMAs.
int64_t cost(const Layout& l, Tile t) {
  const int64_t tile_count = ceil_div(l.grid_rows, t.rows) * ceil_div(l.grid_cols, t.cols);
  return vectors_with(l, t) + 2 * tile_count;
}

void choose_tile(Layout& l) {
  Tile best = {1, 1};
  for (const Tile t : kTiles) {
    // The epilogue transposes squares of `lanes` pixels.
    if (l.lanes > 1 && t.cols > l.lanes) continue;
    if (cost(l, t) < cost(l, best)) best = t;
  }
  l.tile_rows = best.rows;
  l.tile_cols = best.cols;
}

void finish_layout(const Problem& p, Layout& l, int64_t width) {
  choose_tile(l);
  // The tile that hangs furthest over the last output's edge reads this far past its channel.
  const int64_t slack = l.tile_rows * l.row_stride + l.tile_cols * width;
  l.workspace = p.in_channels * l.channel + slack;
}

}  // namespace

int64_t cost(const Layout& l) { return cost(l, {l.tile_rows, l.tile_cols}); }

Layout pixel_layout(const Problem& p, int64_t width) {
  Layout l = {};
  l.lanes = 1;
  for (int64_t r = 0; r < p.kernel_h; ++r) l.row_copies += row_copy(p, r, width) == r;
  l.rows = p.out_height + row_shift(p, p.kernel_h - 1);
  l.pitch = p.out_width;
  l.plane = width + ceil_div(l.rows * l.pitch, width) * width;
  // Copies are written in whole vectors, which run over the last plane's end.
  l.channel = l.row_copies * p.kernel_w * l.plane + width;
  l.grid_rows = 1;
  l.grid_cols = ceil_div(p.out_height * p.out_width, width);
  finish_layout(p, l, width);
  return l;
}

Layout image_layout(const Problem& p, int64_t width) {
  const int64_t reach_h = (p.kernel_h - 1) * p.dilation_h, reach_w = (p.kernel_w - 1) * p.dilation_w;
  Layout l = {};
  l.lanes = width;
  l.phases_h = min(p.stride_h, reach_h + 1);
  l.phases_w = min(p.stride_w, reach_w + 1);
  l.rows = p.out_height + reach_h / p.stride_h;
  l.pitch = p.out_width + reach_w / p.stride_w;
  l.plane = l.rows * l.pitch * width;
  l.channel = l.phases_h * l.phases_w * l.plane;
  l.grid_rows = p.out_height;
  l.grid_cols = p.out_width;
  l.row_stride = l.pitch * width;
  finish_layout(p, l, width);
  return l;
}

void fill_offsets(const Problem& p, const Layout& l, int64_t width, int64_t slab_channels, int32_t* offsets) {
  const int64_t taps = p.kernel_h * p.kernel_w;
  for (int64_t r = 0; r < p.kernel_h; ++r) {
    // Copies are numbered in the order of their first tap rows.
    int64_t copy = 0;
    for (int64_t earlier = 0; earlier < row_copy(p, r, width); ++earlier) {
      copy += row_copy(p, earlier, width) == earlier;
    }
    for (int64_t s = 0; s < p.kernel_w; ++s) {
      const int64_t w = s * p.dilation_w;
      const int64_t by_image = (row_phase(p, r) * l.phases_w + w % p.stride_w) * l.plane +
                               (row_shift(p, r) * l.pitch + w / p.stride_w) * l.lanes;
      const int64_t by_pixel = (copy * p.kernel_w + s) * l.plane + plane_start(p, r, width) + row_shift(p, r) * l.pitch;
      offsets[r * p.kernel_w + s] = static_cast<int32_t>(l.lanes == 1 ? by_pixel : by_image);
    }
  }
  for (int64_t code = taps; code < slab_channels * taps; ++code) {
    offsets[code] = offsets[code - taps] + static_cast<int32_t>(l.channel);
  }
}

}  // namespace smart::cpu
