#include "cpu/convolve.h"

#include <torch/csrc/stable/ops.h>

#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "cpu/layout.h"

namespace smart::cpu {

namespace {

// Work under this many vector FMAs (some 15 us) is not worth handing to another thread, which takes some 10 us to wake.
constexpr int64_t kGrain = 32 * 1024;

constexpr std::size_t kCacheLine = 64;

struct Free {
  void operator()(float* memory) const { operator delete[](memory, std::align_val_t{kCacheLine}); }
};

// This thread's scratch memory, at least `count` floats, kept from call to call: new to the process each time, large
// blocks would cost more in page faults than what is done in them. It holds what the last call left.
float* scratch(int64_t count) {
  static thread_local std::unique_ptr<float[], Free> memory;
  static thread_local int64_t held = 0;
  if (held < count) {
    held = 0;
    memory.reset();
    memory.reset(new (std::align_val_t{kCacheLine}) float[count]);
    held = count;
  }
  return memory.get();
}

// Calls body(first, last) over [0, count) on torch's threads; `cost` is the vector FMAs of the whole range.
template <class Body>
void parallel(int64_t count, int64_t cost, const Body& body) {
  const int64_t per_item = cost / count > 0 ? cost / count : 1;
  const int64_t grain = ceil_div(kGrain, per_item);
  if (grain >= count) return body(0, count);
  torch::stable::parallel_for(0, count, grain, body);
}

// Fewer output channels an item when there are too few items to occupy all threads evenly.
int64_t choose_out_chunk(const Block& block, int64_t threads) {
  const int64_t group_out = block.problem.out_channels / block.problem.groups;
  int64_t chunk = min(group_out, kMaxOutChunk);
  while (threads > 1 && chunk > 8) {
    const int64_t items = block.problem.groups * ceil_div(group_out, chunk) * tiles(block.layout);
    if (items >= 4 * threads) break;
    chunk = ceil_div(chunk, 2);
  }
  return chunk;
}

// Runs blocks [first, last) of images one after another, each on all threads.
void run_blocks(const Kernels& kernels, Block block, int64_t path_nonzeros, int64_t first, int64_t last, int64_t count,
                int64_t threads) {
  const Problem& p = block.problem;
  const Layout& l = block.layout;
  const int64_t image_in = p.in_channels * p.height * p.width;
  const int64_t image_out = p.out_channels * p.out_height * p.out_width;
  block.workspace = scratch(l.workspace);
  // The slack is read, by lanes whose results are dropped, and never written.
  for (int64_t i = p.in_channels * l.channel; i < l.workspace; ++i) block.workspace[i] = 0.0f;
  block.out_chunk = choose_out_chunk(block, threads);
  const Block whole = block;
  const int64_t load_cost = l.workspace / kernels.width * 4;
  for (int64_t n = first; n < last; ++n) {
    const int64_t image = n * l.lanes;
    block.images = min(l.lanes, count - image);
    block.x = whole.x + image * image_in;
    block.y = whole.y + image * image_out;
    block.epilogue = advanced(whole.epilogue, image * image_out);
    parallel(p.in_channels, load_cost, [&](int64_t a, int64_t b) { kernels.load_channels(block, a, b); });
    parallel(work_items(block), path_nonzeros * cost(l), [&](int64_t a, int64_t b) { kernels.run_items(block, a, b); });
  }
}

// Runs `count` images in one layout, starting at those `block` points to.
void run_images(const Kernels& kernels, Block block, int64_t count, int64_t path_nonzeros) {
  const Problem& p = block.problem;
  std::vector<int32_t> offsets(block.weight.slab_channels * p.kernel_h * p.kernel_w);
  fill_offsets(p, block.layout, kernels.width, block.weight.slab_channels, offsets.data());
  block.offsets = offsets.data();

  // Threads that each run their own blocks wait for one another once; threads that share a block, twice a block.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t blocks = ceil_div(count, block.layout.lanes);
  if (threads > 1 && (blocks >= 4 * threads || blocks % threads == 0)) {
    parallel(blocks, blocks * path_nonzeros * cost(block.layout),
             [&](int64_t a, int64_t b) { run_blocks(kernels, block, path_nonzeros, a, b, count, 1); });
  } else {
    run_blocks(kernels, block, path_nonzeros, 0, blocks, count, threads);
  }
}

}  // namespace

void convolve(const Kernels& kernels, const Problem& problem, const Weight& weight, int64_t path_nonzeros,
              const Epilogue& epilogue, const float* x, float* y) {
  const Layout by_pixel = pixel_layout(problem, kernels.width);
  const Layout by_image = image_layout(problem, kernels.width);
  Block block = {};
  block.problem = problem, block.weight = weight, block.epilogue = epilogue;
  block.layout = by_image, block.x = x, block.y = y;

  if (problem.interleaved) return run_images(kernels, block, problem.batch, path_nonzeros);

  // Whole blocks of images take the cheaper layout, and so does the rest of the batch. Of equals the pixel layout: it
  // touches one image at a time, which stays in the L2 cache.
  const int64_t pixel_cost = cost(by_pixel);
  const bool offsets_fit = by_image.channel * weight.slab_channels <= std::numeric_limits<int32_t>::max();
  const int64_t image_cost = offsets_fit ? cost(by_image) : std::numeric_limits<int64_t>::max();
  const int64_t rest = problem.batch % kernels.width;
  int64_t interleaved = problem.batch - rest;
  if (image_cost >= pixel_cost * kernels.width) interleaved = 0;
  if (interleaved == problem.batch - rest && image_cost < pixel_cost * rest) interleaved = problem.batch;

  if (interleaved > 0) run_images(kernels, block, interleaved, path_nonzeros);
  if (interleaved < problem.batch) {
    const int64_t out_plane = problem.out_channels * problem.out_height * problem.out_width;
    block.layout = by_pixel;
    block.x = x + interleaved * problem.in_channels * problem.height * problem.width;
    block.y = y + interleaved * out_plane;
    block.epilogue = advanced(epilogue, interleaved * out_plane);
    run_images(kernels, block, problem.batch - interleaved, path_nonzeros);
  }
}

}  // namespace smart::cpu
