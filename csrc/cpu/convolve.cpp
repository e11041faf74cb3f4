#include "cpu/convolve.h"

#include <stdexcept>

#include "cpu/threads.h"

namespace smart::cpu {

namespace {

constexpr int64_t kParkedBytes = 256 * 1024;  // of sums parked between slabs, in the L2 cache beside weights
constexpr int64_t kPanelBytes = 24 * 1024;    // of the slabs a panel holds, in the L1 cache

thread_local Scratch item_scratch;   // what one thread works in
thread_local Scratch block_scratch;  // images interleaved for one run

// All output channels of a group if their parked sums fit; fewer when there are too few items to occupy all threads
// evenly.
int64_t choose_out_chunk(Job job, int64_t width, int64_t threads) {
  const int64_t group_out = job.problem.out_channels / job.problem.groups;
  job.out_chunk = 1;
  const int64_t most = max(8, kParkedBytes / static_cast<int64_t>(parked_floats(job, width) * sizeof(float)));
  job.out_chunk = ceil_div(group_out, ceil_div(group_out, most));
  while (threads > 1 && job.out_chunk > 8 && work_items(job) < 4 * threads && work_items(job) % threads != 0) {
    job.out_chunk = ceil_div(job.out_chunk, 2);
  }
  return job.out_chunk;
}

bool is_linear(const std::vector<int32_t>& offsets, const Layout& l, int64_t width) {
  for (std::size_t code = 0; code < offsets.size(); ++code)
    if (offsets[code] != static_cast<int64_t>(code) * l.tile_cols * width) return false;
  return l.tile_rows == 1;
}

}  // namespace

int64_t path_nonzeros(const Problem& p, const Weight& w) {
  int64_t count = 0;
  const int64_t rows = slabs(p, w) * p.out_channels;
  for (const int32_t* row = w.segments; row < w.segments + rows * 3; row += 3)
    count += row[w.last_segment] - row[w.first_segment];
  return count;
}

Convolution::Convolution(const Kernels& kernels, const Problem& problem, const Weight& weight, const Epilogue& epilogue,
                         bool interleaved)
    : kernels_(kernels), problem_(problem), weight_(weight), epilogue_(epilogue), job_{} {
  const int64_t nonzeros = path_nonzeros(problem, weight);
  plan_ = interleaved ? image_plan(problem, weight, nonzeros, kernels) : pixel_plan(problem, weight, nonzeros, kernels);
  blocks_ = ceil_div(problem.batch, plan_.layout.lanes);
  if (!fits()) return;
  offsets_ = code_offsets(problem, plan_, kernels.width, weight.slab_channels);
  job_.problem = problem, job_.weight = weight, job_.epilogue = epilogue;
  job_.layout = plan_.layout;
  job_.plane_count = static_cast<int64_t>(plan_.planes.size());
  job_.linear = is_linear(offsets_, plan_.layout, kernels.width);
  job_.slab_floats = weight.slab_channels * plan_.layout.channel;
  job_.panel_slabs = max(1, kPanelBytes / static_cast<int64_t>(job_.slab_floats * sizeof(float)));
  job_.panel_slabs = min(job_.panel_slabs, slabs(problem, weight));
}

void Convolution::run(const Arrays& arrays, int64_t threads) const {
  const int64_t image_in = problem_.in_channels * problem_.height * problem_.width;
  Job job = job_;
  job.planes = plan_.planes.data(), job.offsets = offsets_.data();
  job.x = arrays.x, job.x_end = arrays.x + problem_.batch * image_in, job.y = arrays.y;
  job.epilogue.residual = arrays.residual, job.epilogue.affine.y = arrays.second;
  job.images = problem_.batch;
  if (plan_.layout.lanes == 1 || problem_.interleaved) {
    run_items(job, threads);
  } else {
    run_interleaving(job, threads);
  }
}

void Convolution::run_items(Job job, int64_t threads) const {
  job.out_chunk = choose_out_chunk(job, kernels_.width, threads);
  const int64_t count = work_items(job);
  parallel(count, plan_.cycles * smart::cpu::blocks(job) / count, threads, [&](int64_t first, int64_t last) {
    float* scratch = item_scratch.at_least(panel_floats(job) + parked_floats(job, kernels_.width));
    kernels_.run_items(job, first, last, scratch);
  });
}

void Convolution::run_interleaving(const Job& whole, int64_t threads) const {
  const Problem& p = problem_;
  const int64_t image_in = p.in_channels * p.height * p.width, image_out = p.out_channels * p.out_height * p.out_width;
  Job job = whole;
  float* images = block_scratch.at_least(image_in * kernels_.width);
  job.x = images, job.x_end = images + image_in * kernels_.width;
  for (int64_t first = 0; first < whole.images; first += kernels_.width) {
    job.images = min(kernels_.width, whole.images - first);
    job.y = whole.y + first * image_out;
    job.epilogue = advanced(whole.epilogue, first * image_out);
    const float* x = whole.x + first * image_in;
    parallel(p.in_channels, p.height * p.width * 4.0, threads, [&](int64_t a, int64_t b) {
      kernels_.interleave(x, p.in_channels, p.height * p.width, job.images, images, a, b);
    });
    run_items(job, threads);
  }
}

void convolve(const Kernels& kernels, const Problem& problem, const Weight& weight, const Epilogue& epilogue,
              const Arrays& arrays) {
  // Whole blocks of images take the cheaper layout, and so does the rest of the batch.
  const auto make = [&](int64_t images, bool interleaved) {
    Problem part = problem;
    part.batch = images;
    return Convolution(kernels, part, weight, epilogue, interleaved);
  };
  const Convolution by_image = make(kernels.width, true), by_pixel = make(1, false);
  const int64_t rest = problem.batch % kernels.width;
  int64_t interleaved = problem.batch - rest;
  if (!by_image.fits() || by_image.cycles() >= by_pixel.cycles() * kernels.width) interleaved = 0;
  if (interleaved == problem.batch - rest && by_image.fits() && by_image.cycles() < by_pixel.cycles() * rest)
    interleaved = problem.batch;
  if (interleaved < problem.batch && !by_pixel.fits()) throw std::length_error(kTooLarge);

  const int64_t threads = torch::stable::get_num_threads();
  if (interleaved > 0) make(interleaved, true).run(arrays, threads);
  if (interleaved < problem.batch) {
    const int64_t in = interleaved * problem.in_channels * problem.height * problem.width;
    const int64_t out = interleaved * problem.out_channels * problem.out_height * problem.out_width;
    const Arrays rest_arrays = {arrays.x + in, arrays.y + out, arrays.residual ? arrays.residual + out : nullptr,
                                arrays.second ? arrays.second + out : nullptr};
    make(problem.batch - interleaved, false).run(rest_arrays, threads);
  }
}

}  // namespace smart::cpu
