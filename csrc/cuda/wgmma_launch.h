// What two_four.cu asks of wgmma.cu.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>
#include <utility>

#include "two_four.h"

namespace smart::cuda {

// Why wgmma does not run here whatever the problem; "" if it does.
std::string wgmma_missing(int device);

// Why this problem is none for it; "" if it is.
std::string wgmma_refuses(const TwoFour& p);

// How many tiles there are; `tile` is 0 (tall) or 1 (twin).
int64_t wgmma_tiles(const TwoFour& p, int64_t tile);

// The sums of splits are left to be added, by a kernel that is compiled for all GPUs.
void launch_wgmma(const TwoFour& p, bool brain, int64_t tile, cudaStream_t stream);

// Threads and bytes of shared memory of a thread block.
std::pair<int64_t, int64_t> wgmma_resources(int64_t tile);

}  // namespace smart::cuda
