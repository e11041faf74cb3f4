// The problem a CPU kernel solves, as plain data: shared by every instruction set, so no code lives here
// that the compiler could emit with instructions the machine lacks.
#pragma once

#include <cstdint>

namespace smart::cpu {

// One convolution: x (batch, in_channels, height, width) -> y (batch, out_channels, out_height, out_width), both NCHW;
// or, if interleaved, (batch / lanes, channels, rows, columns, lanes) with the vector width as lanes: the image layout
// below, kept from one convolution to the next.
struct Problem {
  bool interleaved;
  int64_t batch, in_channels, height, width;
  int64_t out_channels, out_height, out_width;
  int64_t kernel_h, kernel_w;
  int64_t stride_h, stride_w;
  int64_t pad_top, pad_left;
  int64_t dilation_h, dilation_w;
  int64_t groups;
};

// How the non-zeros are stored; written by smart_kernels/packing/unstructured.py, which explains the order.
// Row (slab, k) of the stream holds the non-zeros of output channel k over the slab's input channels, in three
// segments: first path only, both paths, second path only. A path is therefore one contiguous run of segments.
struct Weight {
  const float* values;      // (nnz,)
  const void* codes;        // (nnz,) uint8_t, or int16_t if wide_codes: (channel in slab * R + r) * S + s
  const int32_t* segments;  // (slabs * K * 3 + 1,) offsets into values
  bool wide_codes;
  int64_t slab_channels;
  int64_t first_segment, last_segment;  // the path: segments [first, last) of each row
};

// A second result, made of y while it is in registers and caches: relu(y * scale + bias). Pre-activation networks read
// both a sum and its normalised, rectified copy.
struct Affine {
  const float* scale;  // (K,)
  const float* bias;   // (K,)
  bool relu;
  float* y;  // as the first y; null: there is no second result
};

// y = relu(conv * scale + bias + residual); a null pointer leaves its term out.
struct Epilogue {
  const float* scale;     // (K,)
  const float* bias;      // (K,)
  const float* residual;  // as y
  bool relu;
  Affine affine;
};

// The epilogue of images that lie `numbers` of y further on.
static inline Epilogue advanced(Epilogue e, int64_t numbers) {
  if (e.residual) e.residual += numbers;
  if (e.affine.y) e.affine.y += numbers;
  return e;
}

// How a block of images lies in the workspace while it is convolved. In both layouts a tap of an input channel is one
// constant offset for all outputs, and every vector a kernel reads is aligned: a vector that straddles two cache lines
// costs as much as four that do not.
//
// Image layout (lanes = vector width): `lanes` images are interleaved, a vector holds one pixel of each. The padded
// image is split by stride phase, so that the pixels a tap reads for successive outputs are neighbours.
//
// Pixel layout (lanes = 1): a vector holds successive outputs' pixels of one image, running on across the ends of rows.
// There is one copy of the image for each tap column, shifted by it and cut to the output's columns. Tap rows share
// copies as far as their shift is a whole number of vectors; see row_copy().
struct Layout {
  int64_t lanes;
  int64_t phases_h, phases_w;  // image layout: stride phases stored
  int64_t row_copies;          // pixel layout: copies for each tap column
  int64_t rows, pitch;         // of one plane: a phase, or a copy
  int64_t plane, channel;      // floats of one plane, of one channel
  int64_t workspace;           // floats of all channels, and the slack that the last tile may read
  // Outputs of one channel, as a grid of vectors, `row_stride` floats apart in the workspace; its tiles stay in
  // registers.
  int64_t grid_rows, grid_cols, row_stride;
  int64_t tile_rows, tile_cols;
};

// One block of images, ready to run.
struct Block {
  Problem problem;
  Weight weight;
  Epilogue epilogue;
  Layout layout;
  const float* x;  // first image of the block
  float* y;        // likewise
  float* workspace;
  const int32_t* offsets;  // float offset of each code within a slab
  int64_t images;          // at most layout.lanes
  int64_t out_chunk;       // output channels one work item computes
};

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// Tap row r reads, for output row p, row p + row_shift(r) of the rows of stride phase row_phase(r).
static inline int64_t row_phase(const Problem& p, int64_t r) { return r * p.dilation_h % p.stride_h; }
static inline int64_t row_shift(const Problem& p, int64_t r) { return r * p.dilation_h / p.stride_h; }

// Pixel layout: floats by which tap row r's shift exceeds whole vectors. Its copy is stored that much earlier.
static inline int64_t misalignment(const Problem& p, int64_t r, int64_t width) {
  return row_shift(p, r) * p.out_width % width;
}

// Pixel layout: the first tap row that reads the same copy as tap row r.
static inline int64_t row_copy(const Problem& p, int64_t r, int64_t width) {
  int64_t first = 0;
  while (row_phase(p, first) != row_phase(p, r) || misalignment(p, first, width) != misalignment(p, r, width)) ++first;
  return first;
}

// Pixel layout: where tap row r's copy begins in its plane. The plane opens with one vector that takes what a
// misaligned copy pushes out in front.
static inline int64_t plane_start(const Problem& p, int64_t r, int64_t width) {
  return width - misalignment(p, r, width);
}

static inline int64_t slabs(const Problem& p, const Weight& w) {
  return ceil_div(p.in_channels / p.groups, w.slab_channels);
}

static inline int64_t tiles(const Layout& l) {
  return ceil_div(l.grid_rows, l.tile_rows) * ceil_div(l.grid_cols, l.tile_cols);
}

static inline int64_t chunks(const Block& b) {
  return ceil_div(b.problem.out_channels / b.problem.groups, b.out_chunk);
}

// Work items are numbered group-major, then chunk of output channels, then tile.
static inline int64_t work_items(const Block& b) { return b.problem.groups * chunks(b) * tiles(b.layout); }

// What one instruction set offers.
struct Kernels {
  const char* name;
  int64_t width;  // floats a vector
  void (*load_channels)(const Block&, int64_t first, int64_t last);
  void (*run_items)(const Block&, int64_t first, int64_t last);
};

constexpr int64_t kMaxOutChunk = 64;  // 64 output channels x 8 vectors parked between slabs: 32 KB with AVX-512

}  // namespace smart::cpu
