// The bitmap kernel on an emulated GPU, for tests/smart_kernels/test_emulated_kernels.py to load with ctypes.
#include "cuda/bitmap_body.h"
#include "emulated_gemm.h"

namespace smart::cuda {
namespace {

template <class Traits>
void launch(const Bitmap& p, bool backwards) {
  launch_gemm<BitmapBody, Traits>(p, Traits::shared_bytes(p.largest), backwards);
}

template <class Element>
void launch_tile(const Bitmap& p, int tile, bool backwards) {
  switch (tile) {
    case 0: return launch<BitmapLarge<Element>>(p, backwards);
    case 1: return launch<BitmapTall<Element>>(p, backwards);
    case 2: return launch<BitmapFlat<Element>>(p, backwards);
    case 3: return launch<BitmapSmall<Element>>(p, backwards);
    default: return launch<BitmapNarrow<Element>>(p, backwards);
  }
}

}  // namespace
}  // namespace smart::cuda

extern "C" {

int bitmap_bytes() { return sizeof(smart::cuda::Bitmap); }

void bitmap(const smart::cuda::Bitmap* p, bool brain, int tile, bool backwards) {
  if (brain)
    smart::cuda::launch_tile<smart::cuda::Brain>(*p, tile, backwards);
  else
    smart::cuda::launch_tile<smart::cuda::Half>(*p, tile, backwards);
}
}
