// Direct sparse convolution, written once and compiled for each instruction set: the including file defines
// SMART_ISA (the namespace) and SMART_WIDTH (floats a vector). Only compiler vector types are used, so a new
// instruction set is a new three-line file.
//
// Nothing from the standard library is instantiated here: such code would be emitted with this file's instructions
// and the linker might pick it for the whole program.
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

// ---- the workspace ----

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

// Copies input channels [first, last) of the block into the workspace.
static void load_channels(const Block& b, int64_t first, int64_t last) {
  const Problem& p = b.problem;
  const Layout& l = b.layout;
  const int64_t pixels = p.height * p.width;
  if (l.lanes > 1) {
    for (int64_t c = first; c < last; ++c) load_images(b, b.workspace + c * l.channel, b.x + c * pixels);
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

// ---- the sum over non-zeros ----

// sums[i][j] += value * x[offset of its code + vector (i, j)], over the non-zeros [first, last).
template <int kRows, int kCols, class Code>
static inline void accumulate(Vector (&sums)[kRows][kCols], const float* x, int64_t row_stride, const float* values,
                              const Code* codes, const int32_t* offsets, int64_t first, int64_t last) {
  // A small tile alone would wait for each FMA's latency: it spreads its non-zeros over several partial sums.
  constexpr int kChains = kRows * kCols >= 8 ? 1 : kRows * kCols >= 4 ? 2 : 4;
  Vector partial[kChains][kRows][kCols] = {};
  int64_t n = first;
  for (; n + kChains <= last; n += kChains) {
    for (int chain = 0; chain < kChains; ++chain) {
      const float* at = x + offsets[codes[n + chain]];
      for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kCols; ++j) {
          Vector& sum = kChains == 1 ? sums[i][j] : partial[chain][i][j];
          sum += values[n + chain] * load(at + i * row_stride + j * kWidth);
        }
    }
  }
  for (; n < last; ++n) {
    const float* at = x + offsets[codes[n]];
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kCols; ++j) sums[i][j] += values[n] * load(at + i * row_stride + j * kWidth);
  }
  if (kChains > 1) {
    for (int chain = 0; chain < kChains; ++chain)
      for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kCols; ++j) sums[i][j] += partial[chain][i][j];
  }
}

// ---- the way out ----

// y[j] = relu(from[j] + residual[j]), keeping NaN as torch does, for one run of neighbouring output pixels: whole
// vectors of kLanes, then the rest with vectors half as long.
template <int kLanes = kWidth>
static inline void store_run(float* y, const float* residual, bool rectify, const float* from, int64_t count) {
  typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float)), aligned(sizeof(float)), may_alias));
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    Lanes sum = *reinterpret_cast<const Lanes*>(from + j);
    if (residual) sum += *reinterpret_cast<const Lanes*>(residual + j);
    *reinterpret_cast<Lanes*>(y + j) = rectify ? (sum < 0.0f ? Lanes{} : sum) : sum;
  }
  if constexpr (kLanes > 2) {
    if (j < count) store_run<kLanes / 2>(y + j, residual ? residual + j : nullptr, rectify, from + j, count - j);
  } else if (j < count) {
    const float sum = residual ? from[j] + residual[j] : from[j];
    y[j] = rectify && sum < 0.0f ? 0.0f : sum;
  }
}

// Writes one tile of output channel k: `sums` are its vectors, (grid_row, grid_col) its place in the vector grid.
template <int kRows, int kCols>
static inline void finish(const Block& b, Vector (&sums)[kRows][kCols], int64_t k, int64_t grid_row, int64_t grid_col) {
  const Problem& p = b.problem;
  const Layout& l = b.layout;
  const Epilogue& e = b.epilogue;
  const float scale = e.scale ? e.scale[k] : 1.0f;
  const float bias = e.bias ? e.bias[k] : 0.0f;
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kCols; ++j) sums[i][j] = sums[i][j] * scale + bias;

  const int64_t channel = k * p.out_height * p.out_width;
  const auto emit = [&](int64_t at, const float* from, int64_t count) {
    store_run(b.y + at, e.residual ? e.residual + at : nullptr, e.relu, from, count);
  };
  if (l.lanes == 1) {
    alignas(64) float buffer[kCols * kWidth];
    for (int j = 0; j < kCols; ++j) store(buffer + j * kWidth, sums[0][j]);
    const int64_t pixel = grid_col * kWidth;
    emit(channel + pixel, buffer, min(kCols * kWidth, p.out_height * p.out_width - pixel));
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
  const int64_t count = min(kCols, p.out_width - grid_col);
  const int64_t rows = min(kRows, p.out_height - grid_row);
  for (int64_t image = 0; image < b.images; ++image) {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t pixel = (grid_row + i) * p.out_width + grid_col;
      emit(image * p.out_channels * p.out_height * p.out_width + channel + pixel, runs[image] + i * kCols, count);
    }
  }
}

// ---- work items ----

template <int kRows, int kCols, class Code>
static void run_item(const Block& b, int64_t group, int64_t chunk, int64_t tile) {
  const Problem& p = b.problem;
  const Layout& l = b.layout;
  const Weight& w = b.weight;
  const int64_t group_out = p.out_channels / p.groups, group_in = p.in_channels / p.groups;
  const int64_t first_k = chunk * b.out_chunk, last_k = min(group_out, first_k + b.out_chunk);
  const int64_t tile_columns = ceil_div(l.grid_cols, kCols);
  const int64_t grid_row = tile / tile_columns * kRows, grid_col = tile % tile_columns * kCols;
  const int64_t slab_count = slabs(p, w);
  const float* x = b.workspace + group * group_in * l.channel + grid_row * l.row_stride + grid_col * kWidth;
  const Code* codes = static_cast<const Code*>(w.codes);

  // A slab of input channels stays in the L1 cache while every output channel of the chunk reads it; the sums of all
  // but the last slab are parked meanwhile.
  Vector parked[kMaxOutChunk][kRows][kCols];
  for (int64_t slab = 0; slab < slab_count; ++slab, x += w.slab_channels * l.channel) {
    for (int64_t k = first_k; k < last_k; ++k) {
      const int32_t* row = w.segments + (slab * p.out_channels + group * group_out + k) * 3;
      Vector sums[kRows][kCols] = {};
      if (slab > 0)
        for (int i = 0; i < kRows; ++i)
          for (int j = 0; j < kCols; ++j) sums[i][j] = parked[k - first_k][i][j];
      accumulate(sums, x, l.row_stride, w.values, codes, b.offsets, row[w.first_segment], row[w.last_segment]);
      if (slab + 1 < slab_count) {
        for (int i = 0; i < kRows; ++i)
          for (int j = 0; j < kCols; ++j) parked[k - first_k][i][j] = sums[i][j];
      } else {
        finish(b, sums, group * group_out + k, grid_row, grid_col);
      }
    }
  }
}

using Item = void (*)(const Block&, int64_t, int64_t, int64_t);

// The tile shapes compiled; cpu/layout.cpp picks among them.
template <class Code>
static Item item_for(int64_t rows, int64_t cols) {
  switch (rows * 10 + cols) {
    case 11: return run_item<1, 1, Code>;
    case 12: return run_item<1, 2, Code>;
    case 13: return run_item<1, 3, Code>;
    case 14: return run_item<1, 4, Code>;
    case 15: return run_item<1, 5, Code>;
    case 16: return run_item<1, 6, Code>;
    case 17: return run_item<1, 7, Code>;
    case 18: return run_item<1, 8, Code>;
    case 22: return run_item<2, 2, Code>;
    case 24: return run_item<2, 4, Code>;
    case 41: return run_item<4, 1, Code>;
    case 42: return run_item<4, 2, Code>;
    case 81: return run_item<8, 1, Code>;
    default: return nullptr;
  }
}

static void run_items(const Block& b, int64_t first, int64_t last) {
  const Layout& l = b.layout;
  const Item item =
      b.weight.wide_codes ? item_for<int16_t>(l.tile_rows, l.tile_cols) : item_for<uint8_t>(l.tile_rows, l.tile_cols);
  const int64_t tile_count = tiles(l), chunk_count = chunks(b);
  for (int64_t n = first; n < last; ++n) {
    item(b, n / tile_count / chunk_count, n / tile_count % chunk_count, n % tile_count);
  }
}

extern const Kernels kernels;
const Kernels kernels = {SMART_NAME, kWidth, load_channels, run_items};

}  // namespace smart::cpu::SMART_ISA
