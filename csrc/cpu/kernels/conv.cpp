// The packed convolution of a block of panels with a block of pixels: the loops around the inner loop.
#include "conv.h"

#include <algorithm>
#include <cstring>

namespace nms {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t sum_size(const ConvProblem& p) {
  return p.element_size == int{sizeof(double)} ? int64_t{sizeof(double)} : int64_t{sizeof(float)};
}

int64_t step_bytes(const ConvProblem& p) {  // of one row of packed x
  return p.layout.halves * kWindowInputs * p.kernels->input_bytes;
}

int64_t max_tile_rows(const ConvProblem& p) { return p.kernels->max_tile_rows(p.layout); }
int64_t block_pixels(const ConvProblem& p) { return p.block_tiles * max_tile_rows(p); }
int64_t pixel_blocks(const ConvProblem& p) { return ceil_div(p.shape.pixels(), block_pixels(p)); }
int64_t group_panels(const ConvProblem& p) { return panel_count(p.outputs / p.groups); }
int64_t panel_blocks(const ConvProblem& p) { return ceil_div(group_panels(p), p.block_panels); }

int64_t packed_bytes(const ConvProblem& p) { return p.block_steps * max_tile_rows(p) * step_bytes(p); }

// Steps that each tap takes; the last ones of a panel, that fill up a word, belong to none.
int64_t tap_steps(const ConvProblem& p) {
  return p.shape.taps() == 1 ? p.layout.steps
                             : tap_inputs(p.layout.n, p.layout.m, p.inputs, p.shape.taps(), p.layout.halves > 1) /
                                   p.layout.step_inputs();
}

// What the rows of a tile see of the image.
class TileRows {
 public:
  TileRows(const ConvProblem& p, int64_t first_channel) : p_(p) {
    x_ = static_cast<const uint8_t*>(p.x) + first_channel * p.element_size;
  }

  // Rows for `count` pixels from `pixel` on.
  void move_to(int64_t pixel, int64_t count, int tile_rows) {
    const ConvShape& shape = p_.shape;
    count_ = count;
    tile_rows_ = tile_rows;
    int64_t at[kMaxConvDims], rest = pixel;
    for (int d = kMaxConvDims - 1; d >= 0; --d) {
      at[d] = rest % shape.out[d];
      rest /= shape.out[d];
    }
    for (int64_t row = 0; row < count; ++row) {
      offset_[row] = rest * p_.x_image;
      for (int d = 0; d < kMaxConvDims; ++d) {
        place_[d][row] = at[d] * shape.stride[d] - shape.padding[d];
        offset_[row] += place_[d][row] * p_.x_place[d];
      }
      for (int d = kMaxConvDims - 1; d >= 0; --d) {
        if (++at[d] < shape.out[d]) break;
        at[d] = 0;
        if (d == 0) ++rest;
      }
    }
  }

  // Where each row's channels of a tap lie, null outside of the image.
  const void* const* of_tap(int64_t tap) {
    const ConvShape& shape = p_.shape;
    int64_t shift[kMaxConvDims], offset = 0, rest = tap;
    for (int d = kMaxConvDims - 1; d >= 0; --d) {
      shift[d] = rest % shape.kernel[d] * shape.dilation[d];
      offset += shift[d] * p_.x_place[d];
      rest /= shape.kernel[d];
    }
    for (int row = 0; row < tile_rows_; ++row) {
      bool inside = row < count_;
      for (int d = 0; d < kMaxConvDims && inside; ++d)
        inside = static_cast<uint64_t>(place_[d][row] + shift[d]) < static_cast<uint64_t>(shape.in[d]);
      rows_[row] = inside ? x_ + (offset_[row] + offset) * p_.element_size : nullptr;
    }
    return rows_;
  }

  const void* const* of_no_tap() {
    std::fill_n(rows_, tile_rows_, nullptr);
    return rows_;
  }

 private:
  const ConvProblem& p_;
  const uint8_t* x_;
  int64_t count_ = 0;
  int tile_rows_ = 0;
  int64_t place_[kMaxConvDims][kMaxTileRows];  // in the image, of the first tap; may lie outside
  int64_t offset_[kMaxTileRows];               // of that place, in elements
  const void* rows_[kMaxTileRows];
};

class ConvBlock {
 public:
  ConvBlock(const ConvProblem& problem, int64_t index, void* memory)
      : p_(problem),
        layout_(problem.layout),
        kernels_(*problem.kernels),
        group_(index % (p_.groups * panel_blocks(p_)) / panel_blocks(p_)),
        first_pixel_(index / (p_.groups * panel_blocks(p_)) * block_pixels(p_)),
        tiles_(std::min(block_pixels(p_), p_.shape.pixels() - first_pixel_), static_cast<int>(max_tile_rows(p_))),
        rows_(problem, group_ * problem.inputs),
        tap_steps_(tap_steps(problem)),
        x_(static_cast<uint8_t*>(memory)),
        sums_(x_ + packed_bytes(problem)) {
    const int64_t first = index % panel_blocks(p_) * p_.block_panels;
    panels_ = std::min(p_.block_panels, group_panels(p_) - first);
    first_panel_ = group_ * group_panels(p_) + first;
  }

  void run() {
    std::memset(sums_, 0, static_cast<size_t>(sums_of(tiles_.count() - 1, panels_) - sums_));
    for (int64_t step = 0; step < layout_.steps; step += p_.block_steps) {
      const int64_t last = std::min(step + p_.block_steps, layout_.steps);
      for (int64_t tile = 0; tile < tiles_.count(); ++tile) {
        pack(tile, step, last);
        multiply(tile, step, last);
      }
    }
    for (int64_t tile = 0; tile < tiles_.count(); ++tile) store(tile);
  }

 private:
  // Sums lie [tile, panel, tile rows, 16].
  uint8_t* sums_of(int64_t tile, int64_t panel) const {
    return sums_ + (tiles_.first_row(tile) * panels_ + panel * tiles_.tile_rows(tile)) * kPanelRows * sum_size(p_);
  }

  void pack(int64_t tile, int64_t step, int64_t last) {
    PackRows pack;
    pack.k = p_.inputs;
    pack.tile_rows = tiles_.tile_rows(tile);
    pack.layout = &layout_;
    rows_.move_to(first_pixel_ + tiles_.first_row(tile), tiles_.rows(tile), pack.tile_rows);
    uint8_t* packed = x_;
    while (step < last) {
      const int64_t tap = step / tap_steps_, before = tap * tap_steps_;
      const int64_t end = tap < p_.shape.taps() ? std::min(last, before + tap_steps_) : last;
      pack.rows = tap < p_.shape.taps() ? rows_.of_tap(tap) : rows_.of_no_tap();
      pack.first_step = step - before;
      pack.last_step = end - before;
      pack.packed = packed;
      kernels_.pack_rows(pack);
      packed += (end - step) * pack.tile_rows * step_bytes(p_);
      step = end;
    }
  }

  void multiply(int64_t tile, int64_t step, int64_t last) {
    const int64_t slot = step * layout_.slots;
    const int tile_rows = tiles_.tile_rows(tile);
    LinearTile t;
    t.layout = &layout_;
    t.steps = last - step;
    t.x = x_;
    t.values_panel = layout_.panel_values() * p_.element_size;
    t.indices_panel = layout_.panel_words();
    t.first_field = static_cast<int>(slot % layout_.fields);
    const uint8_t* values = static_cast<const uint8_t*>(p_.values) + first_panel_ * t.values_panel +
                            slot * layout_.slot_values() * p_.element_size;
    const uint32_t* indices = p_.indices + first_panel_ * t.indices_panel + layout_.word_of(slot) * kPanelRows;
    for (int64_t panel = 0; panel < panels_;) {
      const LinearTileKernel kernel = kernels_.tile(layout_, tile_rows, panels_ - panel);
      t.values = values + panel * t.values_panel;
      t.indices = indices + panel * t.indices_panel;
      t.sums = sums_of(tile, panel);
      panel += kernel.panels;
      t.early = values + (panel < panels_ ? panel : 0) * t.values_panel;
      kernel.run(t);
    }
  }

  void store(int64_t tile) const {
    StoreSums s;
    s.y_row = p_.outputs;
    s.rows = tiles_.rows(tile);
    s.activation = p_.activation;
    const int64_t group_end = (group_ + 1) * (p_.outputs / p_.groups);
    for (int64_t panel = 0; panel < panels_; ++panel) {
      const int64_t output = (first_panel_ + panel) * kPanelRows;
      s.sums = sums_of(tile, panel);
      s.bias = p_.bias ? static_cast<const uint8_t*>(p_.bias) + output * p_.element_size : nullptr;
      s.y = static_cast<uint8_t*>(p_.y) +
            ((first_pixel_ + tiles_.first_row(tile)) * p_.outputs + output) * p_.element_size;
      s.outputs = static_cast<int>(std::min<int64_t>(kPanelRows, group_end - output));
      kernels_.store(s);
    }
  }

  const ConvProblem& p_;
  const PanelLayout& layout_;
  const LinearKernels& kernels_;
  const int64_t group_;
  const int64_t first_pixel_;
  const BatchTiles tiles_;
  TileRows rows_;
  const int64_t tap_steps_;
  uint8_t* x_;
  uint8_t* sums_;
  int64_t first_panel_, panels_;
};

}  // namespace

void choose_conv_blocks(ConvProblem& p, int64_t threads) {
  constexpr int64_t kX = 32 << 10, kSums = 192 << 10;
  const int64_t tile_rows = max_tile_rows(p);
  const int64_t fitting = std::max<int64_t>(1, kX / (tile_rows * step_bytes(p)) / p.layout.unroll);
  p.block_steps = std::min(fitting * p.layout.unroll, std::max<int64_t>(1, p.layout.steps));
  const int64_t tiles = ceil_div(p.shape.pixels(), tile_rows);
  p.block_panels = std::max<int64_t>(1, group_panels(p));
  // The last panels of a group may be few, but every thread is to have the same number of blocks.
  const int64_t share = ceil_div(tiles, ceil_div(tiles, threads) >= 2 ? threads : 1);
  if (share == tiles && p.groups == 1) p.block_panels = ceil_div(p.block_panels, threads);
  const int64_t most = std::max<int64_t>(1, kSums / (p.block_panels * tile_rows * kPanelRows * sum_size(p)));
  p.block_tiles = ceil_div(share, ceil_div(share, most));
}

int64_t conv_block_count(const ConvProblem& p) { return pixel_blocks(p) * p.groups * panel_blocks(p); }

int64_t conv_block_bytes(const ConvProblem& p) {
  return packed_bytes(p) + p.block_panels * block_pixels(p) * kPanelRows * sum_size(p);
}

void conv_block(const ConvProblem& problem, int64_t index, void* memory) { ConvBlock(problem, index, memory).run(); }

}  // namespace nms
