// The second kernel of split-K (csrc/cuda/split_k.h) on the emulated GPU, whatever kernel wrote the partial sums.
#pragma once

#include "cuda/split_k.h"
#include "emulated_gpu.h"

namespace smart::cuda {

template <class Element, class Problem>
void add_all_splits(const Problem& p, bool backwards) {
  for (int block = 0; block < add_blocks(p); ++block) {
    ThreadBlock threads(kAddThreads, block, kAddBytes, backwards);
    threads.run([&](int thread) { add_partial<Element>(EmulatedGpu(threads, thread), p, threads.shared()); });
  }
}

}  // namespace smart::cuda
