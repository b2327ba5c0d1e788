// The geometry of a convolution, and how its weight lies in panels (core/panel_layout.h).
//
// Layout  Images are [batch, places..., channels], channels next to each other; 1 to 3 dims of places, always counted
// as
//         3, missing ones of size 1. The weight is [outputs, taps, inputs], a tap being a place of the kernel: one row
//         per output, along which each tap covers tap_inputs() weights. These are the group's inputs, filled up so that
//         no window holds weights of two taps: then every window of x is a piece of one place's channels.
#pragma once

#include <cstdint>

#include "packed.h"
#include "panel_layout.h"

namespace nms {

constexpr int kMaxConvDims = 3;

struct ConvShape {
  int64_t batch;
  int64_t in[kMaxConvDims], out[kMaxConvDims], kernel[kMaxConvDims];
  int64_t stride[kMaxConvDims], dilation[kMaxConvDims];
  int64_t padding[kMaxConvDims];  // before the first place

  NMS_HD int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  NMS_HD int64_t pixels() const { return batch * out[0] * out[1] * out[2]; }  // of the output
};

// Places of the output along one dim; not positive where the kernel does not fit.
NMS_HD int64_t conv_output_size(int64_t in, int64_t kernel, int64_t stride, int64_t dilation, int64_t padding_before,
                                int64_t padding_after) {
  const int64_t room = in + padding_before + padding_after - (dilation * (kernel - 1) + 1);
  return room < 0 ? 0 : room / stride + 1;
}

// Weights of a row that one tap takes: whole steps, of which the indices are whole bytes. A single tap needs no
// filling.
NMS_HD int64_t tap_inputs(int n, int m, int64_t inputs, int64_t taps, bool paired) {
  if (taps == 1) return inputs;
  const int64_t step = panel_layout(n, m, 0, paired ? DType::kBFloat16 : DType::kFloat32).step_inputs();
  int64_t unit = step;
  while (unit / m * packed_format(n, m).group_bits % 8 != 0) unit += step;
  return (inputs + unit - 1) / unit * unit;
}

}  // namespace nms
