// The direct convolution in float32, for any mask: what a launch is told, and how a thread block divides its work.
//
// A thread block computes some output channels at some output pixels, and walks the weight slab by slab of input
// channels; see smart_kernels/packing/unstructured.py for slabs, codes and segments. Of each slab it first gathers what
// its pixels read into the *panel* in shared memory: one number a pixel for each code, which is a channel of the slab
// at a tap. So a non-zero is a row of the panel times a number, whatever strides, dilations and padding there are.
// Input and output are NHWC.
#pragma once

#include "pixels.h"

namespace smart::cuda {

constexpr int kSegments = 3;      // of a row: first path only, both, second path only
constexpr int kMaxCodes = 256;    // of a slab: codes are bytes
constexpr int kQuad = 4;          // floats read or written at once, where they lie so
constexpr int kStagedTerms = 32;  // of a warp: one a lane

// Passed by value.
struct Direct {
  const float *x, *values;
  const uint8_t* codes;
  const int32_t* segments;
  const float *scale, *bias, *residual;  // null: 1, 0 and 0
  // Null: all samples run on one path, segments [first_segment, last_segment). Else the samples sorted by path, and how
  // many run on the first; the second has the second row of scales and biases.
  const int32_t *order, *first;
  float* y;
  const float *second_scale, *second_bias;
  float* second;  // null: there is no second result, y * second_scale + second_bias
  int batch, height, width, channels;
  int out_channels, out_height, out_width;
  int pixels;  // batch * out_height * out_width
  int kernel_w, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
  int taps, groups, group_channels, group_outputs;
  int slabs, slab_channels, first_segment, last_segment;
  bool relu, second_relu;
  bool quads;        // four neighbouring channels of x can be read at once
  bool wide_output;  // and so can those of results and residual
};

// A non-zero of the weight: its value, and the byte at which its row of the panel begins.
struct Term {
  float value;
  int32_t row;
};

struct alignas(16) TwoTerms {
  Term term[2];
};

// How a thread block divides its work: each warp has all of its pixels and some of its channels, each lane neighbouring
// pixels.
template <int kLanePixels_, int kWarpChannels_>
struct DirectTraits {
  static constexpr int kLanePixels = kLanePixels_;
  static constexpr int kWarpChannels = kWarpChannels_;  // neighbours
  static constexpr int kWarps = 8;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kPixels = 32 * kLanePixels;
  static constexpr int kChannels = kWarps * kWarpChannels;
  static constexpr int kRowBytes = kPixels * static_cast<int>(sizeof(float));  // of the panel
  static constexpr int kStagedBytes = kWarps * kStagedTerms * static_cast<int>(sizeof(Term));
  static constexpr int kStoreChannels = kWarpChannels < kQuad ? kWarpChannels : kQuad;
  // Thread blocks that share a multiprocessor: while one fills its panel, another multiplies. Three would leave a
  // thread 80 registers, which the large tile exceeds.
  static constexpr int kResident = 2;
  // Loads under way at once while a thread fills the panel: they take long, and their registers are free then.
  static constexpr int kBatch = 4;

  static constexpr int shared_bytes(int codes) { return kStagedBytes + codes * kRowBytes; }

  static_assert(kWarpChannels % kStoreChannels == 0, "channels are stored in equal parts");
  static_assert(kThreads % kPixels == 0, "each thread fills one column of the panel");
};

// A lane reads four bytes of shared memory a multiplication, whatever the tile: that is what bounds the kernel. Tall
// tiles fill the panel for more channels, wide ones read a non-zero for more pixels: the large one is best where it
// fills the GPU. The others are for small maps and batches.
using DirectLarge = DirectTraits<4, 8>;   // 64 channels x 128 pixels
using DirectMedium = DirectTraits<2, 4>;  // 32 x 64
using DirectSmall = DirectTraits<1, 2>;   // 16 x 32

}  // namespace smart::cuda
