#include "cpu/convolve.h"

#include <atomic>
#include <cstring>
#include <stdexcept>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/threads.h"

namespace smart::cpu {

namespace {

constexpr int64_t kParkedBytes = 256 * 1024;            // of sums parked between slabs, in the L2 cache beside weights
constexpr int64_t kTransformedBytes = 4 * 1024 * 1024;  // of the weights that are transformed at once
constexpr int64_t kPanelBytes = 24 * 1024;              // of the slabs a panel holds, in the L1 cache

thread_local Scratch item_scratch;    // what one thread works in
thread_local Scratch block_scratch;   // images interleaved for one run
thread_local Scratch weight_scratch;  // weights transformed for one run

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

Reads reads_of(const Plan& plan) {
  return {plan.tile,          static_cast<int64_t>(plan.from.size()),
          plan.from.data(),   plan.shifts.data(),
          plan.inside.data(), plan.to.data(),
          plan.count.data(),  plan.before,
          plan.after};
}

// What `convolve` decided for one problem.
struct Decision {
  int64_t interleaved;  // images that run in the image layout; the rest does not
  std::shared_ptr<const Plan> by_image, by_pixel;
};

Decision decide(const Kernels& kernels, const Problem& problem, int64_t slab_channels, int64_t nonzeros) {
  const auto by_pixel = std::make_shared<Plan>(pixel_plan(problem, slab_channels, nonzeros, kernels));
  const auto by_image = std::make_shared<Plan>(image_plan(problem, slab_channels, nonzeros, kernels));
  // Whole blocks of images take the cheaper layout, and so does the rest of the batch.
  const int64_t rest = problem.batch % kernels.width;
  int64_t interleaved = problem.batch - rest;
  if (!by_image->fits || by_image->cycles >= by_pixel->cycles * kernels.width) interleaved = 0;
  if (interleaved == problem.batch - rest && by_image->fits && by_image->cycles < by_pixel->cycles * rest)
    interleaved = problem.batch;
  if (interleaved < problem.batch && !by_pixel->fits) throw std::length_error(kTooLarge);
  return {interleaved, by_image, by_pixel};
}

// All that a decision depends on, and that its plans' validity depends on; the weight's memory and the number of its
// values stand for its masks, which only make one plan faster than another. Memory alone would not do: it is given to
// another weight once this one is gone.
struct Key {
  Problem problem;
  const Kernels* kernels;
  const int32_t* segments;
  int64_t values, slab_channels, first_segment, last_segment;

  bool operator==(const Key& other) const { return std::memcmp(this, &other, sizeof(Key)) == 0; }
};
static_assert(std::has_unique_object_representations_v<Problem>, "keys are compared byte by byte");

// Planning takes some ten microseconds, as long as a small layer runs: the latest decisions are kept.
const Decision& decision_for(const Kernels& kernels, const Problem& problem, const Weight& weight) {
  constexpr std::size_t kMost = 256;
  static thread_local std::vector<std::pair<Key, Decision>> known;
  static thread_local std::size_t next = 0, oldest = 0;
  const int64_t values = weight.segments[slabs(problem, weight) * problem.out_channels * 3];
  const Key key = {
      problem, &kernels, weight.segments, values, weight.slab_channels, weight.first_segment, weight.last_segment};
  // A network asks for its layers in the same order again and again.
  for (std::size_t n = 0; n < known.size(); ++n) {
    const std::size_t at = (next + n) % known.size();
    if (known[at].first == key) {
      next = at + 1;
      return known[at].second;
    }
  }
  Decision decision = decide(kernels, problem, weight.slab_channels, path_nonzeros(problem, weight));
  if (known.size() < kMost) {
    known.emplace_back(key, std::move(decision));
    return known.back().second;
  }
  known[oldest] = {key, std::move(decision)};
  const Decision& kept = known[oldest].second;
  oldest = (oldest + 1) % kMost;
  return kept;
}

}  // namespace

int64_t path_nonzeros(const Problem& p, const Weight& w) {
  int64_t count = 0;
  const int64_t rows = slabs(p, w) * p.out_channels;
  for (const int32_t* row = w.segments; row < w.segments + rows * 3; row += 3)
    count += row[w.last_segment] - row[w.first_segment];
  return count;
}

namespace {

// What a direct run takes of a plan.
void lay_out(Job& job, const Plan& plan) {
  job.layout = plan.layout;
  job.planes = plan.planes.data(), job.plane_count = static_cast<int64_t>(plan.planes.size());
  job.offsets = plan.offsets.data(), job.linear = plan.linear;
  job.slab_floats = job.weight.slab_channels * plan.layout.channel;
  job.panel_slabs = max(1, kPanelBytes / static_cast<int64_t>(job.slab_floats * sizeof(float)));
  job.panel_slabs = min(job.panel_slabs, slabs(job.problem, job.weight));
}

}  // namespace

Convolution::Convolution(const Kernels& kernels, const Problem& problem, const Weight& weight, const Epilogue& epilogue,
                         std::shared_ptr<const Plan> plan)
    : kernels_(kernels), plan_(std::move(plan)), job_{} {
  job_.problem = problem, job_.weight = weight, job_.epilogue = epilogue;
  job_.images = problem.batch, job_.winograd = plan_->winograd;
  if (plan_->depthwise) {
    job_.layout = plan_->layout, job_.depthwise = true;
    job_.reads = reads_of(*plan_);
    return;
  }
  lay_out(job_, plan_->direct ? *plan_->direct : *plan_);
}

void Convolution::run(const Arrays& arrays, int64_t threads) const {
  const Problem& p = job_.problem;
  Job job = job_;
  job.x = arrays.x, job.x_end = arrays.x + p.batch * p.in_channels * p.height * p.width, job.y = arrays.y;
  job.epilogue.residual = arrays.residual, job.epilogue.affine.y = arrays.second;
  if (job.layout.lanes == 1 || p.interleaved) {
    run_items(job, threads);
  } else {
    run_interleaving(job, threads);
  }
}

void Convolution::run_items(Job job, int64_t threads) const {
  if (job.depthwise) return run_depthwise(job, threads);
  if (job.winograd.rows > 0 && run_winograd(job, threads)) return;
  job.out_chunk = choose_out_chunk(job, kernels_.width, threads);
  const int64_t count = work_items(job);
  parallel(count, plan_->cycles * blocks(job) / count, threads, [&](int64_t first, int64_t last) {
    float* scratch = item_scratch.at_least(panel_floats(job) + parked_floats(job, kernels_.width));
    kernels_.run_items(job, first, last, scratch);
  });
}

void Convolution::run_depthwise(const Job& job, int64_t threads) const {
  const int64_t channels = job.problem.out_channels;
  parallel(blocks(job) * channels, plan_->cycles / channels, threads, [&](int64_t first, int64_t last) {
    kernels_.run_depthwise(job, first, last, item_scratch.at_least(job.reads.before + job.reads.after));
  });
}

// Returns whether all results are finite; those that are not may not be what a direct convolution gives.
bool Convolution::run_winograd(Job job, int64_t threads) const {
  const Problem& p = job.problem;
  const int64_t outs = kernels_.winograd_outs, count = winograd_blocks(job);
  const int64_t channel_floats = winograd_point_floats(p.in_channels * outs, kernels_.width);
  const int64_t weight_blocks = ceil_div(p.out_channels, outs);
  const int64_t most = max(1, kTransformedBytes / static_cast<int64_t>(36 * channel_floats * sizeof(float)));
  const int64_t at_once = ceil_div(weight_blocks, ceil_div(weight_blocks, most));
  float* transformed = weight_scratch.at_least(at_once * 36 * channel_floats);
  job.transformed = transformed;
  std::atomic<bool> finite{true};
  for (int64_t block = 0; block < weight_blocks; block += at_once) {
    job.first_out = block * outs, job.last_out = min(p.out_channels, (block + at_once) * outs);
    parallel(min(at_once, weight_blocks - block), 15.0 * p.in_channels * outs, threads, [&](int64_t a, int64_t b) {
      kernels_.winograd_weights(job, a, b, item_scratch.at_least(9 * channel_floats), transformed);
    });
    parallel(count, plan_->cycles * blocks(job) / count, threads, [&](int64_t a, int64_t b) {
      float* scratch = item_scratch.at_least(winograd_floats(job, kernels_.width, outs));
      if (!kernels_.winograd_tiles(job, a, b, scratch)) finite = false;
    });
  }
  return finite;
}

void Convolution::run_interleaving(const Job& whole, int64_t threads) const {
  const Problem& p = whole.problem;
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

double estimated_cycles(const Kernels& kernels, const Problem& problem, int64_t slab_channels, int64_t nonzeros) {
  const Decision decision = decide(kernels, problem, slab_channels, nonzeros);
  const int64_t rest = problem.batch - decision.interleaved;
  return decision.by_image->cycles * ceil_div(decision.interleaved, kernels.width) + decision.by_pixel->cycles * rest;
}

void convolve(const Kernels& kernels, const Problem& problem, const Weight& weight, const Epilogue& epilogue,
              const Arrays& arrays) {
  const Decision decision = decision_for(kernels, problem, weight);
  const int64_t threads = torch::stable::get_num_threads(), interleaved = decision.interleaved;
  Problem part = problem;
  if (interleaved > 0) {
    part.batch = interleaved;
    Convolution(kernels, part, weight, epilogue, decision.by_image).run(arrays, threads);
  }
  if (interleaved < problem.batch) {
    const int64_t in = interleaved * problem.in_channels * problem.height * problem.width;
    const int64_t out = interleaved * problem.out_channels * problem.out_height * problem.out_width;
    const Arrays rest = {arrays.x + in, arrays.y + out, arrays.residual ? arrays.residual + out : nullptr,
                         arrays.second ? arrays.second + out : nullptr};
    part.batch = problem.batch - interleaved;
    Convolution(kernels, part, weight, epilogue, decision.by_pixel).run(rest, threads);
  }
}

}  // namespace smart::cpu
