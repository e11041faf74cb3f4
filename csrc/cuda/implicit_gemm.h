// A convolution as a product of two matrices that are never stored (implicit GEMM): what a launch is told, which number
// of a tensor lies where, and how a thread block divides its work. For kernels that read packed weights and run 16-bit
// floats on tensor cores.
//
// The matrices are the weight, output channels x columns, and the input, columns x output pixels. A column is an input
// channel at a tap of the kernel. See smart_kernels/packing/matrix.py for the weight; input and output are NHWC.
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

// What is told of all but the weight. Passed by value. 16-bit floats are given as their bits.
struct ImplicitGemm {
  const uint16_t* x;
  const float *scale, *bias;  // null: 1 and 0
  const uint16_t* residual;   // null: none
  // Null: all samples run on one path. Else the samples sorted by path, and how many run on the first, whose slabs
  // begin at 0; those at first_slab are the second's then, and so is the second row of scales and biases.
  const int32_t *order, *first;
  uint16_t* y;
  const float *second_scale, *second_bias;
  uint16_t* second;  // null: there is no second result, y * second_scale + second_bias
  float* partial;    // null: there is one split. Else the sums of each, see split_k.h
  int batch, height, width, channels;
  int out_channels, out_height, out_width;
  int pixels;  // batch * out_height * out_width
  int kernel_w, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
  int columns, steps, blocks, slabs, first_slab;
  int splits;  // thread blocks that share the columns of a tile
  bool relu, second_relu;
};

// What eight columns add to that, and their first channel.
struct Columns {
  int32_t offset, row, column, channel;
  bool exist;
};

// `runs`: those that the columns come from, or null.
SMART_DEVICE Columns locate_columns(const ImplicitGemm& p, int first, const int32_t* runs = nullptr) {
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
SMART_DEVICE bool is_inside(const ImplicitGemm& p, const Pixel& pixel, const Columns& columns) {
  const auto row = static_cast<uint32_t>(pixel.row + columns.row);
  const auto column = static_cast<uint32_t>(pixel.column + columns.column);
  return columns.exist && row < static_cast<uint32_t>(p.height) && column < static_cast<uint32_t>(p.width);
}

SMART_DEVICE int64_t input_index(const ImplicitGemm& p, const Pixel& pixel, const Columns& columns) {
  return static_cast<int64_t>(pixel.origin + columns.offset) * p.channels + columns.channel;
}

// Byte at which eight columns of a pixel of the tile begin. Pixels are 256 bytes apart, so the same columns of eight
// pixels would lie in the same banks: each pixel has them in another order.
SMART_DEVICE int shared_offset(int pixel, int copy) { return pixel * kRowBytes + ((copy ^ (pixel & 7)) * 16); }

// How a thread block divides its work.
template <class Element_, int kWarpSlabs_, int kWarpPixels_, int kWarpRows_, int kWarpColumns_, int kStages_>
struct GemmTraits {
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

}  // namespace smart::cuda
