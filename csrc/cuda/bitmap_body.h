// The body of the convolution by weights as bitmaps.
#pragma once

#include "bitmap.h"
#include "implicit_gemm_body.h"

namespace smart::cuda {

template <class Traits, class Device>
class BitmapBody : public ImplicitGemmBody<BitmapBody<Traits, Device>, Traits, Device, Bitmap> {
  using Base = ImplicitGemmBody<BitmapBody, Traits, Device, Bitmap>;
  using Base::blocks, Base::device, Base::p, Base::shared, Base::warp_slab;

 public:
  using typename Base::Sums;

  SMART_DEVICE BitmapBody(const Device& device, const Bitmap& problem, char* shared)
      : Base(device, problem, shared), lane(device.thread() % 32), chunks(Base::slab_at(0) * problem.blocks) {}

  SMART_DEVICE void multiply(Sums& sums) {
    ValueRange next = {p.starts[chunks + blocks.begin], p.starts[chunks + blocks.begin + 1]};
    SMART_UNROLL
    for (int i = 0; i < Traits::kStages - 1; ++i) copy(blocks.begin + i, next);
    Words next_bits = load_bits(blocks.begin);
    for (int block = blocks.begin; block < blocks.end; ++block) {
      device.template wait<Traits::kStages - 2>();
      // This block has arrived for all threads, and all are done with the one before, which the next copy overwrites.
      device.sync();
      copy(block + Traits::kStages - 1, next);
      Words bits = next_bits;
      // Bits come while those of the block before are decoded.
      if (block + 1 < blocks.end) next_bits = load_bits(block + 1);
      const char* value = values_of(block) + values_before(bits) * sizeof(uint16_t);
      const int steps = Base::steps_of(block);
      for (int step = 0; step < steps; ++step) {
        multiply_step(sums, bits.word[0], value, Base::stage_of(block), step);
        // Registers have no index: the word of the next step moves to the first.
        bits = {bits.word[1], bits.word[2], bits.word[3], 0};
      }
    }
  }

 private:
  // Where the values of a slab and block begin and end.
  struct ValueRange {
    int32_t begin, end;
  };

  // Registers of the four matrices of a step, two rows of two.
  using Matrices = Words[4];

  // Starts copying a block of pixels and of the warp's values, `range`, which it moves on to the next block. Counts as
  // a copy also where there is none.
  SMART_DEVICE void copy(int block, ValueRange& range) const {
    Base::copy_pixels(block);
    if (block < blocks.end) {
      const int column = device.thread() / 32 % Traits::kWarpColumns;  // warps of a row share its slab
      const int count = (range.end - range.begin) / kCopyElements;
      for (int i = column * 32 + lane; i < count; i += 32 * Traits::kWarpColumns) {
        device.copy16(values_of(block) + i * 16, p.values + range.begin + i * kCopyElements, true);
      }
      // Known long before it is needed, so that the next copy does not wait for it.
      range = {range.end, block + 1 < blocks.end ? p.starts[chunks + block + 2] : range.end};
    }
    device.commit();
  }

  SMART_DEVICE char* values_of(int block) const {
    const int place = block % Traits::kStages * Traits::kSlabs + warp_slab;
    return shared + Traits::kSharedBytes + place * p.largest * static_cast<int>(sizeof(uint16_t));
  }

  SMART_DEVICE Words load_bits(int block) const {
    return reinterpret_cast<const Words*>(p.bits)[(chunks + block) * 32 + lane];
  }

  // How many values of a slab and block belong to the lanes before this one.
  SMART_DEVICE uint32_t values_before(const Words& bits) const {
    uint32_t own = 0;
    SMART_UNROLL
    for (int step = 0; step < kBlockSteps; ++step) own += count_bits(bits.word[step]);
    uint32_t sum = own;
    SMART_UNROLL
    for (int distance = 1; distance < 32; distance *= 2) {
      const uint32_t other = device.shuffle_up(sum, distance);
      if (lane >= distance) sum += other;
    }
    return sum - own;
  }

  SMART_DEVICE void multiply_step(Sums& sums, uint32_t bits, const char*& value, const char* stage, int step) {
    Matrices matrices;
    decode(matrices, bits, value);
    Base::for_pixels(stage, step, [&](int tile, const uint32_t (&columns)[4]) {
      const uint32_t left[2] = {columns[0], columns[1]}, right[2] = {columns[2], columns[3]};
      SMART_UNROLL
      for (int half = 0; half < 2; ++half) {
        device.template multiply<typename Traits::Element>(sums[0][half][tile], matrices[2 * half], left);
        device.template multiply<typename Traits::Element>(sums[0][half][tile], matrices[2 * half + 1], right);
      }
    });
  }

  // Each bit that is set takes the lane's next value, each other is a zero.
  static SMART_DEVICE void decode(Matrices& matrices, uint32_t bits, const char*& value) {
    SMART_UNROLL
    for (int i = 0; i < 16; ++i) {
      uint32_t low = 0, high = 0;
      if (bits >> 2 * i & 1) low = next(value);
      if (bits >> (2 * i + 1) & 1) high = next(value);
      matrices[i / 4].word[i % 4] = low | high << 16;
    }
  }

  static SMART_DEVICE uint32_t next(const char*& value) {
    const uint32_t element = *reinterpret_cast<const uint16_t*>(value);
    value += sizeof(uint16_t);
    return element;
  }

  const int lane;
  const int chunks;  // slabs and blocks before those of the warp's slab
};

}  // namespace smart::cuda
