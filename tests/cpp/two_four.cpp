// The 2:4 kernel on an emulated GPU, for tests/smart_kernels/test_emulated_kernels.py to load with ctypes.
#include "cuda/two_four_body.h"
#include "emulated_gemm.h"

namespace smart::cuda {
namespace {

template <class Traits>
void launch(const TwoFour& p, bool backwards) {
  launch_gemm<TwoFourBody, Traits>(p, Traits::kSharedBytes, backwards);
}

template <class Element>
void launch_tile(const TwoFour& p, int tile, bool backwards) {
  switch (tile) {
    case 0: return launch<Large<Element>>(p, backwards);
    case 1: return launch<Flat<Element>>(p, backwards);
    case 2: return launch<Small<Element>>(p, backwards);
    default: return launch<Narrow<Element>>(p, backwards);
  }
}

}  // namespace
}  // namespace smart::cuda

extern "C" {

int two_four_bytes() { return sizeof(smart::cuda::TwoFour); }

void two_four(const smart::cuda::TwoFour* p, bool brain, int tile, bool backwards) {
  if (brain)
    smart::cuda::launch_tile<smart::cuda::Brain>(*p, tile, backwards);
  else
    smart::cuda::launch_tile<smart::cuda::Half>(*p, tile, backwards);
}

float widen(uint16_t bits, bool brain) {
  return brain ? smart::cuda::Brain::widen(bits) : smart::cuda::Half::widen(bits);
}

int choose_splits(int64_t tiles, int blocks, int processors) {
  return smart::cuda::choose_splits(tiles, blocks, processors);
}

uint16_t narrow(float value, bool brain) {
  return brain ? smart::cuda::Brain::narrow(value) : smart::cuda::Half::narrow(value);
}
}
