// One convolution with its plan made, and torch's threads to run it on.
#pragma once

#include <cstdint>
#include <memory>

#include "cpu/layout.h"
#include "cpu/problem.h"

namespace smart::cpu {

constexpr char kTooLarge[] =
    "the images are too large: what a slab of input channels gives to one tile must be fewer than 2^31 numbers";

// Where the numbers of one run lie. Each array is contiguous.
struct Arrays {
  const float* x;
  float* y;
  const float* residual;  // or null
  float* second;          // the epilogue's second result, or null
};

// A convolution by one plan, all but its arrays settled. It refers to the weight's memory and the epilogue's.
class Convolution {
 public:
  // In the image layout, x and y are interleaved if the problem is; otherwise each image is interleaved for the run.
  Convolution(const Kernels& kernels, const Problem& problem, const Weight& weight, const Epilogue& epilogue,
              std::shared_ptr<const Plan> plan);

  // On at most `threads` threads.
  void run(const Arrays& arrays, int64_t threads) const;

 private:
  void run_interleaving(const Job& whole, int64_t threads) const;
  void run_items(Job job, int64_t threads) const;
  void run_depthwise(const Job& job, int64_t threads) const;
  bool run_winograd(Job job, int64_t threads) const;

  const Kernels& kernels_;
  std::shared_ptr<const Plan> plan_;
  Job job_;
};

// Runs a convolution once, in the layouts that are cheapest; plans are kept for the next time. Throws std::length_error
// if its panel would be too large.
void convolve(const Kernels& kernels, const Problem& problem, const Weight& weight, const Epilogue& epilogue,
              const Arrays& arrays);

// About how many cycles of one thread that takes, by the cost model which decides on layouts and on Winograd's
// algorithm, for a path of so many non-zeros.
double estimated_cycles(const Kernels& kernels, const Problem& problem, int64_t slab_channels, int64_t nonzeros);

// Non-zeros of the weight's path.
int64_t path_nonzeros(const Problem& problem, const Weight& weight);

}  // namespace smart::cpu
