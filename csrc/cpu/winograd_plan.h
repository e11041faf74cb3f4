// Whether a convolution runs by Winograd's algorithm, and in which blocks of tiles.
#pragma once

#include "cpu/layout.h"

namespace smart::cpu {

// `direct`, or if Winograd's algorithm can run the convolution and is cheaper, a plan of it in the same layout.
Plan cheaper_by_winograd(Plan direct, const Problem& problem, int64_t path_nonzeros, const Kernels& kernels);

}  // namespace smart::cpu
