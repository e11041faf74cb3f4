// Runs a whole convolution: batches into blocks, blocks into work items, work items over torch's threads.
#pragma once

#include "cpu/problem.h"

namespace smart::cpu {

// x and y are contiguous; every pointer must outlive the call.
void convolve(const Kernels& kernels, const Problem& problem, const Weight& weight, int64_t path_nonzeros,
              const Epilogue& epilogue, const float* x, float* y);

}  // namespace smart::cpu
