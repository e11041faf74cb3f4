// The direct convolution on an emulated GPU, for tests/smart_kernels/test_emulated_kernels.py to load with ctypes.
#include "cuda/direct_body.h"
#include "emulated_gpu.h"

namespace smart::cuda {
namespace {

template <class Traits>
void launch(const Direct& p, bool backwards) {
  const int tiles = (p.group_outputs + Traits::kChannels - 1) / Traits::kChannels * p.groups;
  const int blocks = ((p.pixels + Traits::kPixels - 1) / Traits::kPixels + (p.order != nullptr)) * tiles;
  for (int block = 0; block < blocks; ++block) {
    ThreadBlock threads(Traits::kThreads, block, Traits::shared_bytes(p.slab_channels * p.taps), backwards);
    threads.run([&](int thread) {
      const EmulatedGpu device(threads, thread);
      DirectBody<Traits, EmulatedGpu>(device, p, threads.shared()).run();
    });
  }
}

}  // namespace
}  // namespace smart::cuda

extern "C" {

int direct_bytes() { return sizeof(smart::cuda::Direct); }

void direct(const smart::cuda::Direct* p, int tile, bool backwards) {
  switch (tile) {
    case 0: return smart::cuda::launch<smart::cuda::DirectLarge>(*p, backwards);
    case 1: return smart::cuda::launch<smart::cuda::DirectMedium>(*p, backwards);
    default: return smart::cuda::launch<smart::cuda::DirectSmall>(*p, backwards);
  }
}
}
