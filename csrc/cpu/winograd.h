// Winograd's minimal filtering F(4x4, 3x3) for 3x3 convolutions of stride 1: 36 products for each input channel and
// tile of 4x4 outputs, where a direct one has 16 for each non-zero (Lavin and Gray, Fast Algorithms for Convolutional
// Neural Networks, CVPR 2016). Part of cpu/kernels.h, which says how it is compiled.
//
// A vector holds one tile of kWidth images, or one image's tiles: those of a block, row after row. A block's patches of
// 6x6 pixels are transformed to 36 *points*, (point, channel, vector); each point is a matrix product with the
// transformed weights; and what comes out is transformed to outputs.
#pragma once

#include "cpu/epilogue.h"
#include "cpu/winograd_inputs.h"
#include "cpu/winograd_transforms.h"

namespace smart::cpu::SMART_ISA {

constexpr int kOuts = SMART_MAX_TILE / 2;  // output channels multiplied at once: with three vectors they fill registers

// ---- weights ----

// The non-zeros of output channels [k, k + kOuts) as dense taps, (9, C, kOuts).
template <class Value, class Code>
static void unpack_taps(const Job& job, int64_t k, float* taps, int64_t tap_floats) {
  const Weight& w = job.weight;
  const Value* const values = static_cast<const Value*>(w.values);
  const Code* const codes = static_cast<const Code*>(w.codes);
  const int64_t out_channels = job.problem.out_channels, count = min(kOuts, out_channels - k);
  fill_zero(taps, 9 * tap_floats);
  for (int64_t slab = 0; slab < slabs(job.problem, w); ++slab) {
    const int32_t* row = w.segments + (slab * out_channels + k) * 3;
    float* const to = taps + slab * w.slab_channels * kOuts;
    for (int64_t i = 0; i < count; ++i, row += 3)
      for (int64_t n = row[w.first_segment]; n < row[w.last_segment]; ++n) {
        const uint32_t code = codes[n];
        to[code % 9 * tap_floats + code / 9 * kOuts + i] = values[n];
      }
  }
}

// Transforms the weights of the blocks [first, last) of kOuts output channels: (block, point, C, kOuts).
static void winograd_weights(const Job& job, int64_t first, int64_t last, float* scratch, float* to) {
  const int64_t floats = winograd_point_floats(job.problem.in_channels * kOuts, kWidth);
  const auto unpack = job.weight.half_values
                          ? (job.weight.wide_codes ? unpack_taps<Bfloat16, int16_t> : unpack_taps<Bfloat16, uint8_t>)
                          : (job.weight.wide_codes ? unpack_taps<float, int16_t> : unpack_taps<float, uint8_t>);
  for (int64_t block = first; block < last; ++block) {
    unpack(job, job.first_out + block * kOuts, scratch, floats);
    float* const points = to + block * kPoints * floats;
    for (int64_t i = 0; i < job.problem.in_channels * kOuts; i += kWidth) {
      Vector half[3][kPatch];  // transformed along the columns
      for (int s = 0; s < 3; ++s) {
        const Vector column[3] = {load(scratch + s * floats + i), load(scratch + (3 + s) * floats + i),
                                  load(scratch + (6 + s) * floats + i)};
        transform_weight(column, half[s]);
      }
      for (int r = 0; r < kPatch; ++r) {
        const Vector row[3] = {half[0][r], half[1][r], half[2][r]};
        Vector whole[kPatch];
        transform_weight(row, whole);
        for (int s = 0; s < kPatch; ++s) store(points + (r * kPatch + s) * floats + i, whole[s]);
      }
    }
  }
}

// ---- products and outputs ----

// Sums of one point over the input channels, for kOuts output channels: (kOuts, point, vector). Long sums are made of
// short ones, since the transformation of outputs magnifies their rounding errors.
template <int kVectors, int... I>
SMART_INLINE void sum_point(const float* weights, const float* points, int64_t channels, float* to,
                            std::integer_sequence<int, I...>) {
  constexpr int64_t kMostChannels = 128;
  for (int64_t first = 0; first < channels; first += kMostChannels) {
    Vector sums[kOuts * kVectors] = {((void)I, Vector{})...};
    for (int64_t c = first; c < min(channels, first + kMostChannels); ++c)
      ((sums[I] += weights[c * kOuts + I / kVectors] * load(points + (c * kVectors + I % kVectors) * kWidth)), ...);
    constexpr auto place = [](int i) { return (i / kVectors * kPoints * kVectors + i % kVectors) * kWidth; };
    if (first > 0) ((sums[I] += load(to + place(I))), ...);
    (store(to + place(I), sums[I]), ...);
  }
}

template <int kVectors>
static void sum_points(const float* weights, int64_t weight_floats, const float* points, int64_t point_floats,
                       int64_t channels, float* to) {
  for (int point = 0; point < kPoints; ++point, weights += weight_floats, points += point_floats)
    sum_point<kVectors>(weights, points, channels, to + point * kVectors * kWidth,
                        std::make_integer_sequence<int, kOuts * kVectors>{});
}

// Outputs of one vector of tiles; returns a vector that is not zero where any is not finite.
SMART_INLINE Vector outputs_of(const float* sums, int64_t vectors, Vector (&to)[4][4]) {
  Vector half[4][kPatch];
  for (int s = 0; s < kPatch; ++s) {
    Vector column[kPatch], outputs[4];
    for (int r = 0; r < kPatch; ++r) column[r] = load(sums + (r * kPatch + s) * vectors * kWidth);
    transform_output(column, outputs);
    for (int r = 0; r < 4; ++r) half[r][s] = outputs[r];
  }
  Vector all = {};
  for (int r = 0; r < 4; ++r) {
    transform_output(half[r], to[r]);
    all += (to[r][0] + to[r][1]) + (to[r][2] + to[r][3]);
  }
  return all - all;
}

static Vector finish_images(const Job& job, const TileBlock& b, int64_t k, const float* sums) {
  Vector odd = {};
  for (int64_t tile = 0; tile < b.rows * b.cols; ++tile) {
    Vector outputs[4][4];
    odd += outputs_of(sums + tile * kWidth, b.vectors, outputs);
    finish(job, outputs, b.unit, k, (b.row + tile / b.cols) * 4, (b.col + tile % b.cols) * 4);
  }
  return odd;
}

static Vector finish_pixels(const Job& job, const TileBlock& b, int64_t k, const float* sums, float* scratch) {
  const Problem& p = job.problem;
  const float scale = job.epilogue.scale ? job.epilogue.scale[k] : 1.0f;
  const float bias = job.epilogue.bias ? job.epilogue.bias[k] : 0.0f;
  const int64_t line = b.vectors * 4 * kWidth;
  Vector odd = {};
  for (int64_t vector = 0; vector < b.vectors; ++vector) {
    Vector outputs[4][4];
    odd += outputs_of(sums + vector * kWidth, b.vectors, outputs);
    for (int r = 0; r < 4; ++r) {
      for (int s = 0; s < 4; ++s) outputs[r][s] = outputs[r][s] * scale + bias;
      float* const to = scratch + r * line + vector * 4 * kWidth;
      const Vector low = interleave_low(outputs[r][0], outputs[r][2], kLaneNumbers);
      const Vector low_on = interleave_low(outputs[r][1], outputs[r][3], kLaneNumbers);
      const Vector high = interleave_high(outputs[r][0], outputs[r][2], kLaneNumbers);
      const Vector high_on = interleave_high(outputs[r][1], outputs[r][3], kLaneNumbers);
      store(to, interleave_low(low, low_on, kLaneNumbers));
      store(to + kWidth, interleave_high(low, low_on, kLaneNumbers));
      store(to + 2 * kWidth, interleave_low(high, high_on, kLaneNumbers));
      store(to + 3 * kWidth, interleave_high(high, high_on, kLaneNumbers));
    }
  }
  const int64_t channel = (b.unit * p.out_channels + k) * p.out_height * p.out_width;
  const int64_t cols = min(b.cols * 4, p.out_width - b.col * 4), rows = min(b.rows * 4, p.out_height - b.row * 4);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = channel + (b.row * 4 + r) * p.out_width + b.col * 4;
    store_results(job, k, at, scratch + r % 4 * line + r / 4 * b.cols * 4, cols);
    activate_results(job, at, cols);
  }
  return odd;
}

// Runs the blocks of tiles [first, last) for the output channels whose weights are transformed. Returns whether all
// results are finite: what is not spoils its whole tile, which then is for a direct convolution to compute.
static bool winograd_tiles(const Job& job, int64_t first, int64_t last, float* scratch) {
  const Problem& p = job.problem;
  const Winograd& w = job.winograd;
  const bool by_pixel = job.layout.lanes == 1;
  const int64_t channels = p.in_channels, pixels = p.height * p.width * (by_pixel ? 1 : kWidth);
  const int64_t weight_floats = winograd_point_floats(channels * kOuts, kWidth);
  const int64_t tile_rows = ceil_div(p.out_height, 4), tile_cols = ceil_div(p.out_width, 4);
  const int64_t across = ceil_div(tile_cols, w.cols), down = ceil_div(tile_rows, w.rows);
  float* const sums = scratch + kPoints * winograd_point_floats(channels * w.vectors * kWidth, kWidth);
  float* const rest = sums + kOuts * kPoints * w.vectors * kWidth;
  // What earlier runs left beside the tiles might not be finite.
  if (by_pixel) fill_zero(rest, 4 * kPatch * winograd_plane_floats(w, kWidth));
  Vector odd = {};
  for (int64_t n = first; n < last; ++n) {
    TileBlock b;
    b.unit = n / (across * down), b.row = n / across % down * w.rows, b.col = n % across * w.cols;
    b.rows = min(w.rows, tile_rows - b.row), b.cols = min(w.cols, tile_cols - b.col);
    b.vectors = by_pixel ? ceil_div(b.rows * b.cols, kWidth) : b.rows * b.cols;
    const int64_t point_floats = winograd_point_floats(channels * b.vectors * kWidth, kWidth);
    const float* x = job.x + b.unit * channels * pixels;
    for (int64_t c = 0; c < channels; ++c, x += pixels) {
      float* const to = scratch + c * b.vectors * kWidth;
      if (by_pixel) {
        transform_pixels(job, b, x, point_floats, to, rest);
      } else {
        transform_images(job, b, x, point_floats, to);
      }
    }
    const auto sum = b.vectors == 1 ? sum_points<1> : b.vectors == 2 ? sum_points<2> : sum_points<3>;
    const float* weights = job.transformed;
    for (int64_t k = job.first_out; k < job.last_out; k += kOuts, weights += kPoints * weight_floats) {
      sum(weights, weight_floats, scratch, point_floats, channels, sums);
      for (int64_t i = 0; i < min(kOuts, job.last_out - k); ++i) {
        const float* of_channel = sums + i * kPoints * b.vectors * kWidth;
        odd += by_pixel ? finish_pixels(job, b, k + i, of_channel, rest) : finish_images(job, b, k + i, of_channel);
      }
    }
  }
  for (int lane = 0; lane < kWidth; ++lane)
    if (odd[lane] != 0.0f) return false;
  return true;
}

}  // namespace smart::cpu::SMART_ISA
