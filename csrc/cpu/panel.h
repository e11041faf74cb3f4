// Gathers what a tile reads into the panel. Part of cpu/kernels.h, which says how it is compiled.
#pragma once

#include "cpu/vectors.h"

namespace smart::cpu::SMART_ISA {

// ---- pixel layout, of any stride ----

// What a plane takes from one row of an image, of every channel alike: `count` numbers, every stride_w-th from number
// `from` of the channel on, of which the first and last few lie beside the image and are zeros.
struct Run {
  int64_t to, from;     // floats, from the channel's beginning in the panel and in x
  int64_t count, room;  // up to `room` may be written: what is too many is overwritten by the next run
  int64_t zeros_before, zeros_after;
};

static inline Run run_of(const Problem& p, int64_t h, int64_t w, int64_t to, int64_t count, int64_t room) {
  Run run = {to, h * p.width + w, count, room, 0, 0};
  if (h < 0 || h >= p.height) {
    run.zeros_before = count;
    return run;
  }
  if (w < 0) run.zeros_before = min(count, ceil_div(-w, p.stride_w));
  const int64_t inside = p.width > w ? ceil_div(p.width - w, p.stride_w) : 0;
  run.zeros_after = max(0, count - max(inside, run.zeros_before));
  return run;
}

// Fills one channel's run.
static inline void fill_run(const Job& job, const Run& run, const float* channel, float* to) {
  const int64_t stride = job.problem.stride_w, whole = ceil_div(run.count, kWidth) * kWidth;
  to += run.to;
  if (run.zeros_before == run.count) return fill_zero(to, run.count);
  const float* from = channel + run.from;
  // Runs begin and end beside the row, but may not be read beside the tensor.
  if (stride > 2 || whole > run.room || from < job.x || from + whole * stride > job.x_end) {
    for (int64_t j = run.zeros_before; j < run.count - run.zeros_after; ++j) to[j] = from[j * stride];
  } else if (stride == 1) {
    for (int64_t j = 0; j < whole; j += kWidth) store(to + j, load(from + j));
  } else {
    for (int64_t j = 0; j < whole; j += kWidth)
      store(to + j, every_second(load(from + 2 * j), load(from + 2 * j + kWidth), kLaneNumbers));
  }
  for (int64_t j = 0; j < run.zeros_before; ++j) to[j] = 0.0f;
  for (int64_t j = run.count - run.zeros_after; j < run.count; ++j) to[j] = 0.0f;
}

// x: the first of the channels; the tile begins at (grid_row, grid_col).
static void fill_runs(const Job& job, const float* x, int64_t channels, int64_t grid_row, int64_t grid_col,
                      float* panel) {
  const Problem& p = job.problem;
  const Layout& l = job.layout;
  const int64_t first = grid_col * kWidth;
  const int64_t first_p = l.flat ? first / p.out_width : grid_row, first_q = l.flat ? first % p.out_width : first;
  constexpr int kRuns = 64;
  Run runs[kRuns];
  int known = 0;
  // Channel by channel: the same row of many channels often lies in the same set of the cache.
  const auto fill = [&] {
    for (int64_t c = 0; c < channels; ++c)
      for (int n = 0; n < known; ++n) fill_run(job, runs[n], x + c * p.height * p.width, panel + c * l.channel);
    known = 0;
  };
  for (int64_t n = 0; n < job.plane_count; ++n) {
    const Plane& plane = job.planes[n];
    int64_t h = first_p * p.stride_h + plane.row - p.pad_top, q = first_q;
    for (int64_t done = 0; done < plane.length; h += p.stride_h) {
      const int64_t left = plane.length - done, count = l.flat ? min(p.out_width - q, left) : l.row_stride;
      if (known == kRuns) fill();
      runs[known++] = run_of(p, h, q * p.stride_w + plane.column - p.pad_left, plane.start + done, count, left);
      done += count;
      if (l.flat) q = 0;
    }
  }
  fill();
}

// ---- pixel layout, of convolutions that keep the image's width ----

// Outputs and pixels then lie alike: a vector of a plane is a vector of the image somewhere else, but for the numbers
// that lie beside the image.
struct Shift {
  int32_t to, from;  // floats, from the channel's beginning in the panel and in x
  int32_t mask;      // number of the mask of what lies inside; or one of the two below
};
constexpr int32_t kInside = -1, kOutside = -2;
typedef int32_t Mask __attribute__((vector_size(kWidth * sizeof(int32_t)), may_alias));

// How one tile's panel is filled from any channel.
struct Shifts {
  static constexpr int kMost = 192, kMostMasks = 32;
  Shift shifts[kMost];
  Mask masks[kMostMasks];
  int count = 0, mask_count = 0;

  // False where the convolution or the tile is of another kind.
  bool find(const Job& job, int64_t grid_row, int64_t grid_col) {
    const Problem& p = job.problem;
    if (p.stride_h != 1 || p.stride_w != 1 || p.out_width != p.width) return false;
    if (job.layout.channel > kMost * kWidth || p.height * p.width > (int64_t{1} << 30)) return false;
    for (int64_t n = 0; n < job.plane_count; ++n)
      for (int64_t done = 0; done < job.planes[n].length; done += kWidth)
        if (!add(job, job.planes[n], done, grid_row, grid_col * kWidth)) return false;
    return true;
  }

  bool add(const Job& job, const Plane& plane, int64_t done, int64_t grid_row, int64_t first) {
    const Problem& p = job.problem;
    const Layout& l = job.layout;
    const int64_t row = plane.row - p.pad_top, column = plane.column - p.pad_left;
    int64_t h = row + (l.flat ? (first + done) / p.width : grid_row + done / l.row_stride);
    int64_t w = column + (l.flat ? (first + done) % p.width : first + done % l.row_stride);
    const int64_t from = h * p.width + w;
    Mask inside = {};
    int found = 0;
    for (int lane = 0; lane < kWidth; ++lane) {
      if (h >= 0 && h < p.height && w >= 0 && w < p.width) inside[lane] = -1, ++found;
      if (++w == p.width + column && l.flat) w = column, ++h;
    }
    Shift& shift = shifts[count++];
    shift.to = static_cast<int32_t>(plane.start + done);
    shift.from = static_cast<int32_t>(from);
    shift.mask = found == kWidth ? kInside : found == 0 ? kOutside : number_of(inside);
    return shift.mask < kMostMasks;
  }

  int32_t number_of(Mask mask) {
    for (int n = 0; n < mask_count; ++n)
      if (same(masks[n], mask)) return n;
    if (mask_count < kMostMasks) masks[mask_count] = mask;
    return mask_count < kMostMasks ? mask_count++ : kMostMasks;
  }

  static bool same(Mask a, Mask b) {
    for (int lane = 0; lane < kWidth; ++lane)
      if (a[lane] != b[lane]) return false;
    return true;
  }

  // Channel by channel: the same pixels of many channels often lie in the same set of the cache.
  void fill(const Job& job, const float* x, int64_t channels, float* panel) const {
    const int64_t pixels = job.problem.height * job.problem.width, panel_channel = job.layout.channel;
    for (int64_t c = 0; c < channels; ++c, x += pixels, panel += panel_channel) {
      // What lies beside an image is read, and masked, but not beside the tensor.
      const bool safe = x - job.x >= pixels && job.x_end - x >= 2 * pixels && pixels >= kWidth;
      for (int n = 0; n < count; ++n) {
        const Shift shift = shifts[n];
        const float* from = x + shift.from;
        if (shift.mask == kOutside) {
          store(panel + shift.to, Vector{});
        } else if (shift.mask == kInside) {
          store(panel + shift.to, load(from));
        } else if (safe || (from >= job.x && from + kWidth <= job.x_end)) {
          store(panel + shift.to, (Vector)((Mask)load(from) & masks[shift.mask]));
        } else {
          for (int lane = 0; lane < kWidth; ++lane)
            panel[shift.to + lane] = masks[shift.mask][lane] ? from[lane] : 0.0f;
        }
      }
    }
  }
};

// ---- image layout ----

// x: the first of the channels, interleaved; the tile begins with output pixel (first_p, first_q).
static inline void fill_images(const Job& job, const float* x, int64_t channels, int64_t first_p, int64_t first_q,
                               float* panel) {
  const Problem& p = job.problem;
  const Layout& l = job.layout;
  for (int64_t c = 0; c < channels; ++c, x += p.height * p.width * kWidth) {
    for (int64_t n = 0; n < job.plane_count; ++n) {
      const int64_t top = first_p * p.stride_h + job.planes[n].row - p.pad_top;
      const int64_t left = first_q * p.stride_w + job.planes[n].column - p.pad_left;
      for (int64_t i = 0; i < l.rows; ++i) {
        const int64_t h = top + i * p.stride_h;
        const float* row = x + h * p.width * kWidth;
        const bool inside = h >= 0 && h < p.height;
        for (int64_t j = 0, w = left; j < l.pitch; ++j, w += p.stride_w, panel += kWidth)
          store(panel, inside && w >= 0 && w < p.width ? load(row + w * kWidth) : Vector{});
      }
    }
  }
}

}  // namespace smart::cpu::SMART_ISA
