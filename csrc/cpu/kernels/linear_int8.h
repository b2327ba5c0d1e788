// The packed product in integers: torch-free interface. Everything else is as in linear.h.
//
// What    y = activation(sums * scales + bias): x is quantized row by row while it is packed (core/quantize.h), the
//         weight was before, products are summed in 32-bit integers. Integers are exact: every instruction set gives
//         the same sums.
// Layout  Packed x holds one byte an input: the integer itself or, for processors that multiply unsigned with signed
//         bytes, 128 more. What the 128 add to a sum follows from the row of the weight alone: 128 times the sum of its
//         values, which `store` takes off again.
// Launch  quantize for every row of every tile, then the blocks of linear.h.
#pragma once

#include <cstdint>

#include "linear.h"

namespace nms {

// One row of x to its place in a packed tile.
struct QuantizeRow {
  const void* x;  // [k]
  int64_t x_k;    // stride in elements
  int64_t k;      // 0 for a row that only fills the tile
  int row, tile_rows;
  void* packed;  // the tile
  float* scale;  // of this row
  const PanelLayout* layout;
};
using QuantizeRowFn = void (*)(const QuantizeRow&);

struct Int8Kernels {
  LinearKernels linear;  // without pack_input
  QuantizeRowFn quantize;
};

// By the DType of x and y; those that are not computed with have null entries.
struct Int8Table {
  Int8Kernels of[kNumDTypes] = {};
};
Int8Table scalar_int8();
void use_avx2_int8(Int8Table& table);  // x86-64 only: replaces what is faster
void use_vnni_int8(Int8Table& table);  // AVX-512 with VNNI and VBMI

}  // namespace nms
