// The 2:4 convolution: what a launch is told, and which number of a tensor lies where.
//
// It is a product of two matrices that are never stored: the weight, output channels x columns, as the sparse operand,
// and the input, columns x output pixels. A column is an input channel at a tap of the kernel. See
// smart_kernels/packing/two_four.py for the weight; input and output are NHWC.
#pragma once

#include "pixels.h"

namespace smart::cuda {

constexpr int kSlabChannels = 32;                            // output channels of a slab: two of an instruction
constexpr int kStepColumns = 32;                             // depth of an instruction
constexpr int kBlockSteps = 4;                               // steps of a block, which lies in shared memory
constexpr int kBlockColumns = kBlockSteps * kStepColumns;    // of which an extra step gathers any 32
constexpr int kCopyElements = 8;                             // of 16 bits, copied together
constexpr int kBlockCopies = kBlockColumns / kCopyElements;  // of a pixel
constexpr int kRowBytes = kBlockColumns * sizeof(uint16_t);  // of a pixel in shared memory
constexpr int kRunColumns = 16;                              // of a run, which is left out as a whole
constexpr int kFragmentElements = 8;                         // of the weight, that a lane gives an instruction

// Passed by value. 16-bit floats are given as their bits.
struct TwoFour {
  const uint16_t *x, *values, *extra_values;
  const uint32_t *metadata, *extra_metadata;
  const uint8_t* extra_columns;
  const int32_t* extra_starts;
  const float *scale, *bias;  // null: 1 and 0
  const uint16_t* residual;   // null: none
  // Null: all samples run on one path. Else the samples sorted by path, and how many run on the first, whose slabs
  // begin at 0; those at first_slab are the second's then, and so is the second row of scales and biases.
  const int32_t *order, *first;
  uint16_t* y;
  const float *second_scale, *second_bias;
  uint16_t* second;  // null: there is no second result, y * second_scale + second_bias
  // Null: a slab has all columns. Else the runs of 16 that each `run_slabs` slabs have, of each path; -1 is a run of
  // zeros.
  const int32_t* column_runs;
  float* partial;  // null: there is one split. Else the sums of each, see split_k.h
  int batch, height, width, channels;
  int out_channels, out_height, out_width;
  int pixels;  // batch * out_height * out_width
  int kernel_w, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
  int columns, steps, blocks, slabs, first_slab, run_slabs;
  int splits;  // thread blocks that share the columns of a tile
  bool relu, second_relu;
};

// What eight columns add to that, and their first channel.
struct Columns {
  int32_t offset, row, column, channel;
  bool exist;
};

// `runs`: those that the columns come from, or null.
SMART_DEVICE Columns locate_columns(const TwoFour& p, int first, const int32_t* runs = nullptr) {
  bool exist = first < p.columns;
  if (runs && exist) {
    const int run = runs[first / kRunColumns];
    exist = run >= 0;
    first = exist ? run * kRunColumns + first % kRunColumns : 0;
  }
  const int tap = first / p.channels;
  const int tap_row = tap / p.kernel_w, tap_column = tap - tap_row * p.kernel_w;
  const int row = tap_row * p.dilation_h, column = tap_column * p.dilation_w;
  return {row * p.width + column, row, column, first - tap * p.channels, exist};
}

// Whether these columns read the input at this pixel, and not its padding.
SMART_DEVICE bool is_inside(const TwoFour& p, const Pixel& pixel, const Columns& columns) {
  const auto row = static_cast<uint32_t>(pixel.row + columns.row);
  const auto column = static_cast<uint32_t>(pixel.column + columns.column);
  return columns.exist && row < static_cast<uint32_t>(p.height) && column < static_cast<uint32_t>(p.width);
}

SMART_DEVICE int64_t input_index(const TwoFour& p, const Pixel& pixel, const Columns& columns) {
  return static_cast<int64_t>(pixel.origin + columns.offset) * p.channels + columns.channel;
}

// Byte at which eight columns of a pixel of the tile begin. Pixels are 256 bytes apart, so the same columns of eight
// pixels would lie in the same banks: each pixel has them in another order.
SMART_DEVICE int shared_offset(int pixel, int copy) { return pixel * kRowBytes + ((copy ^ (pixel & 7)) * 16); }

// How a thread block divides its work.
template <class Element_, int kWarpSlabs_, int kWarpPixels_, int kWarpRows_, int kWarpColumns_, int kStages_>
struct TwoFourTraits {
  using Element = Element_;
  static constexpr int kWarpSlabs = kWarpSlabs_;    // slabs of a warp
  static constexpr int kWarpPixels = kWarpPixels_;  // output pixels of a warp
  static constexpr int kWarpColumns = kWarpColumns_;
  static constexpr int kStages = kStages_;  // blocks of columns in shared memory, all but one of them on their way

  static constexpr int kWarpTiles = kWarpPixels / 8;  // an instruction has eight pixels
  static constexpr int kThreads = 32 * kWarpRows_ * kWarpColumns;
  static constexpr int kSlabs = kWarpSlabs * kWarpRows_;
  static constexpr int kChannels = kSlabs * kSlabChannels;
  static constexpr int kPixels = kWarpPixels * kWarpColumns;
  static constexpr int kStageBytes = kPixels * kRowBytes;
  // Floats of a pixel's sums on their way out: 4 more than channels, so that the lanes of a store hit 32 banks.
  static constexpr int kSumFloats = kChannels + 4;
  static constexpr int kSumBytes = kPixels * kSumFloats * 4;
  static constexpr int kWorkBytes = kStages * kStageBytes > kSumBytes ? kStages * kStageBytes : kSumBytes;
  static constexpr int kSharedBytes = kWorkBytes + kPixels * static_cast<int>(sizeof(Pixel));

  static_assert(kWarpPixels % 8 == 0, "an instruction has eight pixels");
  static_assert(kThreads % kBlockCopies == 0, "each thread copies the same columns of several pixels");
  static_assert(kStages >= 2, "one block is copied while another is multiplied");
  static_assert(kSharedBytes <= 99 * 1024, "GPUs of compute capability 8.6 and 8.9 have no more for a thread block");
};

// Warps read their weights from L1 or L2, and pixels from shared memory: the larger a warp's tile, the less it reads a
// product. 64 x 64 takes half of the registers for sums, as much as a pipeline beside them leaves. 64 channels leave
// no second row of warps. Small tiles are for maps too small to fill a GPU with large ones, narrow ones for few
// channels.
template <class Element>
using Large = TwoFourTraits<Element, 2, 64, 2, 2, 3>;  // 128 channels x 128 pixels
template <class Element>
using Flat = TwoFourTraits<Element, 2, 32, 1, 4, 3>;  // 64 x 128
template <class Element>
using Small = TwoFourTraits<Element, 1, 32, 2, 2, 4>;  // 64 x 64
template <class Element>
using Narrow = TwoFourTraits<Element, 1, 32, 1, 4, 3>;  // 32 x 128

}  // namespace smart::cuda
