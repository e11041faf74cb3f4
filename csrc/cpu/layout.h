// Chooses how a convolution's panel is laid out, and the tile that is kept in registers.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/problem.h"

namespace smart::cpu {

// A layout and all that follows from it; it knows a convolution's sizes, but neither weights nor images.
struct Plan {
  Layout layout;
  std::vector<Plane> planes;
  double cycles;  // about, for one block of layout.lanes images: plans are compared by it
  bool fits;      // whether offsets fit 32 bits; if not, it cannot be used
  // Where a slab's codes, (channel * R + r) * S + s, lie in the panel, and whether that is just the code times the
  // floats of a tile.
  std::vector<int32_t> offsets;
  bool linear;
  // Of a depthwise convolution that has no panel: what `Reads` describes.
  bool depthwise;
  int64_t tile, before, after;
  std::vector<int32_t> from, shifts, inside, to, count;
  // If it runs by Winograd's algorithm: how, and the plan of a direct convolution, for images that hold NaN or
  // infinity.
  Winograd winograd;
  std::shared_ptr<const Plan> direct;
};

// Pixels of one image along the vectors. `slab_channels` and `path_nonzeros` are the weight's.
Plan pixel_plan(const Problem& problem, int64_t slab_channels, int64_t path_nonzeros, const Kernels& kernels);

// What memory costs the image layout, about, in cycles a block: loads and stores beyond the L2 cache, and interleaving.
double block_cycles(const Problem& problem, double vectors_read, int64_t width);

// One pixel of `width` images along the vectors.
Plan image_plan(const Problem& problem, int64_t slab_channels, int64_t path_nonzeros, const Kernels& kernels);

// Whether a convolution is depthwise and so small that it needs no panel; and its plan, which both of the above return.
bool reads_in_place(const Problem& problem, int64_t width);
Plan depthwise_plan(const Problem& problem, int64_t path_nonzeros, const Kernels& kernels);

}  // namespace smart::cpu
