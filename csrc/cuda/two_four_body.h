// The body of the 2:4 convolution.
#pragma once

#include "implicit_gemm_body.h"
#include "two_four.h"

namespace smart::cuda {

template <class Traits, class Device>
class TwoFourBody : public ImplicitGemmBody<TwoFourBody<Traits, Device>, Traits, Device, TwoFour> {
  using Base = ImplicitGemmBody<TwoFourBody, Traits, Device, TwoFour>;
  using Base::blocks, Base::device, Base::first_slab, Base::p, Base::tile_slab, Base::warp_pixel;
  using Base::slab_at, Base::stage_of, Base::steps_of;

 public:
  using typename Base::Sums;

  SMART_DEVICE TwoFourBody(const Device& device, const TwoFour& problem, char* shared)
      : Base(device, problem, shared),
        end_step(p.steps < blocks.end * kBlockSteps ? p.steps : blocks.end * kBlockSteps) {
    if (p.column_runs) {
      const int of_path = (p.slabs + p.run_slabs - 1) / p.run_slabs;
      const int tile = first_slab / p.slabs * of_path + tile_slab / p.run_slabs;
      runs = p.column_runs + static_cast<int64_t>(tile) * (p.columns / kRunColumns);
    }
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
      const char* stage = stage_of(block);
      int begin[Traits::kWarpSlabs], end[Traits::kWarpSlabs];
      Extra extra[Traits::kWarpSlabs];
      load_first_extra(extra, begin, end, block);
      const int steps = steps_of(block);
      for (int step = 0; step < steps; ++step) multiply_step(sums, next, stage, block * kBlockSteps + step);
      multiply_extra(sums, extra, begin, end, stage);
    }
  }

 private:
  // The weights that a lane gives to the two instructions of a slab and step.
  struct Fragment {
    Words values[2];
    uint32_t metadata;
  };

  struct Extra {
    Fragment weights;
    uint32_t columns[2];  // eight bytes: those of the lane
  };

  // Starts copying a block of pixels, and counts as a copy also where there is none.
  SMART_DEVICE void copy(int block) const {
    Base::copy_pixels(block, runs);
    device.commit();
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
    Base::for_pixels(stage, step, [&](int tile, const uint32_t (&columns)[4]) {
      SMART_UNROLL
      for (int i = 0; i < Traits::kWarpSlabs; ++i) multiply_tile(sums[i], tile, weights[i], columns);
    });
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

  const int end_step;
  const int32_t* runs = nullptr;
};

}  // namespace smart::cuda
