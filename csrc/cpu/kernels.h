// Direct sparse convolution, written once and compiled for each instruction set: the including file defines
// SMART_ISA (the namespace) and SMART_WIDTH (floats a vector). Only compiler vector types are used, so a new
// instruction set is a new file of four lines.
//
// Nothing from the standard library is instantiated here: such code would be emitted with this file's instructions
// and the linker might pick it for the whole program.
#include <cstdint>

#include "cpu/problem.h"
#include "cpu/workspace.h"

namespace smart::cpu::SMART_ISA {

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
    const Affine& a = e.affine;
    if (a.y) store_affine(a.y + at, b.y + at, a.scale[k], a.bias[k], a.relu, count);
  };
  if (l.lanes == 1) {
    alignas(64) float buffer[kCols * kWidth];
    for (int j = 0; j < kCols; ++j) store(buffer + j * kWidth, sums[0][j]);
    const int64_t pixel = grid_col * kWidth;
    emit(channel + pixel, buffer, min(kCols * kWidth, p.out_height * p.out_width - pixel));
    return;
  }
  const int64_t count = min(kCols, p.out_width - grid_col);
  const int64_t rows = min(kRows, p.out_height - grid_row);
  if (p.interleaved) {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t pixel = (grid_row + i) * p.out_width + grid_col;
      emit((channel + pixel) * kWidth, reinterpret_cast<const float*>(sums[i]), count * kWidth);
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
