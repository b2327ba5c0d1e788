// What the parts of the packed convolution have in common: geometry, blocks, and the memory that a block needs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "conv.h"
#include "conv_tiles.h"

namespace nms {

constexpr int kLastDim = kMaxConvDims - 1;  // that of lines
constexpr int64_t kCacheLine = 64;
constexpr int64_t kMaxPanelsAtOnce = 2;  // that a kernel takes

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t aligned(int64_t bytes) { return ceil_div(bytes, kCacheLine) * kCacheLine; }

inline int64_t sum_size(const ConvProblem& p) {
  return p.element_size == int{sizeof(double)} ? int64_t{sizeof(double)} : int64_t{sizeof(float)};
}
inline int64_t step_bytes(const ConvProblem& p) {  // of one row of packed x
  return p.layout.halves * kWindowInputs * p.kernels->input_bytes;
}
// Rows of so many steps begin at an odd number of cache lines from each other: then they fall into different parts of
// a cache.
inline int64_t row_bytes(const ConvProblem& p, int64_t steps) {
  const int64_t lines = ceil_div(steps * step_bytes(p), kCacheLine);
  return (lines + (lines % 2 == 0)) * kCacheLine;
}
inline int64_t group_panels(const ConvProblem& p) { return panel_count(p.outputs / p.groups); }
inline int64_t panel_blocks(const ConvProblem& p) { return ceil_div(group_panels(p), p.block_panels); }

// Steps that each tap takes; the last ones of a panel, that fill up a word, belong to none.
inline int64_t tap_steps(const ConvProblem& p) {
  const int64_t taps = p.shape.taps();
  if (taps == 1) return p.layout.steps;
  return tap_inputs(p.layout.n, p.layout.m, p.inputs, taps, p.layout.halves > 1) / p.layout.step_inputs();
}

// A place of the kernel, in places of the image from the first one.
struct Tap {
  Tap(const ConvShape& shape, int64_t tap) {
    for (int d = kLastDim; d >= 0; --d) {
      shift[d] = tap % shape.kernel[d] * shape.dilation[d];
      tap /= shape.kernel[d];
    }
  }
  int64_t shift[kMaxConvDims];
};

// A place of the output.
struct Pixel {
  Pixel(const ConvShape& shape, int64_t pixel) {
    for (int d = kLastDim; d >= 0; --d) {
      at[d] = pixel % shape.out[d];
      pixel /= shape.out[d];
    }
    image = pixel;
  }
  void next(const ConvShape& shape) {
    for (int d = kLastDim; d >= 0; --d) {
      if (++at[d] < shape.out[d]) return;
      at[d] = 0;
    }
    ++image;
  }
  int64_t at[kMaxConvDims], image;
};

// The packed lines of a block of output lines: [planes of the kernel, lines, phases, places, steps of a tap].
struct Lines {
  Lines(const ConvProblem& p, int64_t rows, int64_t output_lines) {
    const ConvShape& shape = p.shape;
    phases = shape.stride[kLastDim];
    places = rows + (shape.kernel[kLastDim] - 1) * shape.dilation[kLastDim] / phases;
    steps = tap_steps(p);
    fills = p.layout.steps > shape.taps() * steps;
    place_bytes = row_bytes(p, steps + fills);
    count = (output_lines - 1) * shape.stride[1] + (shape.kernel[1] - 1) * shape.dilation[1] + 1;
  }

  int64_t bytes(const ConvProblem& p) const { return p.shape.kernel[0] * count * line_bytes(); }
  int64_t line_bytes() const { return phases * phase_bytes(); }
  int64_t phase_bytes() const { return places * place_bytes; }

  // From a pixel's first place to what it sees in a step.
  int64_t offset(const ConvProblem& p, int64_t step) const {
    const int64_t of_tap = step / steps;
    if (of_tap >= p.shape.taps()) return steps * step_bytes(p);
    const Tap tap(p.shape, of_tap);
    const int64_t line = tap.shift[0] / p.shape.dilation[0] * count + tap.shift[1];
    const int64_t x = tap.shift[kLastDim];
    return line * line_bytes() + x % phases * phase_bytes() + x / phases * place_bytes + step % steps * step_bytes(p);
  }

  int64_t phases, places, steps;
  bool fills;           // whether there are steps that belong to no tap: they find zeros behind those of each place
  int64_t place_bytes;  // between places
  int64_t count;        // for each plane of the kernel
};

inline int64_t planes(const ConvProblem& p) { return p.shape.batch * p.shape.out[0]; }
inline int64_t block_lines(const ConvProblem& p) { return p.block_pixels / p.shape.out[kLastDim]; }
inline int64_t plane_blocks(const ConvProblem& p) { return ceil_div(p.shape.out[1], block_lines(p)); }
inline int64_t pixel_blocks(const ConvProblem& p) {
  return p.by_lines ? planes(p) * plane_blocks(p) : ceil_div(p.shape.pixels(), p.block_pixels);
}

// Whether pixels side by side are rows of x as kernels read them: then tiles are not packed, but for a last one that
// has more rows than pixels.
inline bool reads_in_place(const ConvProblem& p, int64_t tile_rows) {
  const ConvShape& shape = p.shape;
  // Rows that fall into the same part of the first cache would push each other out of it.
  constexpr int64_t kPart = 4096, kWays = 8;
  const int64_t row = std::gcd(p.x_place[kLastDim] * p.element_size, kPart);
  if (tile_rows > kWays * (kPart / row)) return false;
  if (shape.taps() > 1 || p.layout.window != kWindowInputs || p.kernels->input_bytes != p.element_size) return false;
  if (p.layout.steps * p.layout.step_inputs() != p.inputs) return false;
  int64_t places = 1;
  for (int d = kLastDim; d >= 0; --d) {
    if (shape.stride[d] != 1 || shape.out[d] != shape.in[d] || shape.padding[d] != 0) return false;
    if (shape.in[d] > 1 && p.x_place[d] != places * p.x_place[kLastDim]) return false;
    places *= shape.in[d];
  }
  return shape.batch == 1 || p.x_image == places * p.x_place[kLastDim];
}

// Parts of a thread's memory, in bytes from its start.
struct ConvMemory {
  explicit ConvMemory(const ConvProblem& p) {
    // By tiles, the last block has other pixels, and other tiles, than the first.
    int64_t pointers = kMaxTileRows, rows = p.block_pixels + kMaxTileRows;
    int64_t x_bytes = (p.in_place || p.tiles_first ? kMaxTileRows : rows) * row_bytes(p, p.block_steps);
    if (p.by_lines) {
      const TileSplit split(p, p.shape.out[kLastDim]);
      const Lines lines(p, split.total_rows(), block_lines(p));
      x_bytes = lines.bytes(p);
      pointers = lines.places;
      rows = split.total_rows() * block_lines(p);
    }
    indices = aligned(x_bytes);
    const int64_t decoded = p.tiles_first ? std::max(kMaxPanelsAtOnce, p.block_panels) : kMaxPanelsAtOnce;
    sums = indices + aligned(decoded * p.block_steps * p.layout.slots * p.decoded.slot_bytes);
    steps = sums + aligned(rows * p.block_panels * kPanelRows * sum_size(p));
    rows_of_x = steps + aligned(p.layout.steps * static_cast<int64_t>(sizeof(int32_t)));
    end = rows_of_x + aligned(pointers * static_cast<int64_t>(sizeof(void*)));
  }
  int64_t indices, sums, steps, rows_of_x, end;  // x comes first
};

}  // namespace nms
