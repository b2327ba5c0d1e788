// How a packed convolution is cut into blocks.
#include <algorithm>
#include <cstdint>

#include "conv.h"
#include "conv_parts.h"
#include "conv_tiles.h"

namespace nms {
namespace {

constexpr int64_t kMaxPhases = 16;         // larger strides go by tiles
constexpr int64_t kLineBytes = 640 << 10;  // packed lines of a block
constexpr int64_t kSumBytes = 320 << 10;
constexpr int64_t kPanelBytes = 72 << 10;  // values and indices of the panels that a kernel takes at once
constexpr int64_t kTileBytes = 512 << 10;  // packed tiles of a block
constexpr int64_t kFewBytes = 64 << 10;    // values and indices of all panels that a tile meets before the next one

// Several blocks per thread, and the same number for each.
int64_t even_blocks(int64_t blocks, int64_t threads) {
  return blocks < 4 * threads ? ceil_div(blocks, threads) * threads : blocks;
}

// Few pixels are not divided among threads: then each reads some of the weights rather than all.
bool divides_panels(const ConvProblem& p, int64_t blocks, int64_t threads) {
  return blocks < threads && group_panels(p) >= 4 * threads;
}

int64_t panels_for(const ConvProblem& p, int64_t blocks, int64_t threads) {
  return blocks >= threads ? group_panels(p) : ceil_div(group_panels(p), ceil_div(threads, blocks));
}

// Lines of a block; 0 if even one takes too much memory.
int64_t fitting_lines(const ConvProblem& p, const TileSplit& split) {
  const int64_t sums = split.total_rows() * group_panels(p) * kPanelRows * sum_size(p);
  int64_t lines = std::clamp<int64_t>(kSumBytes / std::max<int64_t>(1, sums), 1, p.shape.out[1]);
  while (lines > 0 && Lines(p, split.total_rows(), lines).bytes(p) > kLineBytes) --lines;
  return lines;
}

// Which part of the lines that taps look at lies inside of the image.
double part_inside(const ConvShape& shape) {
  double part = 1;
  for (int d = 0; d < kLastDim; ++d) {
    int64_t inside = 0;
    for (int64_t at = 0; at < shape.out[d]; ++at)
      for (int64_t tap = 0; tap < shape.kernel[d]; ++tap) {
        const int64_t place = at * shape.stride[d] + tap * shape.dilation[d] - shape.padding[d];
        inside += 0 <= place && place < shape.in[d];
      }
    part *= static_cast<double>(inside) / static_cast<double>(shape.out[d] * shape.kernel[d]);
  }
  return part;
}

// Whether lines cost less than tiles of any pixels: fewer rows to pack, but tiles that end with the lines.
bool prefers_lines(const ConvProblem& p, const TileSplit& split, int64_t lines) {
  // What it takes to pack a row of a step, in halves of what a kernel takes for it.
  const double packing = 3.0 / static_cast<double>(std::max<int64_t>(1, group_panels(p) * p.layout.slots));
  const Lines packed(p, split.total_rows(), lines);
  const double pixels = static_cast<double>(lines * p.shape.out[kLastDim]), taps = static_cast<double>(p.shape.taps());
  const double rows_packed = static_cast<double>(p.shape.kernel[0] * packed.count * packed.phases * packed.places);
  const double by_lines =
      part_inside(p.shape) * static_cast<double>(lines * split.cost()) + packing * rows_packed / taps;
  const TileSplit all(p, p.shape.pixels());
  const double by_tiles =
      pixels * static_cast<double>(all.cost()) / static_cast<double>(p.shape.pixels()) + packing * pixels;
  return by_lines < by_tiles;
}

// What a kernel reads of a panel in a step.
int64_t panel_step_bytes(const ConvProblem& p) {
  return p.layout.slots * (p.layout.slot_values() * p.element_size + p.decoded.slot_bytes);
}

// As many steps as there is room for, in blocks alike.
int64_t steps_of_block(const ConvProblem& p, int64_t tile_rows) {
  const int64_t at_once = p.tile(p.layout, static_cast<int>(tile_rows), kMaxPanelsAtOnce).panels;
  const int64_t step = at_once * panel_step_bytes(p);
  const int64_t unroll = p.layout.unroll, most = std::max<int64_t>(1, kPanelBytes / step / unroll);
  const int64_t words = std::max<int64_t>(1, ceil_div(p.layout.steps, unroll));
  return ceil_div(words, ceil_div(words, most)) * unroll;
}

}  // namespace

void choose_conv_blocks(ConvProblem& p, int64_t threads) {
  const ConvShape& shape = p.shape;
  threads = std::max<int64_t>(1, threads);
  const TileSplit line(p, shape.out[kLastDim]);
  const int64_t lines = shape.taps() > 1 && shape.stride[kLastDim] <= kMaxPhases ? fitting_lines(p, line) : 0;
  p.by_lines = lines > 0 && prefers_lines(p, line, lines);
  const TileSplit all(p, shape.pixels());
  const int64_t tile_rows = p.by_lines ? line.rows(0) : all.rows(0);
  p.in_place = !p.by_lines && reads_in_place(p, tile_rows);
  p.block_steps = steps_of_block(p, tile_rows);
  if (p.by_lines) {
    const int64_t needed = planes(p) * ceil_div(shape.out[1], lines);
    const int64_t blocks = divides_panels(p, needed, threads) ? needed : even_blocks(needed, threads);
    const int64_t in_plane = std::min(ceil_div(blocks, planes(p)), shape.out[1]);
    p.block_pixels = ceil_div(shape.out[1], in_plane) * shape.out[kLastDim];
    p.block_panels = panels_for(p, planes(p) * ceil_div(shape.out[1], block_lines(p)), threads);
  } else {
    const int64_t sums = std::max<int64_t>(1, group_panels(p)) * kPanelRows * sum_size(p);
    const int64_t rows = std::min(kTileBytes / row_bytes(p, p.block_steps), kSumBytes / sums);
    const int64_t fitting = std::max<int64_t>(1, rows / tile_rows) * tile_rows;
    const int64_t pixels = shape.pixels();
    const int64_t needed = ceil_div(pixels, fitting);
    const int64_t blocks = divides_panels(p, needed, threads)
                               ? needed
                               : std::min(even_blocks(needed, threads), ceil_div(pixels, tile_rows));
    p.block_pixels = ceil_div(pixels, blocks);
    p.block_panels = panels_for(p, ceil_div(pixels, p.block_pixels), threads);
  }
  p.block_panels = std::max<int64_t>(1, p.block_panels);
  // With few inputs, a tile read again for each panel, and its outputs written a part at a time, would cost more.
  p.tiles_first = !p.by_lines && p.block_steps >= p.layout.steps &&
                  p.block_panels * p.layout.steps * panel_step_bytes(p) <= kFewBytes;
}

int64_t conv_block_count(const ConvProblem& p) { return pixel_blocks(p) * p.groups * panel_blocks(p); }

int64_t conv_block_memory(const ConvProblem& p) { return ConvMemory(p).end; }

}  // namespace nms
