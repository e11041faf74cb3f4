// Chooses how a block of images lies in the workspace, and the tile that is kept in registers.
#pragma once

#include "cpu/problem.h"

namespace smart::cpu {

// Pixels of one image along the vectors.
Layout pixel_layout(const Problem& problem, int64_t width);

// One pixel of `width` images along the vectors.
Layout image_layout(const Problem& problem, int64_t width);

// What a non-zero of an output channel costs over a block of images, in vector FMAs.
int64_t cost(const Layout& layout);

// Fills offsets[code] for the codes of one slab: (channel * R + r) * S + s.
void fill_offsets(const Problem& problem, const Layout& layout, int64_t width, int64_t slab_channels, int32_t* offsets);

}  // namespace smart::cpu
