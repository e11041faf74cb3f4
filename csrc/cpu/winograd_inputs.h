// Images to the points of Winograd's algorithm. Part of cpu/winograd.h, which says how they lie in memory.
#pragma once

#include "cpu/epilogue.h"
#include "cpu/winograd_transforms.h"

namespace smart::cpu::SMART_ISA {

// A rectangle of tiles that run together.
struct TileBlock {
  int64_t unit;                 // block of images
  int64_t row, col;             // its first tile
  int64_t rows, cols, vectors;  // its tiles, and the vectors that hold them
};

// Points of one channel: `to` holds the block's vectors of the first, the next lies point_floats further on.
static void transform_images(const Job& job, const TileBlock& b, const float* x, int64_t point_floats, float* to) {
  const Problem& p = job.problem;
  for (int64_t tile = 0; tile < b.rows * b.cols; ++tile, to += kWidth) {
    const int64_t top = (b.row + tile / b.cols) * 4 - p.pad_top, left = (b.col + tile % b.cols) * 4 - p.pad_left;
    const bool whole = top >= 0 && left >= 0 && top + kPatch <= p.height && left + kPatch <= p.width;
    Vector half[kPatch][kPatch];  // by column: transformed along the rows
    for (int r = 0; r < kPatch; ++r) {
      const float* row = x + ((top + r) * p.width + left) * kWidth;
      Vector pixels[kPatch], points[kPatch];
      if (whole) {
        for (int s = 0; s < kPatch; ++s) pixels[s] = load(row + s * kWidth);
      } else {
        const bool inside = top + r >= 0 && top + r < p.height;
        for (int s = 0; s < kPatch; ++s)
          pixels[s] = inside && left + s >= 0 && left + s < p.width ? load(row + s * kWidth) : Vector{};
      }
      transform_input(pixels, points);
      for (int s = 0; s < kPatch; ++s) half[s][r] = points[s];
    }
    for (int s = 0; s < kPatch; ++s) {
      Vector points[kPatch];
      transform_input(half[s], points);
      for (int r = 0; r < kPatch; ++r) store(to + (r * kPatch + s) * point_floats, points[r]);
    }
  }
}

template <int... I>
SMART_INLINE Vector odd_ones(Vector a, Vector b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (2 * I + 1)...);
}

// The vector one lane on; its last lane is number kFrom of what follows.
template <int kFrom, int... I>
SMART_INLINE Vector next_lanes(Vector a, Vector following, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, following, (I + 1 < kWidth ? I + 1 : kWidth + kFrom)...);
}

// Of successive pixels, those of kWidth patches that begin at every fourth.
SMART_INLINE void split_patches(const float* from, Vector (&to)[kPatch]) {
  const Vector a = load(from), b = load(from + kWidth), c = load(from + 2 * kWidth), d = load(from + 3 * kWidth);
  const Vector even = every_second(a, b, kLaneNumbers), even_on = every_second(c, d, kLaneNumbers);
  const Vector odd = odd_ones(a, b, kLaneNumbers), odd_on = odd_ones(c, d, kLaneNumbers);
  const Vector following = load(from + 4 * kWidth);
  to[0] = every_second(even, even_on, kLaneNumbers), to[2] = odd_ones(even, even_on, kLaneNumbers);
  to[1] = every_second(odd, odd_on, kLaneNumbers), to[3] = odd_ones(odd, odd_on, kLaneNumbers);
  to[4] = next_lanes<0>(to[0], following, kLaneNumbers), to[5] = next_lanes<1>(to[1], following, kLaneNumbers);
}

// As transform_images, for the tiles of one image. Each row of pixels is transformed once, for both rows of tiles that
// read it: row r is row r / 4 of phase r % 4, so that what a vector of tiles reads of a phase are neighbours.
static void transform_pixels(const Job& job, const TileBlock& b, const float* x, int64_t point_floats, float* to,
                             float* scratch) {
  const Problem& p = job.problem;
  const int64_t plane = winograd_plane_floats(job.winograd, kWidth);  // (phase, point of the row)
  float* const pixels = scratch + 4 * kPatch * plane;
  const int64_t top = b.row * 4 - p.pad_top, left = b.col * 4 - p.pad_left, count = b.cols * 4 + 2;
  const int64_t before = min(count, max(0, -left)), end = max(before, min(count, p.width - left));
  fill_zero(pixels, before);
  fill_zero(pixels + end, ceil_div(b.cols, kWidth) * 4 * kWidth + kWidth - end);
  for (int64_t r = 0; r < b.rows * 4 + 2; ++r) {
    float* const row = scratch + r % 4 * kPatch * plane + r / 4 * b.cols;
    const bool inside = top + r >= 0 && top + r < p.height;
    if (inside) copy(pixels + before, x + (top + r) * p.width + left + before, end - before);
    for (int64_t col = 0; col < b.cols; col += kWidth) {
      Vector patch[kPatch] = {}, points[kPatch] = {};
      if (inside) {
        split_patches(pixels + col * 4, patch);
        transform_input(patch, points);
      }
      for (int s = 0; s < kPatch; ++s) store(row + s * plane + col, points[s]);
    }
  }
  for (int64_t vector = 0; vector < b.vectors; ++vector, to += kWidth) {
    for (int s = 0; s < kPatch; ++s) {
      Vector column[kPatch], points[kPatch];
      for (int r = 0; r < kPatch; ++r)
        column[r] = load(scratch + (r % 4 * kPatch + s) * plane + vector * kWidth + r / 4 * b.cols);
      transform_input(column, points);
      for (int r = 0; r < kPatch; ++r) store(to + (r * kPatch + s) * point_floats, points[r]);
    }
  }
}

}  // namespace smart::cpu::SMART_ISA
