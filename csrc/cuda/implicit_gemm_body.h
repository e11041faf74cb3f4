// The body of a convolution as an implicit GEMM, whatever its weights are, over a Device: a GPU in gpu.h, or
// tests/cpp/emulated_gpu.h. Each call of a Device stands for one instruction, or for asking where the thread is.
#pragma once

#include "implicit_gemm.h"
#include "split_k.h"

namespace smart::cuda {

// `Body` derives from it and has `multiply(Sums&)`, which walks `blocks`.
template <class Body, class Traits, class Device, class Problem>
class ImplicitGemmBody {
 public:
  SMART_DEVICE ImplicitGemmBody(const Device& device, const Problem& problem, char* shared)
      : device(device),
        p(problem),
        shared(shared),
        pixels(reinterpret_cast<Pixel*>(shared + Traits::kWorkBytes)),
        blocks(blocks_of(problem, device.split())) {
    const int tiles = (p.slabs + Traits::kSlabs - 1) / Traits::kSlabs;
    // Neighbouring thread blocks read the same pixels.
    range = locate_tile(p, device.block() / tiles, Traits::kPixels);
    first_slab = p.order && !range.second ? 0 : p.first_slab;
    tile_slab = device.block() % tiles * Traits::kSlabs;
    const int warp = device.thread() / 32;
    warp_slab = warp / Traits::kWarpColumns * Traits::kWarpSlabs;
    warp_pixel = warp % Traits::kWarpColumns * Traits::kWarpPixels;
  }

  SMART_DEVICE void run() {
    if (range.begin >= range.end) return;  // one tile more was started than there may be, where paths meet
    Sums sums = {};
    locate_pixels();
    static_cast<Body*>(this)->multiply(sums);
    gather(sums);
    store();
  }

 protected:
  // [slab][upper or lower half][eight pixels][register of the instruction]
  using Sums = float[Traits::kWarpSlabs][2][Traits::kWarpTiles][4];

  // Starts copying a block of columns of all pixels of the tile, if there is such a block. `runs`: see locate_columns.
  SMART_DEVICE void copy_pixels(int block, const int32_t* runs = nullptr) const {
    if (block >= blocks.end) return;
    const int part = device.thread() % kBlockCopies;
    const Columns columns = locate_columns(p, block * kBlockColumns + part * kCopyElements, runs);
    SMART_UNROLL
    for (int i = 0; i < Traits::kPixels; i += Traits::kThreads / kBlockCopies) {
      const int pixel = i + device.thread() / kBlockCopies;
      const Pixel at = pixels[pixel];
      const bool inside = is_inside(p, at, columns);
      device.copy16(stage_of(block) + shared_offset(pixel, part), p.x + (inside ? input_index(p, at, columns) : 0),
                    inside);
    }
  }

  SMART_DEVICE char* stage_of(int block) const { return shared + block % Traits::kStages * Traits::kStageBytes; }

  SMART_DEVICE int steps_of(int block) const {
    return p.steps - block * kBlockSteps < kBlockSteps ? p.steps - block * kBlockSteps : kBlockSteps;
  }

  // Calls `multiply` for each eight pixels of the warp, with their columns of a step as ldmatrix gives them.
  template <class Multiply>
  SMART_DEVICE void for_pixels(const char* stage, int step, const Multiply& multiply) const {
    // Four matrices of 8 pixels x 8 columns: lane l points at pixel l % 8 of matrix l / 8.
    const int lane = device.thread() % 32;
    const int part = step % kBlockSteps * (kStepColumns / kCopyElements) + lane / 8;
    SMART_UNROLL
    for (int tile = 0; tile < Traits::kWarpTiles; ++tile) {
      uint32_t columns[4];
      device.load_matrices(columns, stage + shared_offset(warp_pixel + tile * 8 + lane % 8, part));
      multiply(tile, columns);
    }
  }

  // Slabs beyond the last are computed as the last, and not stored.
  SMART_DEVICE int slab_at(int i) const {
    const int slab = tile_slab + warp_slab + i;
    return first_slab + (slab < p.slabs ? slab : p.slabs - 1);
  }

  const Device& device;
  const Problem& p;
  char* const shared;
  Pixel* const pixels;
  const BlockRange blocks;  // of columns, that this split multiplies
  Range range;
  int first_slab, tile_slab, warp_slab, warp_pixel;

 private:
  SMART_DEVICE void locate_pixels() {
    for (int i = device.thread(); i < Traits::kPixels; i += Traits::kThreads) {
      pixels[i] = locate_pixel(p, range.begin + i, range.end);
    }
    device.sync();
  }

  // Brings the sums of all warps together in shared memory, [pixel][channel], so that what is stored lies together.
  SMART_DEVICE void gather(const Sums& sums) {
    device.template wait<0>();
    device.sync();
    auto* all = reinterpret_cast<float*>(shared);
    const int group = device.thread() % 32 / 4, thread = device.thread() % 4;
    SMART_UNROLL
    for (int i = 0; i < Traits::kWarpSlabs; ++i) {
      SMART_UNROLL
      for (int half = 0; half < 2; ++half) {
        SMART_UNROLL
        for (int tile = 0; tile < Traits::kWarpTiles; ++tile) {
          SMART_UNROLL
          for (int j = 0; j < 4; ++j) {
            const int channel = (warp_slab + i) * kSlabChannels + half * 16 + j / 2 * 8 + group;
            const int pixel = warp_pixel + tile * 8 + thread * 2 + j % 2;
            all[pixel * Traits::kSumFloats + channel] = sums[i][half][tile][j];
          }
        }
      }
    }
    device.sync();
  }

  SMART_DEVICE void store() const {
    constexpr int kParts = Traits::kChannels / kCopyElements;
    for (int i = device.thread(); i < Traits::kPixels * kParts; i += Traits::kThreads) {
      const int pixel = i / kParts, part = i % kParts;
      const int channel = tile_slab * kSlabChannels + part * kCopyElements, output = pixels[pixel].output;
      if (output < 0 || channel >= p.out_channels) continue;
      const int64_t index = static_cast<int64_t>(output) * p.out_channels + channel;
      const int of_path = channel + (range.second ? p.out_channels : 0);
      const float* sums = reinterpret_cast<const float*>(shared) + pixel * Traits::kSumFloats + part * kCopyElements;
      float y[kCopyElements];
      SMART_UNROLL
      for (int j = 0; j < kCopyElements; ++j) y[j] = sums[j];
      if (p.partial)
        store_partial(p, y, device.split(), output, channel);
      else
        Epilogue<typename Traits::Element>::store(p, y, index, of_path);
    }
  }
};

}  // namespace smart::cuda
