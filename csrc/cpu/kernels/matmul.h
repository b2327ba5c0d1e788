// y = x W with W [rows, k] in panel form (core/panel_layout.h), x [batch, rows]: torch-free interface.
//
// What    The product along the other dim of W, which is what the gradient of a linear layer's input takes. The kept
//         weights of a row are spread over the outputs, so a block of W is made dense where it is used, in the first
//         cache, and multiplied at the dense rate: W itself is read once, packed.
// Layout  A block of W is [kBlockUnits, kTileStride] numbers: a unit is one row of W, or two rows side by side where
//         products are taken two at a time (bfloat16 with AVX-512 BF16). x is packed [block of rows, batch, units].
// Launch  pack_matmul_input for all blocks of rows, then multiply_strips for all strips, each in parallel if one likes:
//         a strip is some columns of y, summed by one thread over all rows in their order. An output depends on shapes
//         and instruction set only.
#pragma once

#include <cstdint>

#include "../../core/dtype.h"
#include "../../core/panel_layout.h"

namespace nms {

constexpr int kBlockUnits = 64;     // of a block of W that is dense at once
constexpr int kStripInputs = 64;    // columns of a strip, at most
constexpr int kTileStride = 80;     // windows of less than 16 inputs are written 16 wide
constexpr int kStripBatch = 256;    // rows of x that share a dense block
constexpr int kTileAlignment = 64;  // bytes

// Some steps of one panel as rows of a dense block.
struct DenseRows {
  const void* values;       // of the panel, at the first step
  const uint32_t* indices;  // of the panel
  int64_t first_step, steps;
  int64_t early_values, early_words;  // from what is read to what will be read soon: bytes, words
  void* rows;                         // [16 / rows of a unit, kTileStride]
  const PanelLayout* layout;
};
using DenseRowsFn = void (*)(const DenseRows&);

// sums[b, :] += x[b, :] W for a dense block.
struct BlockProduct {
  const void* x;  // [batch, kBlockUnits]
  int64_t batch;
  const void* block;  // [units, kTileStride]
  int64_t units;
  void* sums;  // [batch, kStripInputs] float; double for float64
};
using BlockProductFn = void (*)(const BlockProduct&);

// Some units of x, packed.
struct PackUnits {
  const void* x;  // at the first of them
  int64_t x_row, x_r;
  int64_t batch;
  int count;     // rows of W that there are
  void* packed;  // [batch, kBlockUnits]
};
using PackUnitsFn = void (*)(const PackUnits&);

// Sums to some columns of y.
struct StoreStrip {
  const void* sums;  // [batch, kStripInputs]
  int64_t batch;
  void* y;  // at the first column
  int64_t y_row;
  int columns;
};
using StoreStripFn = void (*)(const StoreStrip&);

// Everything that an instruction set brings for one element type.
struct MatmulKernels {
  int number_bytes;  // of a packed number of x, and of a unit of W
  int unit_rows;     // rows of W in a unit
  DenseRowsFn (*dense_rows)(const PanelLayout& layout);
  BlockProductFn product;
  PackUnitsFn pack;
  StoreStripFn store;
};

// By DType; those that are not computed with (int8, float8) have null entries.
struct MatmulTable {
  MatmulKernels of[kNumDTypes] = {};
};
MatmulTable scalar_matmul();
void use_avx2_matmul(MatmulTable& table);  // x86-64 only: replaces what is faster
void use_avx512_matmul(MatmulTable& table);
void use_avx512_bf16_matmul(MatmulTable& table);

struct MatmulProblem {
  const MatmulKernels* kernels;
  PanelLayout layout;
  const void* values;
  const uint32_t* indices;
  int64_t rows, k;  // of W
  int64_t batch;
  const void* x;       // [batch, rows]
  int64_t x_row, x_r;  // strides in elements
  void* y;             // [batch, k]
  int element_size;    // of x, y and values

  int64_t block_rows() const { return int64_t{kBlockUnits} * kernels->unit_rows; }  // rows of W in a dense block
  int64_t blocks() const { return (rows + block_rows() - 1) / block_rows(); }
  int64_t packed_block_bytes() const { return batch * kBlockUnits * kernels->number_bytes; }
  int64_t strip_steps() const { return kStripInputs / layout.step_inputs(); }
  int64_t strips() const;  // of columns, times parts of the batch
};

// Blocks of rows [first, last) of x to packed [blocks, packed_block_bytes].
void pack_matmul_input(const MatmulProblem& problem, int64_t first, int64_t last, void* packed);

// Memory that a thread needs for its strips.
int64_t strip_memory(const MatmulProblem& problem);

// Strips [first, last). memory [strip_memory]: of any content, aligned to kTileAlignment.
void multiply_strips(const MatmulProblem& problem, const void* packed, int64_t first, int64_t last, void* memory);

}  // namespace nms
