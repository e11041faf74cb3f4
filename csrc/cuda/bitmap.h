// The convolution by weights as bitmaps: what a launch is told of the weight, which an implicit GEMM decodes while it
// loads it, and its tiles. See smart_kernels/packing/bitmap.py.
#pragma once

#include "implicit_gemm.h"

namespace smart::cuda {

constexpr int kChunkWeights = kSlabChannels * kBlockColumns;  // of a slab and block, of which some are kept

struct Bitmap : ImplicitGemm {
  const uint16_t* values;  // of each slab and block those kept, lane by lane
  const uint32_t* bits;    // [slab][block][lane][step]
  const int32_t* starts;   // [slab][block], and one more: where their values begin, at multiples of eight
  int largest;             // values of a slab and block, at most: what shared memory has room for
};

// Warps of a row share a slab. Each decodes all of it, so rows are one or two warps wide.
template <class Element, int kWarpPixels, int kWarpRows, int kWarpColumns, int kStages_>
struct BitmapTraits : GemmTraits<Element, 1, kWarpPixels, kWarpRows, kWarpColumns, kStages_> {
  using Base = GemmTraits<Element, 1, kWarpPixels, kWarpRows, kWarpColumns, kStages_>;

  // Behind all else: the values of each slab and stage.
  static constexpr int shared_bytes(int largest) {
    return Base::kSharedBytes + kStages_ * Base::kSlabs * largest * static_cast<int>(sizeof(uint16_t));
  }

  static_assert(shared_bytes(kChunkWeights) <= 163 * 1024, "a full mask fits GPUs of compute capability 8.0 and 9.0");
  static_assert(Base::kSharedBytes % 16 == 0, "copies of values are aligned");
};

// Decoding takes a warp about as long as multiplying by 32 pixels: the more pixels it has, the less that matters. Where
// there are few, weights are waited for, and small tiles make more thread blocks that do. Tall tiles are for many
// channels, flat ones for 64, narrow ones for 32.
template <class Element>
using BitmapLarge = BitmapTraits<Element, 128, 4, 1, 2>;  // 128 channels x 128 pixels
template <class Element>
using BitmapTall = BitmapTraits<Element, 64, 4, 1, 2>;  // 128 x 64
template <class Element>
using BitmapFlat = BitmapTraits<Element, 64, 2, 2, 2>;  // 64 x 128
template <class Element>
using BitmapSmall = BitmapTraits<Element, 16, 2, 2, 4>;  // 64 x 32
template <class Element>
using BitmapNarrow = BitmapTraits<Element, 64, 1, 2, 2>;  // 32 x 128

}  // namespace smart::cuda
