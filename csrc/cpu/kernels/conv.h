// y = activation(convolution(x, W) + bias) with W in panel form (core/conv_shape.h): torch-free interface.
//
// Layout  The product of linear.h, where a row of x is what one pixel of the output sees: for every tap the channels of
//         one place of the image. The image is never unfolded. A block packs what its pixels see in one of two ways:
//
//         by lines   Every line of the image (its last dim) that the block needs is packed once, place by place, with
//                    zeros around it. Neighbouring places are neighbouring rows, so a tile of pixels side by side finds
//                    its rows for every tap in the same lines, a few places further. With a stride s, lines are packed
//                    as s lines of every s-th place. Lines of the kernel that lie outside of the image are left out.
//         by tiles   Tiles of any pixels are packed row by row, a block of steps at a time: for 1x1 kernels, short
//                    lines, and whatever is too large for the other way. Where the rows of x are what kernels read,
//                    they are left in place.
//
//         Either way a kernel is told where the rows of each step lie. What lies outside of the image is zeros.
// Launch  conv_block for every block, in parallel. An output is summed in one order that depends on shapes and
//         instruction set only.
#pragma once

#include <cstdint>

#include "../../core/conv_shape.h"
#include "linear.h"

namespace nms {

// The kernel of placed steps (see linear_tile.h) for tiles of `tile_rows` rows that takes most panels, but at most
// `panels`; null if there is none for so many rows. All sum in the same order.
using ConvTileFn = LinearTileKernel (*)(const PanelLayout& layout, int tile_rows, int64_t panels);

// How kernels want the indices of `slots` slots, from words that begin with the first and end with the last one.
struct DecodedIndices {
  void (*decode)(const uint32_t* words, int64_t slots, void* decoded) = nullptr;  // null: they read the words
  int slot_bytes = 0;
};

struct ConvKernels {
  ConvTileFn tile;
  DecodedIndices (*indices)(const PanelLayout& layout);
};

struct ConvTable {
  ConvKernels of[kNumDTypes] = {};  // null as in LinearTable
};
ConvTable scalar_conv();
void use_avx2_conv(ConvTable& table);  // x86-64 only: replaces what is faster
void use_avx512_conv(ConvTable& table);
void use_avx512_bf16_conv(ConvTable& table);

struct ConvProblem {
  const LinearKernels* kernels;
  ConvTileFn tile;
  DecodedIndices decoded;
  PanelLayout layout;  // of rows of taps * tap_inputs
  const void* values;
  const uint32_t* indices;
  ConvShape shape;
  int64_t groups;           // if several, each has whole panels
  int64_t inputs, outputs;  // inputs of a group, outputs of all groups
  const void* x;            // [batch, places..., groups * inputs]
  int64_t x_image;          // strides in elements; that of channels is 1
  int64_t x_place[kMaxConvDims];
  const void* bias;                // [outputs] or null
  const void* residual = nullptr;  // added before the activation: lies as y does
  void* y;                         // [batch, places..., outputs], contiguous
  int element_size;
  Activation activation;
  // From choose_conv_blocks:
  bool by_lines;
  bool in_place;         // rows of x are read where they lie
  bool tiles_first;      // by tiles: all panels take a tile before the next one comes
  int64_t block_pixels;  // of a block: lines of one plane, or any
  int64_t block_panels;
  int64_t block_steps;  // after which the next panel has its turn
};

// Sizes of blocks; `threads` only decides how much work one block is.
void choose_conv_blocks(ConvProblem& problem, int64_t threads);
int64_t conv_block_count(const ConvProblem& problem);
int64_t conv_block_memory(const ConvProblem& problem);  // bytes that a thread needs for its blocks

// One block; index in [0, conv_block_count), memory [conv_block_memory] of any content, aligned as vectors are.
void conv_block(const ConvProblem& problem, int64_t index, void* memory);

}  // namespace nms
