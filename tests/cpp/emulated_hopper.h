// What csrc/cuda/wgmma_body.h calls, on the emulated GPU of emulated_gpu.h. Written from the PTX manual alone.
//
// Strict in the same way. Products are computed when they are waited for, of what shared memory holds then; a bulk copy
// arrives when a thread waits for its barrier, or at once, as asked for; what threads store for tensor cores reaches
// memory at their fence. So a buffer that is given back too early, or a missing wait, shows.
#pragma once

#include <map>

#include "cuda/wgmma.h"
#include "emulated_gpu.h"

namespace smart::cuda {

// Of one thread block: what its threads share beside memory.
struct HopperState {
  struct Barrier {
    int arrivals = 0, pending = 0;
    int64_t bytes = 0;
    int phase = 0;
  };

  struct BulkCopy {
    uint64_t* barrier;
    std::vector<std::pair<char*, const char*>> parts;  // of 16 bytes; from null: zeros
  };

  // One instruction as a warpgroup started it.
  struct Product {
    uint32_t registers[kGroupThreads][5];
    uint64_t pixels;
  };

  struct Store {
    char* to;
    Words words;
  };

  explicit HopperState(int threads, bool eager)
      : eager(eager),
        groups(threads / kGroupThreads),
        products(threads / kGroupThreads),
        stores(threads),
        started(threads),
        finished(threads),
        sums(threads) {}

  const bool eager;  // bulk copies arrive at once
  std::map<uint64_t*, Barrier> barriers;
  std::vector<BulkCopy> copies;
  std::vector<ThreadBlock::Meeting> groups;
  ThreadBlock::Meeting multipliers;
  std::vector<std::deque<Product>> products;    // of each warpgroup, all that there ever were
  std::vector<std::vector<Store>> stores;       // of each thread, not yet shown to tensor cores
  std::vector<size_t> started, finished;        // products of each thread
  std::vector<std::vector<float (*)[4]>> sums;  // of each thread, of the products not finished
};

template <int kMultipliers>
class EmulatedHopper {
 public:
  using Map = InputMap;

  EmulatedHopper(ThreadBlock& of, HopperState& state, int thread) : of(of), state(state), index(thread) {}

  int thread() const { return index; }
  int block() const { return of.block; }
  int split() const { return of.split; }
  void sync() const { of.meet(of.all, static_cast<int>(of.fibers.size())); }
  void sync_warp() const { of.meet(of.warps[index / 32].meeting, 32); }
  void sync_multipliers() const { of.meet(state.multipliers, kMultipliers); }
  void sync_group(int group) const {
    require(group == index / kGroupThreads, "a thread waits for another warpgroup");
    of.meet(state.groups[group], kGroupThreads);
  }

  int uniform(int number) const {
    ThreadBlock::Warp& warp = of.warps[index / 32];
    const int turn = warp.meeting.turn % 2;
    warp.registers[turn][index % 32][0] = static_cast<uint32_t>(number);
    sync_warp();
    require(warp.registers[turn][0][0] == static_cast<uint32_t>(number), "the threads of a warp disagree");
    return number;
  }

  uint32_t shared_address(const void* pointer) const {
    return static_cast<uint32_t>(static_cast<const char*>(pointer) - of.shared());
  }

  void start_barrier(uint64_t* barrier, int arrivals) const { state.barriers[barrier] = {arrivals, arrivals, 0, 0}; }
  void show_barriers() const {}
  void arrive(uint64_t* barrier) const {
    auto& at = find(barrier);
    require(--at.pending >= 0, "more threads arrive at a barrier than it has");
    ++of.events;
    advance(at);
  }

  void expect_bytes(uint64_t* barrier, int bytes) const {
    find(barrier).bytes += bytes;
    arrive(barrier);
  }

  void wait_barrier(uint64_t* barrier, int parity) const {
    auto& at = find(barrier);
    for (;;) {
      if (at.phase % 2 != parity) return;
      deliver(barrier);
      if (at.phase % 2 != parity) return;
      of.yield();
    }
  }

  void copy_bytes(char* to, const void* from, int bytes, uint64_t* barrier) const {
    require(bytes % 16 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0, "a bulk copy is not aligned");
    HopperState::BulkCopy copy = {barrier, {}};
    for (int i = 0; i < bytes; i += 16) copy.parts.push_back({inside(to + i), static_cast<const char*>(from) + i});
    start(std::move(copy));
  }

  // PTX ISA, "im2col mode": pixels of the bounding box row by row, image by image, by strides. The box begins at the
  // lower corner and ends at the last pixel plus the upper corner; the tap is added to each, and what then lies outside
  // of the image, or of the channels, is zero.
  void copy_pixels(char* to, const Map& map, int channel, int column, int row, int image, int tap_column, int tap_row,
                   uint64_t* barrier) const {
    const int row_bytes = map.copied_channels * 2, last_column = map.width - 1 + map.upper_w;
    const int last_row = map.height - 1 + map.upper_h;
    require(shared_address(to) % 1024 == 0, "swizzled copies begin at multiples of the pattern");
    require(0 <= tap_column && tap_column < 256 && 0 <= tap_row && tap_row < 256, "a tap has 8 bits");
    require(map.stride_w <= 8 && map.stride_h <= 8, "strides are at most 8");
    require(map.lower_w <= last_column && map.lower_h <= last_row, "the box is empty");
    for (const int corner : {map.lower_w, map.lower_h, map.upper_w, map.upper_h})
      require(-128 <= corner && corner < 128, "a corner has 8 bits");
    HopperState::BulkCopy copy = {barrier, {}};
    for (int pixel = 0; pixel < kTilePixels; ++pixel) {
      const int x = column + tap_column, y = row + tap_row;
      const bool there = image < map.batch && 0 <= x && x < map.width && 0 <= y && y < map.height;
      const int64_t at = (static_cast<int64_t>(image) * map.height + y) * map.width + x;
      for (int part = 0; part < row_bytes / 16; ++part) {
        const bool exists = there && channel + part * 8 < map.channels;
        const char* from = reinterpret_cast<const char*>(map.x + (at * map.channels + channel + part * 8));
        copy.parts.push_back({inside(to + swizzle(pixel * row_bytes + part * 16, row_bytes)), exists ? from : nullptr});
      }
      if ((column += map.stride_w) > last_column) {
        column = map.lower_w;
        if ((row += map.stride_h) > last_row) row = map.lower_h, ++image;
      }
    }
    start(std::move(copy));
  }

  void store(char* to, const Words& words) const { state.stores[index].push_back({inside(to), words}); }

  void show_stores() const {
    for (const auto& store : state.stores[index]) std::memcpy(store.to, &store.words, sizeof store.words);
    state.stores[index].clear();
  }

  void begin_products() const { open = true; }
  void end_products() const { open = false; }

  void keep(uint32_t&) const {}

  template <class Element>
  void multiply(float (&sums)[kTiles][4], const Words& weights, uint32_t metadata, uint64_t pixels) const {
    require(open, "products need a fence before them");
    auto& products = state.products[index / kGroupThreads];
    const size_t number = state.started[index]++;
    if (products.size() == number) products.push_back({{}, pixels});
    auto& product = products[number];
    require(product.pixels == pixels, "the threads of a warpgroup multiply different pixels");
    for (int i = 0; i < 4; ++i) product.registers[index % kGroupThreads][i] = weights.word[i];
    product.registers[index % kGroupThreads][4] = metadata;
    state.sums[index].push_back(sums);
    is_brain = std::is_same<Element, Brain>::value;
  }

  void wait_products() const {
    require(!open, "products are waited for before their group is closed");
    sync_warp();  // a warp waits as one: by then all of its lanes have given their registers
    for (size_t i = 0; state.finished[index] < state.started[index]; ++state.finished[index], ++i) {
      const auto& product = state.products[index / kGroupThreads][state.finished[index]];
      if (is_brain)
        finish<Brain>(product, state.sums[index][i]);
      else
        finish<Half>(product, state.sums[index][i]);
    }
    state.sums[index].clear();
    sync_warp();
  }

 private:
  using Registers = uint32_t[kGroupThreads][5];

  HopperState::Barrier& find(uint64_t* barrier) const {
    const auto at = state.barriers.find(barrier);
    require(at != state.barriers.end(), "a barrier was not started");
    return at->second;
  }

  static void advance(HopperState::Barrier& at) {
    if (at.pending == 0 && at.bytes == 0) at.pending = at.arrivals, ++at.phase;
  }

  char* inside(char* to) const {
    require(to >= of.shared() && to + 16 <= of.shared() + of.shared_bytes, "a copy goes beyond shared memory");
    require(reinterpret_cast<uintptr_t>(to) % 16 == 0, "a copy of 16 bytes is not aligned");
    return to;
  }

  void start(HopperState::BulkCopy copy) const {
    uint64_t* const barrier = copy.barrier;
    state.copies.push_back(std::move(copy));
    if (state.eager) deliver(barrier);
  }

  void deliver(uint64_t* barrier) const {
    auto& at = find(barrier);
    auto& copies = state.copies;
    for (size_t i = 0; i < copies.size();) {
      if (copies[i].barrier != barrier) {
        ++i;
        continue;
      }
      for (const auto& [to, from] : copies[i].parts) {
        if (from)
          std::memcpy(to, from, 16);
        else
          std::memset(to, 0, 16);
      }
      at.bytes -= static_cast<int64_t>(copies[i].parts.size()) * 16;
      require(at.bytes >= 0, "copies bring more bytes than a barrier expects");
      copies.erase(copies.begin() + static_cast<std::ptrdiff_t>(i));
      ++of.events;
      advance(at);
    }
  }

  // Parts of 16 bytes of 128 or 64 are numbered anew by the row of eight, or of four double ones, they lie in.
  static int swizzle(int address, int bytes) {
    const int pattern = address / 128 % 8, part = address / 16 % 8;
    return bytes == 128 ? address - part * 16 + (part ^ pattern) * 16
                        : address - part * 16 + (part ^ (pattern % 4)) * 16;
  }

  // Where columns 8 k to 8 k + 7 of a pixel begin: PTX ISA, "Matrix descriptor format" and the K-major layouts.
  const char* chunk(uint64_t descriptor, int pixel, int k) const {
    const int bytes = descriptor >> 62 == 1 ? 128 : 64;
    require(descriptor >> 62 == 1 || descriptor >> 62 == 2, "another swizzling");
    require((descriptor >> 49 & 7) == 0, "a base offset");
    const int begin = static_cast<int>(descriptor & 0x3fff) * 16,
              stride = static_cast<int>(descriptor >> 32 & 0x3fff) * 16;
    const int address = swizzle(begin + pixel / 8 * stride + pixel % 8 * bytes + k * 16, bytes);
    require(address >= 0 && address + 16 <= static_cast<int>(of.shared_bytes), "wgmma reads beyond shared memory");
    return of.shared() + address;
  }

  // Warp w has rows 16 w on; within it the fragments are those of sparse mma.m16n8k32 with selector 0.
  template <class Element>
  void finish(const HopperState::Product& product, float (*sums)[4]) const {
    const int warp = index % kGroupThreads / 32, lane = index % 32;
    for (int half = 0; half < 2; ++half) {
      const int row = lane / 4 + half * 8;
      int depths[16];
      double weights[16];
      for (int slot = 0; slot < 16; ++slot) {
        const uint32_t* values = product.registers[warp * 32 + row % 8 * 4 + slot % 8 / 2];
        const uint32_t word = values[(slot >= 8 ? 2 : 0) + half];
        weights[slot] = Element::widen(static_cast<uint16_t>(word >> slot % 2 * 16));
        const int group = slot / 2;
        const uint32_t metadata = product.registers[warp * 32 + row % 8 * 4 + group / 4][4];
        const uint32_t bits = metadata >> half * 16 >> group % 4 * 4 & 0xf;
        require((bits & 3) < bits >> 2, "metadata do not ascend");
        depths[slot] = group * 4 + (slot % 2 ? bits >> 2 : bits & 3);
      }
      for (int tile = 0; tile < kTiles; ++tile) {
        for (int j = 0; j < 2; ++j) {
          const int pixel = tile * 8 + lane % 4 * 2 + j;
          uint16_t columns[32];
          for (int k = 0; k < 4; ++k) std::memcpy(columns + k * 8, chunk(product.pixels, pixel, k), 16);
          double sum = sums[tile][half * 2 + j];
          for (int slot = 0; slot < 16; ++slot) sum += weights[slot] * Element::widen(columns[depths[slot]]);
          sums[tile][half * 2 + j] = static_cast<float>(sum);
        }
      }
    }
  }

  ThreadBlock& of;
  HopperState& state;
  const int index;
  mutable bool open = false, is_brain = false;
};

}  // namespace smart::cuda
