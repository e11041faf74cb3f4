// The workspace: vectors, and how a block of images is copied in. Part of cpu/kernels.h, which says how it is compiled.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <utility>

#include "cpu/problem.h"

namespace smart::cpu::SMART_ISA {

constexpr int kWidth = SMART_WIDTH;
typedef float Vector __attribute__((vector_size(kWidth * sizeof(float))));
typedef float LooseVector __attribute__((vector_size(kWidth * sizeof(float)), aligned(sizeof(float)), may_alias));

static inline Vector load(const float* from) { return *reinterpret_cast<const LooseVector*>(from); }
static inline void store(float* to, Vector value) { *reinterpret_cast<LooseVector*>(to) = value; }

template <int... I>
static inline Vector interleave_low(Vector a, Vector b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I / 2 + (I % 2) * kWidth)...);
}

template <int... I>
static inline Vector interleave_high(Vector a, Vector b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I / 2 + kWidth / 2 + (I % 2) * kWidth)...);
}

// Transposes a square of kWidth rows in registers: log2(kWidth) perfect shuffles of its halves.
static inline void transpose(Vector (&rows)[kWidth]) {
  constexpr auto lanes = std::make_integer_sequence<int, kWidth>{};
  for (int step = 1; step < kWidth; step *= 2) {
    Vector shuffled[kWidth];
    for (int i = 0; i < kWidth / 2; ++i) {
      shuffled[2 * i] = interleave_low(rows[i], rows[i + kWidth / 2], lanes);
      shuffled[2 * i + 1] = interleave_high(rows[i], rows[i + kWidth / 2], lanes);
    }
    for (int i = 0; i < kWidth; ++i) rows[i] = shuffled[i];
  }
}

static inline void fill_zero(float* to, int64_t count) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(to + i, Vector{});
  for (; i < count; ++i) to[i] = 0.0f;
}

// Copies exactly `count` floats: whole vectors of kLanes, then the rest with vectors half as long.
template <int kLanes = kWidth>
static inline void copy(float* to, const float* from, int64_t count) {
  typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float)), aligned(sizeof(float)), may_alias));
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    *reinterpret_cast<Lanes*>(to + i) = *reinterpret_cast<const Lanes*>(from + i);
  if constexpr (kLanes > 2) {
    if (i < count) copy<kLanes / 2>(to + i, from + i, count - i);
  } else if (i < count) {
    to[i] = from[i];
  }
}

// Pixel layout: one channel's image with its padding, split by column phase; scratch for the copies made of it.
struct Padded {
  int64_t rows, pitch;  // of one phase
  float* pixels;
};

// Rewrites the pixels inside the image; the padding around them, zero from the start, stays.
static void load_padded(const Problem& p, const Padded& padded, const float* image) {
  const int64_t rows = min(p.height, padded.rows - p.pad_top);
  for (int64_t h = 0; h < rows; ++h) {
    const float* row = image + h * p.width;
    if (p.stride_w == 1) {
      copy(padded.pixels + (h + p.pad_top) * padded.pitch + p.pad_left, row, min(p.width, padded.pitch - p.pad_left));
      continue;
    }
    for (int64_t w = 0; w < p.width; ++w) {
      const int64_t column = w + p.pad_left, phase = column % p.stride_w, j = column / p.stride_w;
      if (j < padded.pitch) padded.pixels[(phase * padded.rows + h + p.pad_top) * padded.pitch + j] = row[w];
    }
  }
}

static void copy_planes(const Block& b, float* to, const Padded& padded) {
  const Problem& p = b.problem;
  const Layout& l = b.layout;
  for (int64_t r = 0; r < p.kernel_h; ++r) {
    if (row_copy(p, r, kWidth) != r) continue;
    for (int64_t s = 0; s < p.kernel_w; ++s, to += l.plane) {
      const int64_t column = s * p.dilation_w;
      const float* from = padded.pixels + (column % p.stride_w * padded.rows + row_phase(p, r)) * padded.pitch;
      from += column / p.stride_w;
      // The last vector is read whole: no part of it may hold numbers that are slow to compute with.
      store(to + l.plane - kWidth, Vector{});
      // Whole vectors: what runs over a row's end is overwritten by the next row.
      float* row = to + plane_start(p, r, kWidth);
      for (int64_t i = 0; i < l.rows; ++i, row += l.pitch, from += p.stride_h * padded.pitch)
        for (int64_t j = 0; j < l.pitch; j += kWidth) store(row + j, load(from + j));
    }
  }
}

// Image layout: where pixel (h, w) of the image lies in its channel; negative if no tap reads it.
static inline int64_t pixel_offset(const Problem& p, const Layout& l, int64_t h, int64_t w) {
  const int64_t row = h + p.pad_top, column = w + p.pad_left;
  const int64_t phase_h = row % p.stride_h, phase_w = column % p.stride_w;
  const int64_t i = row / p.stride_h, j = column / p.stride_w;
  if (phase_h >= l.phases_h || phase_w >= l.phases_w || i >= l.rows || j >= l.pitch) return -1;
  return (phase_h * l.phases_w + phase_w) * l.plane + (i * l.pitch + j) * l.lanes;
}

static void load_images(const Block& b, float* to, const float* image) {
  const Problem& p = b.problem;
  const Layout& l = b.layout;
  const int64_t pixels = p.height * p.width, image_stride = p.in_channels * pixels;
  fill_zero(to, l.channel);
  for (int64_t done = 0; done < pixels; done += kWidth) {
    // kWidth pixels of kWidth images, transposed; the last square overlaps the one before, or is cut short.
    const int64_t first = min(done, pixels > kWidth ? pixels - kWidth : 0);
    const int64_t count = min(kWidth, pixels);
    Vector square[kWidth] = {};
    for (int64_t i = 0; i < b.images; ++i) {
      if (count == kWidth) {
        square[i] = load(image + i * image_stride + first);
      } else {
        for (int64_t j = 0; j < count; ++j) square[i][j] = image[i * image_stride + first + j];
      }
    }
    transpose(square);
    int64_t h = first / p.width, w = first % p.width;
    for (int64_t j = 0; j < count; ++j) {
      const int64_t at = p.stride_h * p.stride_w == 1 ? ((h + p.pad_top) * l.pitch + w + p.pad_left) * l.lanes
                                                      : pixel_offset(p, l, h, w);
      if (at >= 0) store(to + at, square[j]);
      if (++w == p.width) w = 0, ++h;
    }
  }
}

// Image layout, of images that are interleaved already: only the padding and the stride's phases remain to be made.
static void load_interleaved(const Block& b, float* to, const float* images) {
  const Problem& p = b.problem;
  const Layout& l = b.layout;
  for (int64_t phase_h = 0; phase_h < l.phases_h; ++phase_h) {
    for (int64_t phase_w = 0; phase_w < l.phases_w; ++phase_w) {
      for (int64_t i = 0; i < l.rows; ++i, to += l.pitch * kWidth) {
        const int64_t h = i * p.stride_h + phase_h - p.pad_top;
        if (h < 0 || h >= p.height) {
          fill_zero(to, l.pitch * kWidth);
          continue;
        }
        const float* row = images + h * p.width * kWidth;
        for (int64_t j = 0, w = phase_w - p.pad_left; j < l.pitch; ++j, w += p.stride_w)
          store(to + j * kWidth, w < 0 || w >= p.width ? Vector{} : load(row + w * kWidth));
      }
    }
  }
}

// Copies input channels [first, last) of the block into the workspace.
static void load_channels(const Block& b, int64_t first, int64_t last) {
  const Problem& p = b.problem;
  const Layout& l = b.layout;
  const int64_t pixels = p.height * p.width;
  if (l.lanes > 1) {
    const auto load_channel = p.interleaved ? load_interleaved : load_images;
    const int64_t stride = p.interleaved ? pixels * kWidth : pixels;
    for (int64_t c = first; c < last; ++c) load_channel(b, b.workspace + c * l.channel, b.x + c * stride);
    return;
  }
  Padded padded = {};
  padded.rows = (l.rows - 1) * p.stride_h + min(p.stride_h, (p.kernel_h - 1) * p.dilation_h + 1);
  padded.pitch = l.pitch + (p.kernel_w - 1) * p.dilation_w / p.stride_w;
  const int64_t size = padded.rows * padded.pitch * p.stride_w + 2 * kWidth;
  padded.pixels = static_cast<float*>(std::calloc(size, sizeof(float)));
  for (int64_t c = first; c < last; ++c) {
    load_padded(p, padded, b.x + c * pixels);
    copy_planes(b, b.workspace + c * l.channel, padded);
  }
  std::free(padded.pixels);
}

}  // namespace smart::cpu::SMART_ISA
