// y = activation(convolution(x, W) + bias) with W in panel form (core/conv_shape.h): torch-free interface.
//
// Layout  The product of linear.h, where a row of x is what one pixel of the output sees: for every tap the channels of
//         one place of the image. Tiles of such rows are packed just before they are used, from one pointer per row, a
//         block of steps at a time; the image is never unfolded as a whole. What lies outside of it is zeros.
// Launch  conv_block for every block, in parallel. An output is summed in one order that depends on shapes and
//         instruction set only.
#pragma once

#include <cstdint>

#include "../../core/conv_shape.h"
#include "linear.h"

namespace nms {

struct ConvProblem {
  const LinearKernels* kernels;
  PanelLayout layout;  // of rows of taps * tap_inputs
  const void* values;
  const uint32_t* indices;
  ConvShape shape;
  int64_t groups;           // if several, each has whole panels
  int64_t inputs, outputs;  // inputs of a group, outputs of all groups
  const void* x;            // [batch, places..., groups * inputs]
  int64_t x_image;          // strides in elements; that of channels is 1
  int64_t x_place[kMaxConvDims];
  const void* bias;  // [outputs] or null
  void* y;           // [batch, places..., outputs], contiguous
  int element_size;
  Activation activation;
  int64_t block_tiles;  // of a block: as many as give full tiles, at most
  int64_t block_panels;
  int64_t block_steps;  // that are packed at once
};

// Sizes of blocks; `threads` only decides how much work one block is.
void choose_conv_blocks(ConvProblem& problem, int64_t threads);
int64_t conv_block_count(const ConvProblem& problem);
int64_t conv_block_bytes(const ConvProblem& problem);  // of working memory

// One block; index in [0, conv_block_count), memory [conv_block_bytes] of any content, aligned to 64 bytes.
void conv_block(const ConvProblem& problem, int64_t index, void* memory);

}  // namespace nms
