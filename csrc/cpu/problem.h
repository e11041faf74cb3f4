// The problem a CPU kernel solves, as plain data: shared by every instruction set, so no code lives here
// that the compiler could emit with instructions the machine lacks.
#pragma once

#include <cstdint>

namespace smart::cpu {

// One convolution: x (batch, in_channels, height, width) -> y (batch, out_channels, out_height, out_width), both NCHW;
// or, if interleaved, (batch / lanes, channels, rows, columns, lanes) with the vector width as lanes: a vector then is
// one pixel of `lanes` images.
struct Problem {
  int64_t interleaved;  // a truth; as wide as the rest, so that problems can be compared byte by byte
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
  const void* values;       // (nnz,) float, or the upper halves of floats if half_values
  const void* codes;        // (nnz,) uint8_t, or int16_t if wide_codes: (channel in slab * R + r) * S + s
  const int32_t* segments;  // (slabs * K * 3 + 1,) offsets into values
  bool half_values, wide_codes;
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

// Functions of single numbers, as torch.nn.functional has them.
enum class Function { kRelu6, kSilu, kSigmoid, kHardswish, kHardsigmoid };
constexpr int kFunctions = 5;

// y = function(relu(conv * scale + bias + residual)); a null pointer leaves its term out. ReLU6 is one of the
// functions, and beside ReLU it costs nothing to apply.
struct Epilogue {
  const float* scale;     // (K,)
  const float* bias;      // (K,)
  const float* residual;  // as y
  bool relu;
  Affine affine;
  bool relu6 = false;      // with `relu`
  bool activates = false;  // whether there is a function; then there is no second result
  Function function = Function::kRelu6;
};

// The epilogue of images that lie `numbers` of y further on.
static inline Epilogue advanced(Epilogue e, int64_t numbers) {
  if (e.residual) e.residual += numbers;
  if (e.affine.y) e.affine.y += numbers;
  return e;
}

// Outputs are computed in tiles whose sums stay in registers. What a tile reads of a slab of input channels is first
// gathered into a *panel*, small enough for the L1 cache, which every output channel then reads. In it a tap of an
// input channel is one constant offset, padding is zeros like any other pixels, and every vector a kernel loads is
// aligned: a load that straddles two cache lines costs as much as two.
//
// Image layout (lanes = vector width): a vector holds one pixel of `lanes` images; a tile is tile_rows x tile_cols
// output pixels. The panel has one plane for each stride phase that a tap uses, so that what a tap reads for
// neighbouring outputs are neighbours.
//
// Pixel layout (lanes = 1): a vector holds neighbouring outputs' pixels of one image. The panel has a plane for each
// tap column, shifted by it; tap rows share planes as far as their shifts differ by whole vectors. Either vectors begin
// anew with each row of the image, and a tile is tile_rows x tile_cols of them; or, for narrow images, they run on
// across the ends of rows (`flat`), and a tile is tile_cols successive ones.
struct Layout {
  int64_t lanes;
  bool flat;
  int64_t tile_rows, tile_cols;  // vectors
  int64_t grid_rows, grid_cols;  // all outputs of one channel, in vectors
  int64_t rows, pitch;           // of one plane, in vectors; in pixel layout pitch alone
  int64_t row_stride;            // floats from a tile's row to the next, in the panel
  int64_t channel;               // floats of one channel in the panel
};

// One plane of the panel. For output (p, q) of the tile it holds pixel (p * stride_h + row, q * stride_w + column) of
// the padded input; successive outputs are neighbours.
struct Plane {
  int64_t row, column;
  int64_t start, length;  // floats, from the channel's beginning
};

// How a depthwise convolution reads its images where they lie: for the outputs of each vector and for each tap. A
// vector holds one pixel of `lanes` images, or neighbouring outputs of one image: along its rows, or where outputs and
// pixels lie alike across their ends.
struct Reads {
  int64_t tile, vectors;  // sums kept in registers, of at most kMostReads vectors; all vectors, a multiple of that
  const int32_t* from;    // (vectors,) floats from the channel's beginning; a tap reads `shifts` further on
  const int32_t* shifts;  // (R * S,)
  const int32_t* inside;  // (R * S, vectors) bits: lanes that lie in the image
  const int32_t* to;      // (vectors,) floats from the beginning of the channel's results
  const int32_t* count;   // (vectors,) results of each
  int64_t before, after;  // floats: all that is read lies in [-before, after) of the channel
};
constexpr int kMostReads = 8;

// How a convolution runs by Winograd's F(4x4, 3x3), which cpu/winograd.h explains.
struct Winograd {
  int64_t rows, cols;  // of the tiles that run together; 0: the convolution is direct
  int64_t vectors;     // at most three, that hold them
};

// One convolution, ready to run.
struct Job {
  Problem problem;
  Weight weight;
  Epilogue epilogue;
  Layout layout;
  const Plane* planes;
  int64_t plane_count;
  const int32_t* offsets;  // float offset of each code in the panel
  bool linear;             // each is the code times the floats of a tile
  bool depthwise;          // by `reads`, without a panel
  Reads reads;
  int64_t slab_floats;  // of one slab in the panel
  int64_t panel_slabs;  // slabs that the panel holds at once
  const float* x;       // image layout: interleaved, whatever `problem` says
  const float* x_end;
  float* y;
  int64_t images;     // of the batch, starting at x and y
  int64_t out_chunk;  // output channels one work item computes
  Winograd winograd;
  const float* transformed;     // weights, as winograd_weights leaves them,
  int64_t first_out, last_out;  // of these output channels
};

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

static inline int64_t slabs(const Problem& p, const Weight& w) {
  return ceil_div(p.in_channels / p.groups, w.slab_channels);
}

static inline int64_t tiles(const Layout& l) {
  return ceil_div(l.grid_rows, l.tile_rows) * ceil_div(l.grid_cols, l.tile_cols);
}

static inline int64_t chunks(const Job& job) {
  return ceil_div(job.problem.out_channels / job.problem.groups, job.out_chunk);
}

static inline int64_t blocks(const Job& job) { return ceil_div(job.images, job.layout.lanes); }

// Work items are numbered block of images first, then group, then chunk of output channels, then tile.
static inline int64_t work_items(const Job& job) {
  return blocks(job) * job.problem.groups * chunks(job) * tiles(job.layout);
}

// Floats of scratch memory that running items takes: the panel, then the sums of a chunk, parked between slabs.
static inline int64_t panel_floats(const Job& job) { return job.panel_slabs * job.slab_floats; }
static inline int64_t parked_floats(const Job& job, int64_t width) {
  return job.out_chunk * job.layout.tile_rows * job.layout.tile_cols * width;
}

// Floats of one point in scratch memory: a vector more than its `count`, as lines a power of two apart evict each
// other.
static inline int64_t winograd_point_floats(int64_t count, int64_t width) {
  return (ceil_div(count, width) + 1) * width;
}

// Floats of one plane of transformed rows: a row of tiles more than the block has, and what its last vector spans.
static inline int64_t winograd_plane_floats(const Winograd& w, int64_t width) {
  return ceil_div((w.rows + 1) * w.cols, width) * width + width;
}

// Floats of scratch memory that running blocks of tiles takes: points, sums, then transformed rows, or rows of outputs.
static inline int64_t winograd_floats(const Job& job, int64_t width, int64_t outs) {
  const Winograd& w = job.winograd;
  const int64_t points = 36 * winograd_point_floats(job.problem.in_channels * w.vectors * width, width);
  const int64_t rows = 24 * winograd_plane_floats(w, width) + (ceil_div(w.cols, width) * 4 + 1) * width;
  return points + outs * 36 * w.vectors * width + max(rows, 16 * w.vectors * width);
}

// Blocks of tiles, block of images by block of images.
static inline int64_t winograd_blocks(const Job& job) {
  const Winograd& w = job.winograd;
  return blocks(job) * ceil_div(ceil_div(job.problem.out_height, 4), w.rows) *
         ceil_div(ceil_div(job.problem.out_width, 4), w.cols);
}

// Whether convolutions run by Winograd's algorithm: where it is faster, or wherever it can, or not at all, for tests.
enum class Choice { kAuto, kAlways, kNever };

// What one instruction set offers.
struct Kernels {
  const char* name;
  int64_t width;     // floats a vector
  int64_t max_tile;  // vectors whose sums fit the registers
  Choice winograd;
  // `scratch` starts on a cache line.
  void (*run_items)(const Job&, int64_t first, int64_t last, float* scratch);
  void (*run_depthwise)(const Job&, int64_t first, int64_t last, float* scratch);  // cpu/depthwise.h
  int64_t winograd_outs;  // output channels of one block of transformed weights
  // These two are described in cpu/winograd.h.
  void (*winograd_weights)(const Job&, int64_t first, int64_t last, float* scratch, float* to);
  bool (*winograd_tiles)(const Job&, int64_t first, int64_t last, float* scratch);
  // The others are described in cpu/pointwise.h.
  void (*interleave)(const float* x, int64_t channels, int64_t pixels, int64_t images, float* to, int64_t first,
                     int64_t last);
  void (*separate)(const float* x, int64_t channels, int64_t pixels, int64_t images, float* to, int64_t first,
                   int64_t last);
  void (*affine)(const Affine&, const float* x, int64_t channels, int64_t floats, float* y);
  void (*add)(const float* x, const float* other, bool rectify, int64_t floats, float* y);
  void (*activate)(Function, const float* x, int64_t floats, float* y);
  // `other`: as x, or if `is_gate` one number for each channel and lane.
  void (*multiply)(const float* x, const float* other, bool is_gate, int64_t channels, int64_t pixels, int64_t lanes,
                   float* y);
  void (*max_pool)(const Problem&, int64_t lanes, const float* x, float* y);
  void (*average)(const float* x, int64_t channels, int64_t pixels, int64_t lanes, float* y);
};

}  // namespace smart::cpu
