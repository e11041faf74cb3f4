// The body of the 2:4 convolution for Hopper, over a Device: a GPU in hopper.h, or tests/cpp/emulated_hopper.h.
#pragma once

#include "split_k.h"
#include "wgmma.h"

namespace smart::cuda {

template <class Traits, class Device>
class WgmmaBody {
 public:
  using Map = typename Device::Map;

  // `shared` begins at a multiple of Traits::kAlignment.
  SMART_DEVICE WgmmaBody(const Device& device, const TwoFour& problem, const Map& map, char* shared)
      : device(device),
        p(problem),
        map(map),
        shared(shared),
        barriers(reinterpret_cast<uint64_t*>(shared + Traits::kBarrierBegin)),
        row_shift(problem.channels % 64 == 0 ? 7 : 6),
        group(device.uniform(device.thread() / kGroupThreads)),
        matrix(device.thread() / 32 % 2),
        lane(device.thread() % 32),
        blocks(blocks_of(problem, device.split())) {
    const int tiles = (p.slabs + Traits::kSlabs - 1) / Traits::kSlabs;
    // Neighbouring thread blocks read the same pixels.
    first_pixel = device.block() / tiles * kTilePixels;
    tile_slab = device.block() % tiles * Traits::kSlabs;
  }

  SMART_DEVICE void run() {
    set_up();
    if (group == Traits::kGroups) {
      if (lane == 0) copy_all();
      device.sync_warp();
    } else {
      Sums sums = {};
      multiply(sums);
      device.sync_multipliers();  // all are done with the stages, which the sums overwrite
      gather(sums);
    }
    device.sync();
    store();
  }

 private:
  using Element = typename Traits::Element;
  using Sums = float[kTiles][4];

  // What a lane gives to an instruction.
  struct Fragment {
    Words values;
    uint32_t metadata;
  };

  SMART_DEVICE uint64_t* full(int stage) const { return barriers + stage; }
  SMART_DEVICE uint64_t* empty(int stage) const { return barriers + Traits::kStages + stage; }

  SMART_DEVICE void set_up() const {
    if (device.thread() == 0) {
      for (int stage = 0; stage < Traits::kStages; ++stage) {
        device.start_barrier(full(stage), 1);
        device.start_barrier(empty(stage), Traits::kMultipliers / 32);
      }
      device.show_barriers();
    }
    device.sync();
  }

  SMART_DEVICE int stage_number(int block) const { return (block - blocks.begin) % Traits::kStages; }
  SMART_DEVICE char* stage_of(int block) const { return shared + stage_number(block) * Traits::kStageBytes; }
  SMART_DEVICE int turn_of(int block) const { return (block - blocks.begin) / Traits::kStages; }

  SMART_DEVICE int steps_of(int block) const {
    const int left = p.steps - block * kBlockSteps;
    return left < kBlockSteps ? left : kBlockSteps;
  }

  // Slabs beyond the last are computed as the last, and not stored.
  SMART_DEVICE int slab_at(int i) const {
    const int slab = tile_slab + i;
    return p.first_slab + (slab < p.slabs ? slab : p.slabs - 1);
  }

  SMART_DEVICE void copy_all() const {
    const int of_image = p.out_height * p.out_width;
    const int image = first_pixel / of_image, rest = first_pixel - image * of_image;
    const int out_row = rest / p.out_width, out_column = rest - out_row * p.out_width;
    const int row = out_row * p.stride_h - p.pad_top, column = out_column * p.stride_w - p.pad_left;
    for (int block = blocks.begin; block < blocks.end; ++block) {
      const int stage = stage_number(block);
      device.wait_barrier(empty(stage), (turn_of(block) & 1) ^ 1);  // at once in the first turn
      const int steps = steps_of(block);
      device.expect_bytes(full(stage), steps * (kStepBytes + Traits::kSlabs * (kStepValueBytes + kStepMetadataBytes)));
      copy_weights(block, steps, full(stage));
      const int copied = 1 << (row_shift - 1);  // channels
      for (int begin = 0; begin < steps * kStepColumns; begin += copied) {
        const Columns tap = locate_columns(p, block * kBlockColumns + begin);
        device.copy_pixels(stage_of(block) + begin * (kTilePixels * 2), map, tap.channel, column, row, image,
                           tap.column, tap.row, full(stage));
      }
    }
  }

  SMART_DEVICE void copy_weights(int block, int steps, uint64_t* barrier) const {
    for (int i = 0; i < Traits::kSlabs; ++i) {
      const int64_t step = static_cast<int64_t>(slab_at(i)) * p.steps + block * kBlockSteps;
      char* to = stage_of(block) + kBlockBytes + i * kSlabBytes;
      device.copy_bytes(to, reinterpret_cast<const char*>(p.values) + step * kStepValueBytes, steps * kStepValueBytes,
                        barrier);
      device.copy_bytes(to + kSlabValueBytes, reinterpret_cast<const char*>(p.metadata) + step * kStepMetadataBytes,
                        steps * kStepMetadataBytes, barrier);
    }
  }

  SMART_DEVICE void multiply(Sums& sums) const {
    const int slab = device.thread() / 64;  // of the tile, this warp's
    Fragment next[kBlockSteps] = {};
    load(next, blocks.begin, slab);
    for (int block = blocks.begin, extra_steps = 0; block < blocks.end; ++block) {
      Fragment weights[kBlockSteps];
      SMART_UNROLL
      for (int i = 0; i < kBlockSteps; ++i) weights[i] = next[i];
      multiply_block(sums, weights, block);
      // Weights come while those of the block before are multiplied.
      if (block + 1 < blocks.end) load(next, block + 1, slab);
      extra_steps = multiply_extra(sums, block, extra_steps);
      device.wait_products();
      SMART_UNROLL
      for (int i = 0; i < kBlockSteps; ++i) keep(weights[i]);
      device.sync_warp();
      if (lane == 0) device.arrive(empty(stage_number(block)));
    }
  }

  // Waits until a block has arrived.
  SMART_DEVICE void load(Fragment (&fragments)[kBlockSteps], int block, int slab) const {
    device.wait_barrier(full(stage_number(block)), turn_of(block) & 1);
    const char* of_slab = stage_of(block) + kBlockBytes + slab * kSlabBytes;
    const auto* values = reinterpret_cast<const Words*>(of_slab);
    const auto* metadata = reinterpret_cast<const uint32_t*>(of_slab + kSlabValueBytes);
    const int steps = steps_of(block);
    SMART_UNROLL
    for (int step = 0; step < kBlockSteps; ++step) {
      if (step >= steps) break;
      fragments[step] = {values[(step * 2 + matrix) * 32 + lane], metadata[step * 32 + metadata_lane(lane, matrix)]};
    }
  }

  SMART_DEVICE void multiply_block(Sums& sums, const Fragment (&weights)[kBlockSteps], int block) const {
    const int row_bytes = 1 << row_shift, steps = steps_of(block);
    const uint32_t pixels = device.shared_address(stage_of(block));
    if (steps == kBlockSteps) {
      device.begin_products();
      SMART_UNROLL
      for (int step = 0; step < kBlockSteps; ++step) multiply_step(sums, weights[step], pixels, step, row_bytes);
      device.end_products();
      return;
    }
    // The last block may be cut short. Its steps go one by one, as a branch among products would make all of them do.
    SMART_UNROLL
    for (int step = 0; step < kBlockSteps - 1; ++step) {
      if (step >= steps) break;
      device.begin_products();
      multiply_step(sums, weights[step], pixels, step, row_bytes);
      device.end_products();
      device.wait_products();
    }
  }

  SMART_DEVICE void multiply_step(Sums& sums, const Fragment& weights, uint32_t pixels, int step, int row_bytes) const {
    // Rows of 128 bytes hold two steps, the second 64 bytes further within the pattern of the swizzling.
    const uint32_t at = row_bytes == 128 ? step / 2 * (2 * kStepBytes) + step % 2 * 64 : step * kStepBytes;
    device.template multiply<Element>(sums, weights.values, weights.metadata, descriptor(pixels + at, row_bytes));
  }

  // Overflow: columns of the block again, which the warpgroup gathers. An extra step belongs to one of its two slabs;
  // the warps of the other multiply zeros.
  SMART_DEVICE int multiply_extra(Sums& sums, int block, int turn) const {
    SMART_UNROLL
    for (int i = 0; i < kGroupSlabs; ++i) {
      const int32_t* starts =
          p.extra_starts + static_cast<int64_t>(slab_at(group * kGroupSlabs + i)) * p.blocks + block;
      const bool mine = device.thread() / 64 % 2 == i;
      const int end = device.uniform(starts[1]);
      for (int step = device.uniform(starts[0]); step < end; ++step, ++turn) {
        Fragment weights = {{}, kAnyMetadata};
        if (mine) weights = load_extra(step);
        char* gathered = shared + Traits::kGatherBegin + (group * 2 + turn % 2) * Traits::kGatherBytes;
        gather_columns(gathered, stage_of(block), step);
        device.show_stores();
        device.sync_group(group);
        device.begin_products();
        device.template multiply<Element>(sums, weights.values, weights.metadata,
                                          descriptor(device.shared_address(gathered), 64));
        device.end_products();
        // After the next step's barrier all warps have waited, so the buffer may be written again.
        device.wait_products();
        keep(weights);
      }
    }
    return turn;
  }

  // Products read registers until they are waited for, of which the compiler knows nothing: it would put what is loaded
  // meanwhile into the registers of weights that have no further use.
  SMART_DEVICE void keep(Fragment& weights) const {
    SMART_UNROLL
    for (int i = 0; i < 4; ++i) device.keep(weights.values.word[i]);
    device.keep(weights.metadata);
  }

  SMART_DEVICE Fragment load_extra(int step) const {
    const auto* words = reinterpret_cast<const Words*>(p.extra_values) + static_cast<int64_t>(step) * 2 * 32;
    return {words[matrix * 32 + lane], p.extra_metadata[static_cast<int64_t>(step) * 32 + metadata_lane(lane, matrix)]};
  }

  // Each thread brings the 32 columns of one pixel together. Lanes of a quarter of the warp take the same eight columns
  // at a time, quarters different ones: the same columns of 32 pixels would lie in eight banks.
  SMART_DEVICE void gather_columns(char* to, const char* stage, int step) const {
    const auto* list = reinterpret_cast<const uint32_t*>(p.extra_columns) + static_cast<int64_t>(step) * 8;
    const int pixel = device.thread() % kGroupThreads;
    for (int i = 0; i < 4; ++i) {
      const int part = (i + lane / 8) % 4;
      Words eight;
      SMART_UNROLL
      for (int t = 0; t < 4; ++t) {
        // Packed for lanes of mma.sp: those of thread t of four lie together, two of each eight columns.
        const uint32_t two = list[t * 2 + part / 2] >> part % 2 * 16;
        eight.word[t] = element(stage, pixel, two & 0xff) | element(stage, pixel, two >> 8 & 0xff) << 16;
      }
      device.store(to + swizzled(pixel * 64 + part * 16, 64), eight);
    }
  }

  SMART_DEVICE uint32_t element(const char* stage, int pixel, int column) const {
    const int row_bytes = 1 << row_shift, byte = column * 2;
    const char* copy = stage + (byte >> row_shift) * (kTilePixels << row_shift);
    const int offset = swizzled((pixel << row_shift) + (byte & (row_bytes - 1)), row_bytes);
    return *reinterpret_cast<const uint16_t*>(copy + offset);
  }

  // Brings all sums together in shared memory, [pixel][channel], so that what is stored lies together.
  SMART_DEVICE void gather(const Sums& sums) const {
    auto* all = reinterpret_cast<float*>(shared);
    const int first_channel = device.thread() / 32 * 16 + lane / 4;
    SMART_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      SMART_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int pixel = tile * 8 + lane % 4 * 2 + j % 2;
        all[pixel * Traits::kSumFloats + first_channel + j / 2 * 8] = sums[tile][j];
      }
    }
  }

  SMART_DEVICE void store() const {
    constexpr int kParts = Traits::kChannels / kStoreChannels;
    for (int i = device.thread(); i < kTilePixels * kParts; i += Traits::kThreads) {
      const int pixel = i / kParts, part = i % kParts;
      const int channel = tile_slab * kSlabChannels + part * kStoreChannels, output = first_pixel + pixel;
      if (output >= p.pixels || channel >= p.out_channels) continue;
      const float* sums = reinterpret_cast<const float*>(shared) + pixel * Traits::kSumFloats + part * kStoreChannels;
      float y[kStoreChannels];
      SMART_UNROLL
      for (int j = 0; j < kStoreChannels; ++j) y[j] = sums[j];
      const int64_t index = static_cast<int64_t>(output) * p.out_channels + channel;
      if (p.partial)
        store_partial(p, y, device.split(), output, channel);
      else
        Epilogue<Element>::store(p, y, index, channel);
    }
  }

  const Device& device;
  const TwoFour& p;
  const Map& map;
  char* const shared;
  uint64_t* const barriers;
  const int row_shift;  // rows of pixels in shared memory are 2^row_shift bytes
  const int group, matrix, lane;
  const BlockRange blocks;
  int first_pixel, tile_slab;
};

}  // namespace smart::cuda
