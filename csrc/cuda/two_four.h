// The 2:4 convolution: what a launch is told of the weight, the sparse operand of an implicit GEMM, and its tiles. See
// smart_kernels/packing/two_four.py.
#pragma once

#include "implicit_gemm.h"

namespace smart::cuda {

constexpr int kFragmentElements = 8;  // of the weight, that a lane gives an instruction

struct TwoFour : ImplicitGemm {
  const uint16_t *values, *extra_values;
  const uint32_t *metadata, *extra_metadata;
  const uint8_t* extra_columns;
  const int32_t* extra_starts;
  // Null: a slab has all columns. Else the runs of 16 that each `run_slabs` slabs have, of each path; -1 is a run of
  // zeros.
  const int32_t* column_runs;
  int run_slabs;
};

template <class Element, int kWarpSlabs, int kWarpPixels, int kWarpRows, int kWarpColumns, int kStages>
struct TwoFourTraits : GemmTraits<Element, kWarpSlabs, kWarpPixels, kWarpRows, kWarpColumns, kStages> {};

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
