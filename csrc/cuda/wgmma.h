// The 2:4 convolution by Hopper's wgmma.mma_async.sp: how work and shared memory are divided, and how the tensor memory
// accelerator (TMA) is to read the input. The product is that of two_four.h, of the same packed weight.
//
// A warpgroup has 64 output channels, two slabs: each of its four warps takes 16 of them, one matrix of a slab, whose
// lanes hold what they hold of mma.sp. Only metadata lie elsewhere, see metadata_lane.
#pragma once

#include "two_four.h"

namespace smart::cuda {

constexpr int kGroupThreads = 128;                              // of a warpgroup
constexpr int kGroupSlabs = 2;                                  // of a warpgroup: 64 channels, what an instruction has
constexpr int kTilePixels = 128;                                // of an instruction and a thread block
constexpr int kTiles = kTilePixels / 8;                         // in each of which a lane has four sums
constexpr int kStepBytes = kTilePixels * kStepColumns * 2;      // of the pixels of a step
constexpr int kBlockBytes = kBlockSteps * kStepBytes;           // of the pixels of a block
constexpr int kMatrixBytes = 32 * sizeof(Words);                // of 16 channels of a step's weights
constexpr int kStepValueBytes = 2 * kMatrixBytes;               // of a slab
constexpr int kStepMetadataBytes = 32 * sizeof(uint32_t);       // of a slab
constexpr int kSlabValueBytes = kBlockSteps * kStepValueBytes;  // of a block
constexpr int kSlabBytes = kSlabValueBytes + kBlockSteps * kStepMetadataBytes;
constexpr uint32_t kAnyMetadata = 0x44444444;  // positions 0 and 1: valid beside values that are all zero

// Which lane's word of a slab and step holds the metadata that this lane gives the instruction. Packing leaves those of
// matrix i, 16 channels, in lanes 2 i and 2 i + 1 of each four, for mma.sp to select. Here a warp has one matrix, and
// one selector holds for the warpgroup: it is 0, lanes 0 and 1 of each four.
SMART_DEVICE int metadata_lane(int lane, int matrix) { return (lane & ~2) | matrix * 2; }

// Rows of pixels in shared memory are 128 or 64 bytes, of as many channels as TMA copies at a time. Parts of 16 bytes
// are swapped with others of their row, so that the same part of eight pixels lies in different banks: bits 4 to 6 of
// an address are xor-ed with bits 7 to 9, of rows of 64 bytes bits 4 and 5 with 7 and 8. (PTX ISA, "Swizzling modes".)
SMART_DEVICE int swizzled(int offset, int row_bytes) { return offset ^ ((offset >> 7 & (row_bytes / 16 - 1)) << 4); }

// How wgmma finds a matrix of 32 columns x pixels in such rows: bits 0 to 13 its address, 32 to 45 the bytes from eight
// pixels to the next, both in units of 16, and 62 to 63 the swizzling, 1 of 128 bytes, 2 of 64. The distance of columns
// (bits 16 to 29) is not used with it. (PTX ISA, "Matrix descriptor format".)
SMART_DEVICE uint64_t descriptor(uint32_t address, int row_bytes) {
  const uint64_t swizzling = row_bytes == 128 ? 1 : 2;
  return (address & 0x3ffff) >> 4 | uint64_t{1} << 16 | static_cast<uint64_t>(8 * row_bytes >> 4) << 32 |
         swizzling << 62;
}

// What TMA's im2col mode is told of an input (CUDA driver API, cuTensorMapEncodeIm2col). It walks through the pixels of
// a box, row by row and image by image, by strides; the corners say where the box begins and how far it ends from the
// last pixel. What an instruction adds to each pixel, the tap, is not part of it. Pixels outside of the image are
// zeros.
struct InputMap {
  const uint16_t* x;
  int channels, width, height, batch;
  int lower_w, lower_h, upper_w, upper_h;
  int stride_w, stride_h;
  int copied_channels;
};

inline InputMap map_input(const TwoFour& p) {
  return {p.x,
          p.channels,
          p.width,
          p.height,
          p.batch,
          -p.pad_left,
          -p.pad_top,
          (p.out_width - 1) * p.stride_w - p.pad_left - (p.width - 1),
          (p.out_height - 1) * p.stride_h - p.pad_top - (p.height - 1),
          p.stride_w,
          p.stride_h,
          p.channels % 64 == 0 ? 64 : 32};
}

// Whether TMA can read it so: corners are 8-bit numbers, what a tap adds has 8 bits and no sign, strides are at most 8.
inline bool takes(const InputMap& map, const TwoFour& p) {
  const int kernel_h = p.columns / (p.channels * p.kernel_w);
  const auto is_corner = [](int offset) { return -128 <= offset && offset <= 127; };
  return p.channels % 32 == 0 && p.stride_w <= 8 && p.stride_h <= 8 && is_corner(map.lower_w) &&
         is_corner(map.lower_h) && is_corner(map.upper_w) && is_corner(map.upper_h) &&
         (p.kernel_w - 1) * p.dilation_w <= 255 && (kernel_h - 1) * p.dilation_h <= 255;
}

// How a thread block divides its work: warpgroups that multiply, each 64 channels of the same 128 pixels, and one warp
// that copies.
template <class Element_, int kGroups_, int kStages_>
struct WgmmaTraits {
  using Element = Element_;
  static constexpr int kGroups = kGroups_;
  static constexpr int kStages = kStages_;  // blocks of columns in shared memory

  static constexpr int kMultipliers = kGroups * kGroupThreads;
  static constexpr int kThreads = kMultipliers + 32;
  static constexpr int kSlabs = kGroups * kGroupSlabs;
  static constexpr int kChannels = kSlabs * kSlabChannels;
  static constexpr int kStageBytes = kBlockBytes + kSlabs * kSlabBytes;
  // Columns of an extra step, gathered: one buffer is written while the other is multiplied.
  static constexpr int kGatherBytes = kStepBytes;
  static constexpr int kGatherBegin = kStages * kStageBytes;
  static constexpr int kBarrierBegin = kGatherBegin + kGroups * 2 * kGatherBytes;
  static constexpr int kSumFloats = kChannels + 4;  // of a pixel on its way out, see TwoFourTraits
  // What is swizzled by address begins at multiples of 1024, and so does the whole: by hand, which takes up to as much.
  static constexpr int kAlignment = 1024;
  static constexpr int kSharedBytes = kBarrierBegin + 2 * kStages * 8 + kAlignment;

  static_assert(kStageBytes % kAlignment == 0 && kGatherBytes % kAlignment == 0, "the swizzling begins anew in each");
  static_assert(kTilePixels * kSumFloats * 4 <= kGatherBegin, "sums go through the memory of the stages");
  static_assert(kStages >= 2, "one block is copied while another is multiplied");
  static_assert(kSharedBytes <= 227 * 1024, "a thread block has no more on Hopper");
};

// wgmma reads the pixels of a step anew for each 64 channels: 128 bytes a cycle, all that shared memory gives, so
// weights come in registers. Two warpgroups take turns, one multiplies while the other gets its weights, or gathers
// overflow. A single one leaves room for a second thread block beside it, for few channels and small maps.
template <class Element>
using Tall = WgmmaTraits<Element, 2, 3>;  // 128 channels x 128 pixels
template <class Element>
using Twin = WgmmaTraits<Element, 1, 2>;  // 64 x 128
static_assert(2 * (Twin<Half>::kSharedBytes + 1024) <= 228 * 1024, "two thread blocks on a multiprocessor");

}  // namespace smart::cuda
