// The body of the 2:4 convolution, over a Device: a GPU in gpu.h, or tests/cpp/emulated_gpu.h. Each call of a Device
// stands for one instruction, or for asking where the thread is.
#pragma once

#include "split_k.h"
#include "two_four.h"

namespace smart::cuda {

template <class Traits, class Device>
class TwoFourBody {
 public:
  SMART_DEVICE TwoFourBody(const Device& device, const TwoFour& problem, char* shared)
      : device(device),
        p(problem),
        shared(shared),
        pixels(reinterpret_cast<Pixel*>(shared + Traits::kWorkBytes)),
        blocks(blocks_of(problem, device.split())),
        end_step(p.steps < blocks.end * kBlockSteps ? p.steps : blocks.end * kBlockSteps) {
    const int tiles = (p.slabs + Traits::kSlabs - 1) / Traits::kSlabs;
    // Neighbouring thread blocks read the same pixels.
    range = locate_tile(p, device.block() / tiles, Traits::kPixels);
    first_slab = p.order && !range.second ? 0 : p.first_slab;
    tile_slab = device.block() % tiles * Traits::kSlabs;
    if (p.column_runs) {
      const int of_path = (p.slabs + p.run_slabs - 1) / p.run_slabs;
      const int tile = first_slab / p.slabs * of_path + tile_slab / p.run_slabs;
      runs = p.column_runs + static_cast<int64_t>(tile) * (p.columns / kRunColumns);
    }
    const int warp = device.thread() / 32;
    warp_slab = warp / Traits::kWarpColumns * Traits::kWarpSlabs;
    warp_pixel = warp % Traits::kWarpColumns * Traits::kWarpPixels;
  }

  SMART_DEVICE void run() {
    if (range.begin >= range.end) return;  // one tile more was started than there may be, where paths meet
    Sums sums = {};
    locate_pixels();
    multiply(sums);
    gather(sums);
    store();
  }

 private:
  // [slab][upper or lower half][eight pixels][register of the instruction]
  using Sums = float[Traits::kWarpSlabs][2][Traits::kWarpTiles][4];

  // The weights that a lane gives to the two instructions of a slab and step.
  struct Fragment {
    Words values[2];
    uint32_t metadata;
  };

  struct Extra {
    Fragment weights;
    uint32_t columns[2];  // eight bytes: those of the lane
  };

  SMART_DEVICE void locate_pixels() {
    for (int i = device.thread(); i < Traits::kPixels; i += Traits::kThreads) {
      pixels[i] = locate_pixel(p, range.begin + i, range.end);
    }
    device.sync();
  }

  SMART_DEVICE void multiply(Sums& sums) {
    SMART_UNROLL
    for (int i = 0; i < Traits::kStages - 1; ++i) copy(blocks.begin + i);
    Fragment next[Traits::kWarpSlabs];
    load(next, blocks.begin * kBlockSteps);
    for (int block = blocks.begin; block < blocks.end; ++block) {
      device.template wait<Traits::kStages - 2>();
      // This block has arrived for all threads, and all are done with the one before, which the next copy overwrites.
      device.sync();
      copy(block + Traits::kStages - 1);
      const char* stage = shared + block % Traits::kStages * Traits::kStageBytes;
      int begin[Traits::kWarpSlabs], end[Traits::kWarpSlabs];
      Extra extra[Traits::kWarpSlabs];
      load_first_extra(extra, begin, end, block);
      const int steps = p.steps - block * kBlockSteps < kBlockSteps ? p.steps - block * kBlockSteps : kBlockSteps;
      for (int step = 0; step < steps; ++step) multiply_step(sums, next, stage, block * kBlockSteps + step);
      multiply_extra(sums, extra, begin, end, stage);
    }
  }

  // Starts copying a block of columns, and counts as a copy also where there is none.
  SMART_DEVICE void copy(int block) {
    if (block < blocks.end) {
      char* stage = shared + block % Traits::kStages * Traits::kStageBytes;
      const int part = device.thread() % kBlockCopies;
      const Columns columns = locate_columns(p, block * kBlockColumns + part * kCopyElements, runs);
      SMART_UNROLL
      for (int i = 0; i < Traits::kPixels; i += Traits::kThreads / kBlockCopies) {
        const int pixel = i + device.thread() / kBlockCopies;
        const Pixel at = pixels[pixel];
        const bool inside = is_inside(p, at, columns);
        device.copy16(stage + shared_offset(pixel, part), p.x + (inside ? input_index(p, at, columns) : 0), inside);
      }
    }
    device.commit();
  }

  // Slabs beyond the last are computed as the last, and not stored.
  SMART_DEVICE int slab_at(int i) const {
    const int slab = tile_slab + warp_slab + i;
    return first_slab + (slab < p.slabs ? slab : p.slabs - 1);
  }

  SMART_DEVICE Fragment load_fragment(const uint16_t* values, const uint32_t* metadata, int64_t step) const {
    const int lane = device.thread() % 32;
    const auto* words = reinterpret_cast<const Words*>(values) + step * 2 * 32 + lane;
    return {{words[0], words[32]}, metadata[step * 32 + lane]};
  }

  SMART_DEVICE void load(Fragment (&fragments)[Traits::kWarpSlabs], int step) const {
    SMART_UNROLL
    for (int i = 0; i < Traits::kWarpSlabs; ++i) {
      fragments[i] = load_fragment(p.values, p.metadata, static_cast<int64_t>(slab_at(i)) * p.steps + step);
    }
  }

  SMART_DEVICE void multiply_step(Sums& sums, Fragment (&next)[Traits::kWarpSlabs], const char* stage, int step) {
    Fragment weights[Traits::kWarpSlabs];
    SMART_UNROLL
    for (int i = 0; i < Traits::kWarpSlabs; ++i) weights[i] = next[i];
    // Weights come while those of the step before are multiplied.
    if (step + 1 < end_step) load(next, step + 1);
    // Four matrices of 8 pixels x 8 columns: lane l points at pixel l % 8 of matrix l / 8.
    const int lane = device.thread() % 32;
    const int part = step % kBlockSteps * (kStepColumns / kCopyElements) + lane / 8;
    SMART_UNROLL
    for (int tile = 0; tile < Traits::kWarpTiles; ++tile) {
      uint32_t columns[4];
      device.load_matrices(columns, stage + shared_offset(warp_pixel + tile * 8 + lane % 8, part));
      SMART_UNROLL
      for (int i = 0; i < Traits::kWarpSlabs; ++i) multiply_tile(sums[i], tile, weights[i], columns);
    }
  }

  SMART_DEVICE void multiply_tile(float (&sums)[2][Traits::kWarpTiles][4], int tile, const Fragment& weights,
                                  const uint32_t (&columns)[4]) {
    using Element = typename Traits::Element;
    device.template multiply<Element, 0>(sums[0][tile], weights.values[0], columns, weights.metadata);
    device.template multiply<Element, 1>(sums[1][tile], weights.values[1], columns, weights.metadata);
  }

  SMART_DEVICE Extra load_extra(int step) const {
    const auto* columns = reinterpret_cast<const uint32_t*>(p.extra_columns) + step * 8 + device.thread() % 4 * 2;
    return {load_fragment(p.extra_values, p.extra_metadata, step), {columns[0], columns[1]}};
  }

  SMART_DEVICE void load_first_extra(Extra (&extra)[Traits::kWarpSlabs], int (&begin)[Traits::kWarpSlabs],
                                     int (&end)[Traits::kWarpSlabs], int block) const {
    SMART_UNROLL
    for (int i = 0; i < Traits::kWarpSlabs; ++i) {
      const int32_t* starts = p.extra_starts + static_cast<int64_t>(slab_at(i)) * p.blocks + block;
      begin[i] = starts[0], end[i] = starts[1];
      if (begin[i] < end[i]) extra[i] = load_extra(begin[i]);
    }
  }

  // Overflow: columns of the block again, each lane gathering its own from shared memory.
  SMART_DEVICE void multiply_extra(Sums& sums, Extra (&extra)[Traits::kWarpSlabs],
                                   const int (&begin)[Traits::kWarpSlabs], const int (&end)[Traits::kWarpSlabs],
                                   const char* stage) {
    const int lane_pixel = device.thread() % 32 / 4;
    SMART_UNROLL
    for (int i = 0; i < Traits::kWarpSlabs; ++i) {
      for (int step = begin[i]; step < end[i]; ++step) {
        if (step > begin[i]) extra[i] = load_extra(step);
        int offsets[8];
        SMART_UNROLL
        for (int j = 0; j < 8; ++j) {
          const int column = extra[i].columns[j / 4] >> j % 4 * 8 & 0xff;
          // Tiles begin at multiples of eight pixels, which leave the order of a pixel's columns alone.
          offsets[j] = shared_offset(lane_pixel, column / kCopyElements) + column % kCopyElements * 2;
        }
        SMART_UNROLL
        for (int tile = 0; tile < Traits::kWarpTiles; ++tile) {
          const char* row = stage + (warp_pixel + tile * 8) * kRowBytes;
          uint32_t columns[4];
          SMART_UNROLL
          for (int j = 0; j < 4; ++j)
            columns[j] = element(row + offsets[2 * j]) | element(row + offsets[2 * j + 1]) << 16;
          multiply_tile(sums[i], tile, extra[i].weights, columns);
        }
      }
    }
  }

  static SMART_DEVICE uint32_t element(const char* at) { return *reinterpret_cast<const uint16_t*>(at); }

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

  const Device& device;
  const TwoFour& p;
  char* const shared;
  Pixel* const pixels;
  const int32_t* runs = nullptr;
  const BlockRange blocks;
  const int end_step;
  Range range;
  int first_slab, tile_slab, warp_slab, warp_pixel;
};

}  // namespace smart::cuda
