// Chooses how a convolution's panel is laid out, and the tile that is kept in registers.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/problem.h"

namespace smart::cpu {

// A layout with its planes, and what it costs.
struct Plan {
  Layout layout;
  std::vector<Plane> planes;
  double cycles;  // about, for one block of layout.lanes images: plans are compared by it
};

// Pixels of one image along the vectors.
Plan pixel_plan(const Problem& problem, const Weight& weight, int64_t path_nonzeros, const Kernels& kernels);

// One pixel of `width` images along the vectors.
Plan image_plan(const Problem& problem, const Weight& weight, int64_t path_nonzeros, const Kernels& kernels);

// Offsets in the panel of the codes of one slab: (channel * R + r) * S + s. They may exceed 32 bits for huge images;
// `fits` tells.
std::vector<int32_t> code_offsets(const Problem& problem, const Plan& plan, int64_t width, int64_t slab_channels);
bool fits(const Plan& plan, int64_t slab_channels);

}  // namespace smart::cpu
