// The 2:4 kernel for Hopper on an emulated one, for tests/smart_kernels/test_emulated_kernels.py to load with ctypes.
#include "cuda/wgmma_body.h"
#include "emulated_hopper.h"
#include "emulated_split_k.h"

namespace smart::cuda {
namespace {

template <class Traits>
void launch(const TwoFour& p, bool backwards, bool eager) {
  using Device = EmulatedHopper<Traits::kMultipliers>;
  const InputMap map = map_input(p);
  const int tiles = (p.slabs + Traits::kSlabs - 1) / Traits::kSlabs;
  const int blocks = (p.pixels + kTilePixels - 1) / kTilePixels * tiles;
  for (int i = 0; i < blocks * p.splits; ++i) {
    ThreadBlock threads(Traits::kThreads, i % blocks, Traits::kSharedBytes - Traits::kAlignment, backwards, i / blocks);
    HopperState state(Traits::kThreads, eager);
    threads.run([&](int thread) {
      const Device device(threads, state, thread);
      WgmmaBody<Traits, Device>(device, p, map, threads.shared()).run();
    });
    require(state.copies.empty(), "a thread block ends before its copies");
  }
  if (p.splits > 1) add_all_splits<typename Traits::Element>(p, backwards);
}

template <class Element>
void launch_tile(const TwoFour& p, bool tall, bool backwards, bool eager) {
  if (tall)
    launch<Tall<Element>>(p, backwards, eager);
  else
    launch<Twin<Element>>(p, backwards, eager);
}

}  // namespace
}  // namespace smart::cuda

extern "C" {

int two_four_bytes() { return sizeof(smart::cuda::TwoFour); }

bool takes(const smart::cuda::TwoFour* p) { return smart::cuda::takes(smart::cuda::map_input(*p), *p); }

void wgmma(const smart::cuda::TwoFour* p, bool brain, bool tall, bool backwards, bool eager) {
  if (brain)
    smart::cuda::launch_tile<smart::cuda::Brain>(*p, tall, backwards, eager);
  else
    smart::cuda::launch_tile<smart::cuda::Half>(*p, tall, backwards, eager);
}
}
