// y = activation(x W^T + bias) with W in panel form (core/panel_layout.h): torch-free interface.
//
// Layout  The batch is cut into tiles of 1, 4, 8 or 16 rows of x. A tile of x is packed as
//         [steps, rows of the tile, 16 inputs per window], so that a kernel reads one stream of x; windows that cover
//         fewer than 16 inputs, the end of k and the tile's missing rows are filled with zeros. The packed x has the
//         type that the kernels compute in.
// Launch  choose_blocks, then multiply_blocks for all blocks, in parallel if one likes. An output is summed in one
// order
//         that depends on shapes and instruction set only.
//
// Every thread packs what it reads of x by itself: lines that another core has just written cost more than to copy them
// once more. One tile is packed whole, before the thread's first block; of several tiles a block packs the stretch that
// it is about to use, which then lies in the first cache.
#pragma once

#include <cstdint>

#include "../../core/activation.h"
#include "../../core/dtype.h"
#include "../../core/panel_layout.h"

namespace nms {

constexpr int kMaxTileRows = 16;
constexpr int kMaxBlockPanels = 32;

struct StoreSums;

// A tile's rows of x times some panels, over some steps; the sums are continued.
struct LinearTile {
  const void* values;       // [panels, ...]: at the first step
  int64_t values_panel;     // bytes between panels
  const uint32_t* indices;  // [panels, ...]: at the word of the first step's first field
  int first_field;          // its place in that word
  int64_t indices_panel;    // words between panels
  const void* x;            // [steps, tile rows, inputs of a step]
  const void* early;        // the values to be used next, to be fetched meanwhile; of as many panels and steps
  int64_t steps;            // a multiple of the layout's unroll
  void* sums;               // [panels, tile rows, 16] float; double for float64, int32_t for int8
  const PanelLayout* layout;
  bool from_zero = false;  // sums are not continued but begun: their memory may hold anything
  // For kernels of placed steps: bytes from x to the first row of each step [steps], and from one row to the next.
  const int32_t* x_steps = nullptr;
  int64_t x_row = 0;
  // Kernels of decoded indices: bytes from what is fetched for a panel to the next's, and from one step to the next.
  int64_t early_panel = 0, early_step = 0;
  // Kernels of decoded indices: if given, the sums do not go to memory but from registers to the outputs: of all rows
  // and of whole panels side by side, without a residual, Activation::kNone or kRelu. Sums and rows of it are not read.
  const StoreSums* outputs = nullptr;
};
using LinearTileFn = void (*)(const LinearTile&);

struct LinearTileKernel {
  LinearTileFn run;
  int panels;  // how many it takes at once
};

// Rows of x to a packed tile; see above.
struct PackInput {
  const void* x;       // [rows, k]
  int64_t x_row, x_k;  // strides in elements
  int64_t rows, k;     // rows <= tile_rows
  int tile_rows;
  int64_t first_step, last_step;  // the part to pack
  void* packed;                   // [last_step - first_step, tile_rows, inputs of a step]
  const PanelLayout* layout;
};
using PackInputFn = void (*)(const PackInput&);

// Some steps of rows that lie anywhere, row by row.
struct PackRows {
  const void* const* rows;  // [count]: k inputs each, next to each other; null is a row of zeros
  int64_t k, count;
  int64_t first_step, last_step;
  void* packed;        // [count, last_step - first_step, inputs of a step]
  int64_t packed_row;  // bytes between rows
  const PanelLayout* layout;
};
using PackRowsFn = void (*)(const PackRows&);

// What sums of int8 products stand for (core/quantize.h); nothing for other weights.
struct Int8Operands {
  const float* x_scales = nullptr;       // [rows of x]
  const float* weight_scales = nullptr;  // [panels, 16]
  const int32_t* weight_sums = nullptr;  // [panels, 16]: of a row's values
};

// Sums of one panel to rows of y.
struct StoreSums {
  const void* sums;                // [tile rows, 16]
  const void* bias;                // at the panel's first row; or null
  const void* residual = nullptr;  // added to the sums: lies as y does
  void* y;                         // [rows, y_row], at the panel's first output
  int64_t y_row;                   // elements
  int64_t rows;                    // of the tile
  int outputs;                     // <= 16
  Activation activation;
  Int8Operands int8;  // at the tile's first row and at the panel
};
using StoreSumsFn = void (*)(const StoreSums&);

// Everything that an instruction set brings for one element type.
struct LinearKernels {
  int input_bytes;  // of an element of packed x
  int (*max_tile_rows)(const PanelLayout& layout);
  // The kernel for tiles of exactly `tile_rows` rows (1, 4, 8 or 16) that takes most panels, but at most `panels`.
  LinearTileKernel (*tile)(const PanelLayout& layout, int tile_rows, int64_t panels);
  PackInputFn pack_input;
  PackRowsFn pack_rows;
  StoreSumsFn store;
};

// By DType; those that are not computed with (int8, float8) have null entries.
struct LinearTable {
  LinearKernels of[kNumDTypes] = {};
};
LinearTable scalar_linear();
void use_avx2_linear(LinearTable& table);  // x86-64 only: replaces what is faster
void use_avx512_linear(LinearTable& table);
void use_avx512_bf16_linear(LinearTable& table);

// The whole product, as its parts see it.
struct LinearProblem {
  const LinearKernels* kernels;
  PanelLayout layout;
  const void* values;
  const uint32_t* indices;
  int64_t rows, panels;  // outputs
  int64_t batch, k;
  const void* x;       // [batch, k]
  int64_t x_row, x_k;  // strides in elements
  const void* bias;    // [rows] or null
  void* y;             // [batch, rows]
  int element_size;    // of x, bias and y, and of values unless they are int8
  Activation activation;
  Int8Operands int8 = {};
  const void* packed_x = nullptr;  // all tiles of x, if they were packed beforehand
  // From choose_blocks:
  int64_t block_panels;  // of a block
  int64_t block_tiles;
  bool weights_again;   // which of two is read once for every block of the other: the weights, or else x
  int64_t block_steps;  // steps after which the next panel has its turn, so that what all need stays in the caches

  int value_size() const { return int8.weight_scales ? 1 : element_size; }
};

// Cuts a batch into tiles.
class BatchTiles {
 public:
  BatchTiles(int64_t batch, int max_tile_rows);

  int64_t count() const { return count_; }
  int64_t first_row(int64_t tile) const { return tile * max_rows_; }
  int64_t rows(int64_t tile) const { return tile + 1 < count_ ? max_rows_ : batch_ - first_row(tile); }
  int tile_rows(int64_t tile) const { return tile + 1 < count_ ? max_rows_ : last_tile_rows_; }  // with filling

 private:
  int64_t batch_, count_;
  int max_rows_, last_tile_rows_;
};

int64_t packed_row_bytes(const LinearProblem& problem);  // of x, per row of a tile

// Sizes of blocks for a batch; `threads` only decides how much work one block is.
void choose_blocks(LinearProblem& problem, int64_t threads);
int64_t block_count(const LinearProblem& problem);

// Memory that a thread needs for its blocks.
int64_t block_memory(const LinearProblem& problem);

// Blocks [first, last) of panels times tiles, out of block_count. memory [block_memory]: of any content, aligned as
// vectors are.
void multiply_blocks(const LinearProblem& problem, int64_t first, int64_t last, void* memory);

}  // namespace nms
