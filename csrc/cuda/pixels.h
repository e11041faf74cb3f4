// Which output pixels a thread block computes, and where they read the input: of kernels on NHWC tensors, whatever
// struct tells them of the problem.
#pragma once

#include "portable.h"

namespace smart::cuda {

constexpr int kNowhere = -(1 << 30);  // a row or column that no tap brings into the input

// Where an output pixel's first tap reads: the pixel of all images, and its place in the image, for the bounds. And
// which output pixel it is, -1 if none.
struct Pixel {
  int32_t origin, row, column, output;
};

// The pixels of a tile, all of one path: from `begin` on, below `end`.
struct Range {
  int begin, end;
  bool second;
};

template <class Problem>
SMART_DEVICE Range locate_tile(const Problem& p, int tile, int tile_pixels) {
  if (p.order == nullptr) return {tile * tile_pixels, p.pixels, false};
  const int of_first = p.first[0] * (p.out_height * p.out_width);
  const int tiles_of_first = (of_first + tile_pixels - 1) / tile_pixels;
  if (tile < tiles_of_first) return {tile * tile_pixels, of_first, false};
  return {of_first + (tile - tiles_of_first) * tile_pixels, p.pixels, true};
}

// `pixel` counts in the order of samples.
template <class Problem>
SMART_DEVICE Pixel locate_pixel(const Problem& p, int pixel, int end) {
  if (pixel >= end) return {0, kNowhere, kNowhere, -1};
  const int of_image = p.out_height * p.out_width;
  const int place = pixel / of_image, rest = pixel - place * of_image;
  const int image = p.order ? p.order[place] : place;
  const int out_row = rest / p.out_width, out_column = rest - out_row * p.out_width;
  const int row = out_row * p.stride_h - p.pad_top, column = out_column * p.stride_w - p.pad_left;
  return {(image * p.height + row) * p.width + column, row, column, image * of_image + rest};
}

}  // namespace smart::cuda
