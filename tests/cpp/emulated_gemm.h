// Launches of implicit GEMMs (csrc/cuda/implicit_gemm.h) on the emulated GPU.
#pragma once

#include "cuda/implicit_gemm_body.h"
#include "emulated_split_k.h"

namespace smart::cuda {

template <template <class, class> class Body, class Traits, class Problem>
void launch_gemm(const Problem& p, int shared_bytes, bool backwards) {
  const int tiles = (p.slabs + Traits::kSlabs - 1) / Traits::kSlabs;
  const int blocks = ((p.pixels + Traits::kPixels - 1) / Traits::kPixels + (p.order != nullptr)) * tiles;
  for (int i = 0; i < blocks * p.splits; ++i) {
    ThreadBlock threads(Traits::kThreads, i % blocks, shared_bytes, backwards, i / blocks);
    threads.run([&](int thread) {
      const EmulatedGpu device(threads, thread);
      Body<Traits, EmulatedGpu>(device, p, threads.shared()).run();
    });
  }
  if (p.splits > 1) add_all_splits<typename Traits::Element>(p, backwards);
}

}  // namespace smart::cuda
