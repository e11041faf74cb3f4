// One convolution with its plan made, and torch's threads to run it on.
#pragma once

#include <cstdint>
#include <vector>

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

// A convolution in one layout, all but its arrays settled. It refers to the weight's memory and the epilogue's.
class Convolution {
 public:
  // `interleaved`: of problem.batch images in the image layout, which x and y have too if problem.interleaved;
  // otherwise each image is interleaved for the run. The result's `fits()` must be checked.
  Convolution(const Kernels& kernels, const Problem& problem, const Weight& weight, const Epilogue& epilogue,
              bool interleaved);

  bool fits() const { return smart::cpu::fits(plan_, weight_.slab_channels); }

  // About, for the whole batch.
  double cycles() const { return plan_.cycles * blocks_; }

  // On at most `threads` threads.
  void run(const Arrays& arrays, int64_t threads) const;

 private:
  void run_interleaving(const Job& whole, int64_t threads) const;
  void run_items(Job job, int64_t threads) const;

  const Kernels& kernels_;
  Problem problem_;
  Weight weight_;
  Epilogue epilogue_;
  Plan plan_;
  int64_t blocks_;
  std::vector<int32_t> offsets_;
  Job job_;
};

// Runs a convolution once, in the layouts that are cheapest. Throws std::length_error if its panel would be too large.
void convolve(const Kernels& kernels, const Problem& problem, const Weight& weight, const Epilogue& epilogue,
              const Arrays& arrays);

// Non-zeros of the weight's path.
int64_t path_nonzeros(const Problem& problem, const Weight& weight);

}  // namespace smart::cpu
