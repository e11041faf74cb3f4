// Split-K, for maps with too few tiles to fill a GPU: several thread blocks share a tile's columns, each writes its
// sums to `partial` in memory, and a second kernel adds them, always in the same order, and finishes the outputs.
//
// For kernels on NHWC tensors that walk their columns block by block. Their struct has what pixels.h and epilogue.h ask
// for, and `float* partial` and `int splits`. Thread blocks (tile, split) walk `blocks_of` their split, and end in
// `store_partial` where `partial` is not null. A launch is in split_k_launch.h.
#pragma once

#include "epilogue.h"
#include "pixels.h"

namespace smart::cuda {

constexpr int kMaxSplits = 32;
constexpr int kAddWarps = 8;  // of a thread block of the second kernel
constexpr int kAddThreads = 32 * kAddWarps;
constexpr int kAddBytes = kAddThreads * kStoreChannels * static_cast<int>(sizeof(float));

// These numbers were chosen by thought, not measured. A split has blocks enough to be copied while others are
// multiplied. And the second kernel takes about 2 us to start, in which a thread block gets through eight blocks of
// 128 columns, 25 KB each, at some 64 bytes a cycle from the L2 cache.
constexpr int kMinSplitBlocks = 2;
constexpr int kMinSavedBlocks = 8;
constexpr int kMostSplitsChosen = 16;  // each writes and reads all sums once more

// How many thread blocks share the columns of each of `tiles`, which have `blocks` of them: 1 where it does not pay.
inline int choose_splits(int64_t tiles, int blocks, int processors) {
  int64_t splits = processors / (tiles > 0 ? tiles : 1);
  if (splits > blocks / kMinSplitBlocks) splits = blocks / kMinSplitBlocks;
  if (splits > kMostSplitsChosen) splits = kMostSplitsChosen;
  if (splits < 2) return 1;
  const int longest = static_cast<int>((blocks + splits - 1) / splits);
  if (blocks - longest < kMinSavedBlocks) return 1;
  return (blocks + longest - 1) / longest;  // no fewer are as fast
}

struct BlockRange {
  int begin, end;
};

// The blocks of one split: none is empty, and they differ by one at most.
template <class Problem>
SMART_DEVICE BlockRange blocks_of(const Problem& p, int split) {
  return {p.blocks * split / p.splits, p.blocks * (split + 1) / p.splits};
}

// Eight channels each, the last of them perhaps beyond the output's.
template <class Problem>
SMART_HOST_DEVICE int parts_of(const Problem& p) {
  return (p.out_channels + kStoreChannels - 1) / kStoreChannels;
}

// Of the partial sums, (splits, pixels, parts, 8): eight channels from `channel` on.
template <class Problem>
SMART_DEVICE Floats<4>* partial_at(const Problem& p, int split, int output, int channel) {
  const int64_t pixel = static_cast<int64_t>(split) * p.pixels + output;
  return reinterpret_cast<Floats<4>*>(p.partial + pixel * parts_of(p) * kStoreChannels + channel);
}

// Stores a split's sums of eight channels of an output pixel, which begin at `channel`.
template <class Problem>
SMART_DEVICE void store_partial(const Problem& p, const float (&sums)[kStoreChannels], int split, int output,
                                int channel) {
  Floats<4>* const to = partial_at(p, split, output, channel);
  to[0] = {sums[0], sums[1], sums[2], sums[3]};
  to[1] = {sums[4], sums[5], sums[6], sums[7]};
}

// Thread blocks of the second kernel.
template <class Problem>
int add_blocks(const Problem& p) {
  return (p.pixels * parts_of(p) + 31) / 32;
}

SMART_DEVICE void add_eight(float (&sums)[kStoreChannels], Floats<4> low, Floats<4> high) {
  SMART_UNROLL
  for (int i = 0; i < 4; ++i) sums[i] += low.number[i], sums[4 + i] += high.number[i];
}

// The body of the second kernel: a lane has eight channels of an output pixel, and each warp adds every eighth split.
// One thread's loads of all splits would come one after the other, and a load takes about as long as a block of
// columns.
template <class Element, class Problem, class Device>
SMART_DEVICE void add_partial(const Device& device, const Problem& p, char* shared) {
  const int warp = device.thread() / 32, lane = device.thread() % 32;
  const int index = device.block() * 32 + lane;
  const int place = index / parts_of(p), channel = index % parts_of(p) * kStoreChannels;
  float sums[kStoreChannels] = {};
  const int output = locate_pixel(p, place, p.pixels).output;  // -1: none
  if (output >= 0) {
    for (int split = warp; split < p.splits; split += kAddWarps) {
      const Floats<4>* const from = partial_at(p, split, output, channel);
      add_eight(sums, from[0], from[1]);
    }
  }
  auto* of_warps = reinterpret_cast<Floats<4>*>(shared) + lane;  // [warp][half][lane]
  of_warps[warp * 64] = {sums[0], sums[1], sums[2], sums[3]};
  of_warps[warp * 64 + 32] = {sums[4], sums[5], sums[6], sums[7]};
  device.sync();
  if (warp > 0 || output < 0) return;
  SMART_UNROLL
  for (int i = 1; i < kAddWarps; ++i) add_eight(sums, of_warps[i * 64], of_warps[i * 64 + 32]);
  const bool second = p.order && place >= p.first[0] * (p.out_height * p.out_width);
  const int64_t index_of_output = static_cast<int64_t>(output) * p.out_channels + channel;
  Epilogue<Element>::store(p, sums, index_of_output, channel + (second ? p.out_channels : 0));
}

}  // namespace smart::cuda
