// Direct sparse convolution, written once and compiled for each instruction set: the including file defines
// SMART_ISA (the namespace), SMART_WIDTH (floats a vector) and SMART_MAX_TILE (vectors whose sums fit the registers).
// Only compiler vector types are used, so a new instruction set is a new file of a few lines.
//
// Nothing from the standard library is instantiated here: such code would be emitted with this file's instructions
// and the linker might pick it for the whole program.
#include <cstdint>

#include "cpu/depthwise.h"
#include "cpu/epilogue.h"
#include "cpu/panel.h"
#include "cpu/pointwise.h"
#include "cpu/problem.h"
#include "cpu/tiles.h"
#include "cpu/winograd.h"

namespace smart::cpu::SMART_ISA {

// Where the panel holds what a code multiplies: by table, or, where planes lie in the order of taps and are as long as
// the tile, without. Small tiles are bound by loads, of which the table is one a non-zero.
struct Table {
  const int32_t* offsets;
  SMART_INLINE int64_t operator[](int64_t code) const { return offsets[code]; }
};
template <int kCols>
struct Linear {
  SMART_INLINE int64_t operator[](int64_t code) const { return code * (kCols * kWidth); }
};

// The sums of one tile of one output channel, kept in registers: every index is a constant, by unfolding instead of
// loops, as compilers keep arrays that loops run over in memory.
template <int kRows, int kCols>
struct Sums {
  static constexpr int kVectors = kRows * kCols;
  // A small tile alone would wait for each FMA's latency: it spreads its non-zeros over several partial sums.
  static constexpr int kChains = kVectors >= 4 ? 1 : kVectors >= 2 ? 2 : 4;
  static constexpr auto kAll = std::make_integer_sequence<int, kVectors>{};
  static constexpr auto kRest = std::make_integer_sequence<int, (kChains - 1) * kVectors>{};
  Vector vectors[kChains * kVectors];

  template <int... I>
  SMART_INLINE void set_zero(std::integer_sequence<int, I...>) {
    ((vectors[I] = Vector{}), ...);
  }
  template <int... I>
  SMART_INLINE void clear_rest(std::integer_sequence<int, I...>) {
    ((vectors[kVectors + I] = Vector{}), ...);
  }
  template <int... I>
  SMART_INLINE void load_from(const float* parked, std::integer_sequence<int, I...>) {
    ((vectors[I] = load(parked + I * kWidth)), ...);
  }
  template <int... I>
  SMART_INLINE void store_to(float* parked, std::integer_sequence<int, I...>) const {
    (store(parked + I * kWidth, vectors[I]), ...);
  }
  template <int... I>
  SMART_INLINE void join(std::integer_sequence<int, I...>) {
    ((vectors[I % kVectors] += vectors[kVectors + I]), ...);
  }
  // += value * at[vector (i, j)]
  template <int kChain, int... I>
  SMART_INLINE void add(float value, const float* at, int64_t row_stride, std::integer_sequence<int, I...>) {
    const auto step = [&](int column) {
      if (column + 1 < kCols) return;
      at += row_stride;
      // Otherwise the compiler computes the address of every vector on its own, and runs out of registers.
      asm("" : "+r"(at));
    };
    ((vectors[kChain * kVectors + I] += value * load(at + I % kCols * kWidth), step(I % kCols)), ...);
  }
  template <class Value, class Code, class Offsets, int... C>
  SMART_INLINE int64_t add_runs(const float* panel, int64_t row_stride, const Value* values, const Code* codes,
                                Offsets offsets, int64_t n, int64_t last, std::integer_sequence<int, C...>) {
    for (; n + kChains <= last; n += kChains)
      (add<C>(values[n + C], panel + offsets[codes[n + C]], row_stride, kAll), ...);
    return n;
  }
  // Adds value * panel[offset of its code + vector (i, j)] over the non-zeros [first, last).
  template <class Value, class Code, class Offsets>
  SMART_INLINE void accumulate(const float* panel, int64_t row_stride, const Value* values, const Code* codes,
                               Offsets offsets, int64_t first, int64_t last) {
    int64_t n =
        add_runs(panel, row_stride, values, codes, offsets, first, last, std::make_integer_sequence<int, kChains>{});
    if constexpr (kChains > 1)
      for (; n < last; ++n) add<0>(values[n], panel + offsets[codes[n]], row_stride, kAll);
  }
};

// What one work item computes: a tile of a chunk of output channels.
struct Item {
  int64_t block, group, first_k, last_k, grid_row, grid_col;
};

// Runs the output channels of an item over the slabs [first, last) of input channels, which lie in the panel; the sums
// are parked before and after, but for the first and the last slab.
template <int kRows, int kCols, class Value, class Code, class Offsets>
static void run_rows(const Job& job, const Item& item, int64_t first, int64_t last, Offsets offsets, const float* panel,
                     float* parked) {
  using TileSums = Sums<kRows, kCols>;
  // Small tiles run through the weights so fast that they would wait for them.
  constexpr int64_t kAhead = TileSums::kVectors <= 4 ? 6 : 0;
  // In local variables: what a pointer leads to would be read again after every store.
  const Problem& p = job.problem;
  const Weight& w = job.weight;
  const Value* const values = static_cast<const Value*>(w.values);
  const Code* const codes = static_cast<const Code*>(w.codes);
  const int64_t slab_floats = job.slab_floats, row_stride = job.layout.row_stride, slab_rows = p.out_channels * 3;
  const int64_t group_k = item.group * (p.out_channels / p.groups), slab_count = last - first;
  const int32_t* row = w.segments + first * slab_rows + (group_k + item.first_k) * 3;
  const int64_t from = w.first_segment, to = w.last_segment;
  const bool begins = first == 0, ends = last == slabs(p, w);
  for (int64_t k = item.first_k; k < item.last_k; ++k, row += 3, parked += TileSums::kVectors * kWidth) {
    TileSums sums;
    if (begins) {
      sums.set_zero(sums.kAll);
    } else {
      sums.load_from(parked, sums.kAll);
    }
    sums.clear_rest(sums.kRest);
    if (kAhead > 0 && k + kAhead < item.last_k) {
      for (int64_t slab = 0; slab < slab_count; ++slab) {
        const int64_t ahead = row[slab * slab_rows + kAhead * 3 + from];
        __builtin_prefetch(values + ahead), __builtin_prefetch(values + ahead + 16);
        __builtin_prefetch(codes + ahead);
      }
    }
    for (int64_t slab = 0; slab < slab_count; ++slab)
      sums.accumulate(panel + slab * slab_floats, row_stride, values, codes, offsets, row[slab * slab_rows + from],
                      row[slab * slab_rows + to]);
    sums.join(sums.kRest);
    if (!ends) {
      sums.store_to(parked, sums.kAll);
      continue;
    }
    Vector results[kRows][kCols];
    for (int n = 0; n < TileSums::kVectors; ++n) results[n / kCols][n % kCols] = sums.vectors[n];
    finish(job, results, item.block, group_k + k, item.grid_row, item.grid_col);
  }
}

template <int kRows, int kCols, class Value, class Code>
static void run_item(const Job& job, const Item& item, float* scratch) {
  const Problem& p = job.problem;
  const Layout& l = job.layout;
  const int64_t group_in = p.in_channels / p.groups, channel = p.height * p.width * l.lanes;
  const int64_t slab_channels = job.weight.slab_channels, slab_count = slabs(p, job.weight);
  const float* x = job.x + (item.block * p.in_channels + item.group * group_in) * channel;
  float* const panel = scratch;
  float* const parked = scratch + panel_floats(job);
  Shifts shifts;
  const bool shifted = l.lanes == 1 && shifts.find(job, item.grid_row, item.grid_col);
  for (int64_t first = 0; first < slab_count; first += job.panel_slabs) {
    const int64_t last = min(slab_count, first + job.panel_slabs);
    const int64_t first_channel = first * slab_channels, channels = min(group_in, last * slab_channels) - first_channel;
    const float* from = x + first_channel * channel;
    if (shifted) {
      shifts.fill(job, from, channels, panel);
    } else if (l.lanes == 1) {
      fill_runs(job, from, channels, item.grid_row, item.grid_col, panel);
    } else {
      fill_images(job, from, channels, item.grid_row, item.grid_col, panel);
    }
    if constexpr (kRows == 1) {
      if (job.linear) {
        run_rows<kRows, kCols, Value, Code>(job, item, first, last, Linear<kCols>{}, panel, parked);
        continue;
      }
    }
    run_rows<kRows, kCols, Value, Code>(job, item, first, last, Table{job.offsets}, panel, parked);
  }
}

using RunItem = void (*)(const Job&, const Item&, float*);

template <class Value, class Code, int kTile = 0>
static RunItem run_item_for(const Layout& l) {
  constexpr Tile t = kTiles[kTile];
  if constexpr (t.rows * t.cols <= SMART_MAX_TILE) {
    if (t.rows == l.tile_rows && t.cols == l.tile_cols) return run_item<t.rows, t.cols, Value, Code>;
  }
  if constexpr (kTile + 1 < kTileCount) {
    return run_item_for<Value, Code, kTile + 1>(l);
  } else {
    return nullptr;
  }
}

template <class Value>
static RunItem run_item_for_codes(const Job& job) {
  return job.weight.wide_codes ? run_item_for<Value, int16_t>(job.layout) : run_item_for<Value, uint8_t>(job.layout);
}

static void run_items(const Job& job, int64_t first, int64_t last, float* scratch) {
  const Layout& l = job.layout;
  const RunItem run = job.weight.half_values ? run_item_for_codes<Bfloat16>(job) : run_item_for_codes<float>(job);
  const int64_t tile_count = tiles(l), tile_columns = ceil_div(l.grid_cols, l.tile_cols), chunk_count = chunks(job);
  const int64_t groups = job.problem.groups, group_out = job.problem.out_channels / groups;
  for (int64_t n = first; n < last; ++n) {
    const int64_t tile = n % tile_count, part = n / tile_count;
    Item item;
    item.block = part / chunk_count / groups, item.group = part / chunk_count % groups;
    item.first_k = part % chunk_count * job.out_chunk;
    item.last_k = min(group_out, item.first_k + job.out_chunk);
    item.grid_row = tile / tile_columns * l.tile_rows, item.grid_col = tile % tile_columns * l.tile_cols;
    run(job, item, scratch);
  }
}

extern const Kernels kernels;
const Kernels kernels = {SMART_NAME, kWidth,           SMART_MAX_TILE, Choice::kAuto, run_items, run_depthwise,
                         kOuts,      winograd_weights, winograd_tiles, interleave,    separate,  affine,
                         add,        activate,         multiply,       max_pool,      average};

}  // namespace smart::cpu::SMART_ISA
