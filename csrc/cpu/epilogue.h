// The way out of a tile: scale, bias, residual, ReLU and a second result. Part of cpu/kernels.h, which says how it is
// compiled.
#pragma once

#include "cpu/pointwise.h"
#include "cpu/vectors.h"

namespace smart::cpu::SMART_ISA {

template <class Number>
static inline Number bounded(const Epilogue& e, Number sum) {
  if (e.relu) sum = rectified(sum);
  return e.relu6 ? at_most_six(sum) : sum;
}

// y[j] = relu(from[j] + residual[j]), or what else the epilogue has for bounds, for one run of neighbouring output
// pixels: whole vectors of kLanes, then the rest with vectors half as long.
template <int kLanes = kWidth>
static inline void store_run(const Epilogue& e, float* y, const float* residual, const float* from, int64_t count) {
  typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float)), aligned(sizeof(float)), may_alias));
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    Lanes sum = *reinterpret_cast<const Lanes*>(from + j);
    if (residual) sum += *reinterpret_cast<const Lanes*>(residual + j);
    // As `bounded`, which these vectors of any alignment cannot be handed to.
    if (e.relu) sum = sum < 0.0f ? Lanes{} : sum;
    if (e.relu6) sum = sum > 6.0f ? Lanes{} + 6.0f : sum;
    *reinterpret_cast<Lanes*>(y + j) = sum;
  }
  if constexpr (kLanes > 2) {
    if (j < count) store_run<kLanes / 2>(e, y + j, residual ? residual + j : nullptr, from + j, count - j);
  } else if (j < count) {
    y[j] = bounded(e, residual ? from[j] + residual[j] : from[j]);
  }
}

// second[j] = relu(y[j] * scale + bias), likewise.
template <int kLanes = kWidth>
static inline void store_affine(float* second, const float* y, float scale, float bias, bool rectify, int64_t count) {
  typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float)), aligned(sizeof(float)), may_alias));
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    const Lanes value = *reinterpret_cast<const Lanes*>(y + j) * scale + bias;
    *reinterpret_cast<Lanes*>(second + j) = rectify ? (value < 0.0f ? Lanes{} : value) : value;
  }
  if constexpr (kLanes > 2) {
    if (j < count) store_affine<kLanes / 2>(second + j, y + j, scale, bias, rectify, count - j);
  } else if (j < count) {
    const float value = y[j] * scale + bias;
    second[j] = rectify && value < 0.0f ? 0.0f : value;
  }
}

// One whole vector of results, straight from its register.
static inline void store_vector(const Job& job, int64_t k, int64_t at, Vector sum) {
  const Epilogue& e = job.epilogue;
  if (e.residual) sum += load(e.residual + at);
  sum = bounded(e, sum);
  store(job.y + at, sum);
  const Affine& a = e.affine;
  if (!a.y) return;
  const Vector value = sum * a.scale[k] + a.bias[k];
  store(a.y + at, a.relu ? (value < 0.0f ? Vector{} : value) : value);
}

// A run of results of any length.
static inline void store_results(const Job& job, int64_t k, int64_t at, const float* from, int64_t count) {
  const Epilogue& e = job.epilogue;
  store_run(e, job.y + at, e.residual ? e.residual + at : nullptr, from, count);
  const Affine& a = e.affine;
  if (a.y) store_affine(a.y + at, job.y + at, a.scale[k], a.bias[k], a.relu, count);
}

// Applies the epilogue's function to results that were just written, and so are in the L1 cache.
static inline void activate_results(const Job& job, int64_t at, int64_t count) {
  if (job.epilogue.activates) activate(job.epilogue.function, job.y + at, count, job.y + at);
}

// Writes one tile of output channel k: `sums` are its vectors, (grid_row, grid_col) its place in the vector grid.
template <int kRows, int kCols>
static inline void finish(const Job& job, Vector (&sums)[kRows][kCols], int64_t block, int64_t k, int64_t grid_row,
                          int64_t grid_col) {
  const Problem& p = job.problem;
  const Layout& l = job.layout;
  const float scale = job.epilogue.scale ? job.epilogue.scale[k] : 1.0f;
  const float bias = job.epilogue.bias ? job.epilogue.bias[k] : 0.0f;
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kCols; ++j) sums[i][j] = sums[i][j] * scale + bias;

  const int64_t out_pixels = p.out_height * p.out_width;
  const int64_t channel = (block * l.lanes * p.out_channels + k * (p.interleaved ? kWidth : 1)) * out_pixels;
  if (l.lanes == 1) {
    const int64_t row_pixels = l.flat ? out_pixels : p.out_width;
    // Loops of constant length: sums that were indexed by variables could not stay in registers.
    for (int i = 0; i < kRows; ++i) {
      if (grid_row + i >= l.grid_rows) break;
      const int64_t row = channel + (grid_row + i) * row_pixels;
      for (int j = 0; j < kCols; ++j) {
        const int64_t pixel = (grid_col + j) * kWidth;
        if (pixel + kWidth <= row_pixels) {
          store_vector(job, k, row + pixel, sums[i][j]);
        } else if (pixel < row_pixels) {
          alignas(64) float run[kWidth];
          store(run, sums[i][j]);
          store_results(job, k, row + pixel, run, row_pixels - pixel);
        }
      }
      const int64_t first = grid_col * kWidth;
      activate_results(job, row + first, min(kCols * kWidth, row_pixels - first));
    }
    return;
  }
  const int64_t rows = min(kRows, p.out_height - grid_row), cols = min(kCols, p.out_width - grid_col);
  if (p.interleaved) {
    for (int i = 0; i < kRows; ++i) {
      const int64_t at = channel + ((grid_row + i) * p.out_width + grid_col) * kWidth;
      for (int j = 0; j < kCols; ++j)
        if (i < rows && j < cols) store_vector(job, k, at + j * kWidth, sums[i][j]);
      if (i < rows) activate_results(job, at, cols * kWidth);
    }
    return;
  }
  // kRows x kCols pixels of kWidth images: transposed, each image gets kRows runs of neighbouring pixels.
  alignas(64) float runs[kWidth][kRows * kCols + kWidth];
  for (int done = 0; done < kRows * kCols; done += kWidth) {
    Vector square[kWidth] = {};
    for (int n = 0; n < kWidth && done + n < kRows * kCols; ++n)
      square[n] = sums[(done + n) / kCols][(done + n) % kCols];
    transpose(square);
    for (int image = 0; image < kWidth; ++image) store(runs[image] + done, square[image]);
  }
  const int64_t images = min(kWidth, job.images - block * kWidth);
  for (int64_t image = 0; image < images; ++image) {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t pixel = (grid_row + i) * p.out_width + grid_col;
      const int64_t at = channel + image * p.out_channels * out_pixels + pixel;
      store_results(job, k, at, runs[image] + i * kCols, cols);
      activate_results(job, at, cols);
    }
  }
}

}  // namespace smart::cpu::SMART_ISA
