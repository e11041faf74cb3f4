#include "cpu/convolve.h"

#include <torch/csrc/stable/ops.h>

#include <memory>
#include <new>
#include <vector>

#include "cpu/layout.h"

namespace smart::cpu {

namespace {

// Work under this many cycles (some 10 us) is not worth handing to another thread, which takes as long to wake.
constexpr double kGrainCycles = 32 * 1024;
constexpr int64_t kParkedBytes = 256 * 1024;  // of sums parked between slabs, in the L2 cache beside weights
constexpr int64_t kPanelBytes = 24 * 1024;    // of the slabs a panel holds, about the L1 cache
constexpr std::size_t kCacheLine = 64;

struct Free {
  void operator()(float* memory) const { operator delete[](memory, std::align_val_t{kCacheLine}); }
};

// Memory that only grows, kept from call to call: new to the process each time, large blocks would cost more in page
// faults than what is done in them. It holds what the last call left.
class Scratch {
 public:
  float* at_least(int64_t count) {
    if (held_ < count) {
      held_ = 0;
      memory_.reset();
      memory_.reset(new (std::align_val_t{kCacheLine}) float[count]);
      held_ = count;
    }
    return memory_.get();
  }

 private:
  std::unique_ptr<float[], Free> memory_;
  int64_t held_ = 0;
};

thread_local Scratch item_scratch;   // what one thread works in
thread_local Scratch block_scratch;  // what the threads of one call share

// Calls body(first, last) over [0, count) on torch's threads; `cycles` is what one of them costs.
template <class Body>
void parallel(int64_t count, double cycles, const Body& body) {
  const int64_t grain = cycles >= kGrainCycles ? 1 : static_cast<int64_t>(kGrainCycles / (cycles < 1 ? 1 : cycles)) + 1;
  if (grain >= count) return body(0, count);
  torch::stable::parallel_for(0, count, grain, body);
}

// All output channels of a group if their parked sums fit; fewer when there are too few items to occupy all threads
// evenly.
int64_t choose_out_chunk(Job job, const Kernels& kernels) {
  const int64_t group_out = job.problem.out_channels / job.problem.groups;
  job.out_chunk = 1;
  const int64_t most = max(8, kParkedBytes / static_cast<int64_t>(parked_floats(job, kernels.width) * sizeof(float)));
  job.out_chunk = ceil_div(group_out, ceil_div(group_out, most));
  const int64_t threads = torch::stable::get_num_threads();
  while (threads > 1 && job.out_chunk > 8 && work_items(job) < 4 * threads && work_items(job) % threads != 0) {
    job.out_chunk = ceil_div(job.out_chunk, 2);
  }
  return job.out_chunk;
}

void run_items(const Kernels& kernels, const Job& job, double block_cycles) {
  const int64_t count = work_items(job);
  parallel(count, block_cycles * blocks(job) / count, [&](int64_t first, int64_t last) {
    float* scratch = item_scratch.at_least(panel_floats(job) + parked_floats(job, kernels.width));
    kernels.run_items(job, first, last, scratch);
  });
}

// Runs images that lie one after another, but are convolved interleaved: each block of them is interleaved first.
void run_interleaving(const Kernels& kernels, const Job& whole, double block_cycles) {
  const Problem& p = whole.problem;
  const int64_t image_in = p.in_channels * p.height * p.width, image_out = p.out_channels * p.out_height * p.out_width;
  Job job = whole;
  float* images = block_scratch.at_least(image_in * kernels.width);
  job.x = images, job.x_end = images + image_in * kernels.width;
  for (int64_t first = 0; first < whole.images; first += kernels.width) {
    job.images = min(kernels.width, whole.images - first);
    job.y = whole.y + first * image_out;
    job.epilogue = advanced(whole.epilogue, first * image_out);
    parallel(p.in_channels, p.height * p.width * 4.0, [&](int64_t a, int64_t b) {
      kernels.interleave(p, whole.x + first * image_in, job.images, images, a, b);
    });
    run_items(kernels, job, block_cycles);
  }
}

// Runs `count` images by one plan, from those on that `job` points to.
void run_images(const Kernels& kernels, Job job, const Plan& plan, int64_t count) {
  const std::vector<int32_t> offsets = code_offsets(job.problem, plan, kernels.width, job.weight.slab_channels);
  job.layout = plan.layout;
  job.planes = plan.planes.data(), job.plane_count = static_cast<int64_t>(plan.planes.size());
  job.offsets = offsets.data();
  job.linear = job.layout.tile_rows == 1;
  for (std::size_t code = 0; job.linear && code < offsets.size(); ++code)
    job.linear = offsets[code] == static_cast<int64_t>(code) * job.layout.tile_cols * kernels.width;
  job.slab_floats = job.weight.slab_channels * plan.layout.channel;
  job.panel_slabs = max(1, kPanelBytes / static_cast<int64_t>(job.slab_floats * sizeof(float)));
  job.panel_slabs = min(job.panel_slabs, slabs(job.problem, job.weight));
  job.images = count;
  job.out_chunk = choose_out_chunk(job, kernels);
  if (job.layout.lanes == 1 || job.problem.interleaved) {
    run_items(kernels, job, plan.cycles);
  } else {
    run_interleaving(kernels, job, plan.cycles);
  }
}

}  // namespace

void convolve(const Kernels& kernels, const Problem& problem, const Weight& weight, int64_t path_nonzeros,
              const Epilogue& epilogue, const float* x, float* y) {
  const int64_t image_in = problem.in_channels * problem.height * problem.width;
  Job job = {};
  job.problem = problem, job.weight = weight, job.epilogue = epilogue;
  job.x = x, job.x_end = x + problem.batch * image_in, job.y = y;

  const Plan by_image = image_plan(problem, weight, path_nonzeros, kernels);
  if (problem.interleaved) return run_images(kernels, job, by_image, problem.batch);

  // Whole blocks of images take the cheaper layout, and so does the rest of the batch.
  const Plan by_pixel = pixel_plan(problem, weight, path_nonzeros, kernels);
  const int64_t rest = problem.batch % kernels.width;
  int64_t interleaved = problem.batch - rest;
  if (!fits(by_image, weight.slab_channels) || by_image.cycles >= by_pixel.cycles * kernels.width) interleaved = 0;
  if (interleaved == problem.batch - rest && by_image.cycles < by_pixel.cycles * rest) interleaved = problem.batch;

  if (interleaved > 0) run_images(kernels, job, by_image, interleaved);
  if (interleaved < problem.batch) {
    const int64_t numbers = interleaved * problem.out_channels * problem.out_height * problem.out_width;
    job.x = x + interleaved * image_in;
    job.y = y + numbers;
    job.epilogue = advanced(epilogue, numbers);
    run_images(kernels, job, by_pixel, problem.batch - interleaved);
  }
}

}  // namespace smart::cpu
