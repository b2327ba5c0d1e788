// The packed convolution of a block of panels with a block of pixels: the loops around the inner loop.
#include "conv.h"

#include <algorithm>
#include <cstring>

#include "conv_tiles.h"

namespace nms {
namespace {

constexpr int kLast = kMaxConvDims - 1;  // the dim of lines
constexpr int64_t kAlignment = 64;
constexpr int64_t kEarlyBytes = 4096;
constexpr int64_t kMaxPhases = 16;  // larger strides go by tiles

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t aligned(int64_t bytes) { return ceil_div(bytes, kAlignment) * kAlignment; }

int64_t sum_size(const ConvProblem& p) {
  return p.element_size == int{sizeof(double)} ? int64_t{sizeof(double)} : int64_t{sizeof(float)};
}
int64_t step_bytes(const ConvProblem& p) {  // of one row of packed x
  return p.layout.halves * kWindowInputs * p.kernels->input_bytes;
}
int64_t group_panels(const ConvProblem& p) { return panel_count(p.outputs / p.groups); }
int64_t panel_blocks(const ConvProblem& p) { return ceil_div(group_panels(p), p.block_panels); }

// Steps that each tap takes; the last ones of a panel, that fill up a word, belong to none.
int64_t tap_steps(const ConvProblem& p) {
  const int64_t taps = p.shape.taps();
  if (taps == 1) return p.layout.steps;
  return tap_inputs(p.layout.n, p.layout.m, p.inputs, taps, p.layout.halves > 1) / p.layout.step_inputs();
}

// A place of the kernel, in places of the image from the first one.
struct Tap {
  Tap(const ConvShape& shape, int64_t tap) {
    for (int d = kLast; d >= 0; --d) {
      shift[d] = tap % shape.kernel[d] * shape.dilation[d];
      tap /= shape.kernel[d];
    }
  }
  int64_t shift[kMaxConvDims];
};

// A place of the output.
struct Pixel {
  Pixel(const ConvShape& shape, int64_t pixel) {
    for (int d = kLast; d >= 0; --d) {
      at[d] = pixel % shape.out[d];
      pixel /= shape.out[d];
    }
    image = pixel;
  }
  void next(const ConvShape& shape) {
    for (int d = kLast; d >= 0; --d) {
      if (++at[d] < shape.out[d]) return;
      at[d] = 0;
    }
    ++image;
  }
  int64_t at[kMaxConvDims], image;
};

// ---- By lines ----

// The packed lines of a block of output lines: [planes of the kernel, lines, phases, steps, places, inputs of a step].
struct Lines {
  Lines(const ConvProblem& p, int64_t rows, int64_t output_lines) {
    const ConvShape& shape = p.shape;
    phases = shape.stride[kLast];
    places = rows + (shape.kernel[kLast] - 1) * shape.dilation[kLast] / phases;
    steps = tap_steps(p);
    // Steps that belong to no tap find zeros behind the first line's.
    phase_bytes = (steps + (p.layout.steps > shape.taps() * steps)) * places * step_bytes(p);
    count = (output_lines - 1) * shape.stride[1] + (shape.kernel[1] - 1) * shape.dilation[1] + 1;
  }

  int64_t bytes(const ConvProblem& p) const { return p.shape.kernel[0] * count * line_bytes(); }
  int64_t line_bytes() const { return phases * phase_bytes; }

  // From a pixel's first place to its rows in a step.
  int64_t offset(const ConvProblem& p, int64_t step) const {
    const int64_t of_tap = step / steps, row = step_bytes(p);
    if (of_tap >= p.shape.taps()) return steps * places * row;
    const Tap tap(p.shape, of_tap);
    const int64_t line = tap.shift[0] / p.shape.dilation[0] * count + tap.shift[1];
    const int64_t x = tap.shift[kLast];
    return line * line_bytes() + x % phases * phase_bytes + (step % steps * places + x / phases) * row;
  }

  int64_t phases, places, steps, phase_bytes;
  int64_t count;  // for each plane of the kernel
};

int64_t planes(const ConvProblem& p) { return p.shape.batch * p.shape.out[0]; }
int64_t block_lines(const ConvProblem& p) { return p.block_pixels / p.shape.out[kLast]; }
int64_t plane_blocks(const ConvProblem& p) { return ceil_div(p.shape.out[1], block_lines(p)); }

// ---- Both ----

int64_t pixel_blocks(const ConvProblem& p) {
  return p.by_lines ? planes(p) * plane_blocks(p) : ceil_div(p.shape.pixels(), p.block_pixels);
}

// Parts of a thread's memory, in bytes from its start.
struct Memory {
  explicit Memory(const ConvProblem& p) {
    // By tiles, the last block has other pixels, and other tiles, than the first.
    int64_t x_bytes = p.block_steps * kMaxTileRows * step_bytes(p);
    int64_t pointers = kMaxTileRows, rows = p.block_pixels + kMaxTileRows;
    if (p.by_lines) {
      const TileSplit split(p, p.shape.out[kLast]);
      const Lines lines(p, split.total_rows(), block_lines(p));
      x_bytes = lines.bytes(p);
      pointers = lines.places;
      rows = split.total_rows() * block_lines(p);
    }
    sums = aligned(x_bytes);
    steps = sums + aligned(rows * p.block_panels * kPanelRows * sum_size(p));
    rows_of_x = steps + aligned(p.layout.steps * static_cast<int64_t>(sizeof(int32_t)));
    end = rows_of_x + aligned(pointers * static_cast<int64_t>(sizeof(void*)));
  }
  int64_t sums, steps, rows_of_x, end;  // x comes first
};

class ConvBlock {
 public:
  ConvBlock(const ConvProblem& problem, int64_t index, uint8_t* memory)
      : p_(problem), shape_(problem.shape), layout_(problem.layout), memory_(problem) {
    const int64_t panel_block = index % panel_blocks(p_);
    index /= panel_blocks(p_);
    group_ = index % p_.groups;
    const int64_t pixel_block = index / p_.groups;
    panels_ = std::min(p_.block_panels, group_panels(p_) - panel_block * p_.block_panels);
    first_panel_ = group_ * group_panels(p_) + panel_block * p_.block_panels;
    if (p_.by_lines) {
      plane_ = pixel_block / plane_blocks(p_);
      first_line_ = pixel_block % plane_blocks(p_) * block_lines(p_);
      lines_ = std::min(block_lines(p_), shape_.out[1] - first_line_);
      first_pixel_ = (plane_ * shape_.out[1] + first_line_) * shape_.out[kLast];
      pixels_ = shape_.out[kLast];
    } else {
      first_pixel_ = pixel_block * p_.block_pixels;
      pixels_ = std::min(p_.block_pixels, shape_.pixels() - first_pixel_);
    }
    channels_ = static_cast<const uint8_t*>(p_.x) + group_ * p_.inputs * p_.element_size;
    x_ = memory;
    sums_ = memory + memory_.sums;
    x_steps_ = reinterpret_cast<int32_t*>(memory + memory_.steps);
    x_rows_ = reinterpret_cast<const void**>(memory + memory_.rows_of_x);
  }

  void run() {
    const TileSplit split(p_, pixels_);
    const Lines lines(p_, split.total_rows(), lines_);
    if (p_.by_lines) pack_lines(lines);
    for (int64_t step = 0; step < layout_.steps; step += p_.block_steps) {
      const int64_t last = std::min(step + p_.block_steps, layout_.steps);
      each_tile(split, [&](const Tile& tile) {
        if (p_.by_lines) {
          const int64_t x = tile.line * shape_.stride[1] * lines.line_bytes() + tile.first * step_bytes(p_);
          multiply(tile, step, last, x_ + x, x_steps_ + step);
        } else {
          pack_tile(tile, step, last);
          multiply(tile, step, last, x_, x_steps_);
        }
      });
    }
    each_tile(split, [&](const Tile& tile) { store(tile); });
  }

 private:
  struct Tile {
    int64_t line;   // of the block's; 0 by tiles
    int64_t first;  // pixel: in its line, or in the block
    int rows;       // pixels
    int tile_rows;
    uint8_t* sums;  // [panels, tile rows, 16]
  };

  template <class Do>
  void each_tile(const TileSplit& split, const Do& action) const {
    uint8_t* sums = sums_;
    for (int64_t line = 0; line < lines_; ++line) {
      int64_t first = 0;
      for (int64_t i = 0; i < split.count(); ++i) {
        const int tile_rows = split.rows(i);
        action(Tile{line, first, static_cast<int>(std::min<int64_t>(tile_rows, pixels_ - first)), tile_rows, sums});
        first += tile_rows;
        sums += panels_ * tile_rows * kPanelRows * sum_size(p_);
      }
    }
  }

  // Where the channels of a place lie; null outside of the image.
  const void* place(int64_t image, int64_t z, int64_t y, int64_t x) const {
    const auto outside = [&](int64_t at, int d) {
      return static_cast<uint64_t>(at) >= static_cast<uint64_t>(shape_.in[d]);
    };
    if (outside(z, 0) || outside(y, 1) || outside(x, kLast)) return nullptr;
    return channels_ +
           (image * p_.x_image + z * p_.x_place[0] + y * p_.x_place[1] + x * p_.x_place[kLast]) * p_.element_size;
  }

  // ---- x ----

  void pack_lines(const Lines& lines) {
    const int64_t image = plane_ / shape_.out[0];
    const int64_t z = plane_ % shape_.out[0] * shape_.stride[0] - shape_.padding[0];
    const int64_t y = first_line_ * shape_.stride[1] - shape_.padding[1];
    uint8_t* packed = x_;
    for (int64_t plane = 0; plane < shape_.kernel[0]; ++plane)
      for (int64_t line = 0; line < lines.count; ++line, packed += lines.line_bytes())
        pack_line(lines, image, z + plane * shape_.dilation[0], y + line, packed);
    for (int64_t step = 0; step < layout_.steps; ++step) x_steps_[step] = static_cast<int32_t>(lines.offset(p_, step));
    const int64_t in_taps = lines.steps * lines.places * step_bytes(p_);
    for (int64_t at = 0; in_taps < lines.phase_bytes && at < lines.bytes(p_); at += lines.line_bytes())
      std::memset(x_ + at + in_taps, 0, static_cast<size_t>(lines.phase_bytes - in_taps));
  }

  void pack_line(const Lines& lines, int64_t image, int64_t z, int64_t y, uint8_t* packed) {
    PackRows pack = pack_rows(static_cast<int>(lines.places), 0, lines.steps);
    for (int64_t phase = 0; phase < lines.phases; ++phase, packed += lines.phase_bytes) {
      if (!has_phase(phase)) continue;
      int64_t x = phase - shape_.padding[kLast];
      for (int64_t i = 0; i < lines.places; ++i, x += lines.phases) {
        x_rows_[i] = place(image, z, y, x);
        if (x_rows_[i] != nullptr) fetch(x_rows_[i], p_.inputs * p_.element_size);
      }
      pack.packed = packed;
      p_.kernels->pack_rows(pack);
    }
  }

  // Asks for memory: all of it at once comes sooner than one line after the other.
  static void fetch(const void* memory, int64_t bytes) {
    const char* first = static_cast<const char*>(memory);
    for (int64_t i = 0; i < bytes; i += kAlignment) __builtin_prefetch(first + i, 0, 2);
  }

  // Whether some tap looks at places that lie `phase` behind multiples of the stride.
  bool has_phase(int64_t phase) const {
    for (int64_t i = 0; i < shape_.kernel[kLast]; ++i)
      if (i * shape_.dilation[kLast] % shape_.stride[kLast] == phase) return true;
    return false;
  }

  void pack_tile(const Tile& tile, int64_t step, int64_t last) {
    int64_t at[kMaxTileRows][kMaxConvDims], image[kMaxTileRows];
    Pixel pixel(shape_, first_pixel_ + tile.first);
    for (int row = 0; row < tile.rows; ++row, pixel.next(shape_)) {
      for (int d = 0; d < kMaxConvDims; ++d) at[row][d] = pixel.at[d] * shape_.stride[d] - shape_.padding[d];
      image[row] = pixel.image;
    }
    if (shape_.taps() == 1) fetch_pixels(pixel, tile.tile_rows, step, last);
    const int64_t steps_of_tap = tap_steps(p_), step_size = tile.tile_rows * step_bytes(p_);
    std::fill_n(x_rows_, tile.tile_rows, nullptr);
    for (int64_t from = step; from < last;) {
      const int64_t of_tap = from / steps_of_tap, before = of_tap * steps_of_tap;
      const bool some = of_tap < shape_.taps();
      const int64_t to = some ? std::min(last, before + steps_of_tap) : last;
      const Tap tap(shape_, of_tap);
      for (int row = 0; row < tile.rows; ++row)
        x_rows_[row] = some ? place(image[row], at[row][0] + tap.shift[0], at[row][1] + tap.shift[1],
                                    at[row][kLast] + tap.shift[kLast])
                            : nullptr;
      PackRows pack = pack_rows(tile.tile_rows, from - before, to - before);
      pack.packed = x_ + (from - step) * step_size;
      p_.kernels->pack_rows(pack);
      from = to;
    }
    for (int64_t i = 0; i < last - step; ++i) x_steps_[i] = static_cast<int32_t>(i * step_size);
  }

  // What the next tile will pack of its pixels: only where each is read once.
  void fetch_pixels(Pixel pixel, int count, int64_t step, int64_t last) const {
    const int64_t inputs = layout_.step_inputs(), end = std::min(last * inputs, p_.inputs);
    for (int i = 0; i < count && pixel.image < shape_.batch; ++i, pixel.next(shape_)) {
      int64_t at[kMaxConvDims];
      for (int d = 0; d < kMaxConvDims; ++d) at[d] = pixel.at[d] * shape_.stride[d] - shape_.padding[d];
      const void* channels = place(pixel.image, at[0], at[1], at[kLast]);
      if (channels == nullptr) continue;
      fetch(static_cast<const uint8_t*>(channels) + step * inputs * p_.element_size,
            (end - step * inputs) * p_.element_size);
    }
  }

  PackRows pack_rows(int rows, int64_t first_step, int64_t last_step) const {
    PackRows pack;
    pack.rows = x_rows_;
    pack.k = p_.inputs;
    pack.tile_rows = rows;
    pack.first_step = first_step;
    pack.last_step = last_step;
    pack.layout = &layout_;
    return pack;
  }

  // ---- Products ----

  // Adds what steps [step, last) give for all panels.
  void multiply(const Tile& tile, int64_t step, int64_t last, const uint8_t* x, const int32_t* x_steps) const {
    const int64_t slot = step * layout_.slots;
    LinearTile t;
    t.layout = &layout_;
    t.steps = last - step;
    t.x = x;
    t.x_steps = x_steps;
    t.values_panel = layout_.panel_values() * p_.element_size;
    t.indices_panel = layout_.panel_words();
    t.first_field = static_cast<int>(slot % layout_.fields);
    t.from_zero = step == 0;
    const uint8_t* values = static_cast<const uint8_t*>(p_.values) + first_panel_ * t.values_panel +
                            slot * layout_.slot_values() * p_.element_size;
    const uint32_t* indices = p_.indices + first_panel_ * t.indices_panel + layout_.word_of(slot) * kPanelRows;
    const int64_t stretch = t.steps * layout_.slots * layout_.slot_values() * p_.element_size;  // bytes of a panel
    const int64_t index_bytes = (layout_.word_of(slot + t.steps * layout_.slots) - layout_.word_of(slot)) * kPanelRows *
                                static_cast<int64_t>(sizeof(uint32_t));
    const int64_t panel_sums = tile.tile_rows * kPanelRows * sum_size(p_);
    for (int64_t panel = 0; panel < panels_;) {
      const LinearTileKernel kernel = p_.tile(layout_, tile.tile_rows, panels_ - panel);
      t.values = values + panel * t.values_panel;
      t.indices = indices + panel * t.indices_panel;
      t.sums = tile.sums + panel * panel_sums;
      panel += kernel.panels;
      if (panel < panels_) fetch(indices + panel * t.indices_panel, index_bytes);
      // Long stretches are fetched shortly before their use, short ones one ahead.
      t.early = stretch >= 4 * kEarlyBytes ? static_cast<const uint8_t*>(t.values) + kEarlyBytes
                : panel < panels_          ? values + panel * t.values_panel
                                           : values;
      kernel.run(t);
    }
  }

  void store(const Tile& tile) const {
    StoreSums s;
    s.y_row = p_.outputs;
    s.rows = tile.rows;
    s.activation = p_.activation;
    const int64_t group_end = (group_ + 1) * (p_.outputs / p_.groups);
    const int64_t pixel = first_pixel_ + tile.line * shape_.out[kLast] + tile.first;
    for (int64_t panel = 0; panel < panels_; ++panel) {
      const int64_t output = (first_panel_ + panel) * kPanelRows;
      s.sums = tile.sums + panel * tile.tile_rows * kPanelRows * sum_size(p_);
      s.bias = p_.bias ? static_cast<const uint8_t*>(p_.bias) + output * p_.element_size : nullptr;
      const int64_t at = (pixel * p_.outputs + output) * p_.element_size;
      s.residual = p_.residual ? static_cast<const uint8_t*>(p_.residual) + at : nullptr;
      s.y = static_cast<uint8_t*>(p_.y) + at;
      s.outputs = static_cast<int>(std::min<int64_t>(kPanelRows, group_end - output));
      p_.kernels->store(s);
    }
  }

  const ConvProblem& p_;
  const ConvShape& shape_;
  const PanelLayout& layout_;
  const Memory memory_;
  int64_t group_, first_panel_, panels_;
  int64_t plane_ = 0, first_line_ = 0, lines_ = 1;
  int64_t first_pixel_;
  int64_t pixels_;  // side by side: of each line, or of the block
  const uint8_t* channels_;
  uint8_t* x_;
  uint8_t* sums_;
  int32_t* x_steps_;
  const void** x_rows_;
};

// ---- Sizes ----

constexpr int64_t kLineBytes = 640 << 10;  // packed lines of a block
constexpr int64_t kSumBytes = 320 << 10;
constexpr int64_t kXBytes = 20 << 10;  // of a tile, for all panels

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

// Whether lines cost less than tiles of any pixels: fewer rows to pack, but tiles that end with the lines.
bool prefers_lines(const ConvProblem& p, const TileSplit& split, int64_t lines) {
  // What it takes to pack a row of a step, in halves of what a kernel takes for it.
  const double packing = 3.0 / static_cast<double>(std::max<int64_t>(1, group_panels(p) * p.layout.slots));
  const Lines packed(p, split.total_rows(), lines);
  const double pixels = static_cast<double>(lines * p.shape.out[kLast]), taps = static_cast<double>(p.shape.taps());
  const double rows_packed = static_cast<double>(p.shape.kernel[0] * packed.count * packed.phases * packed.places);
  const double by_lines = static_cast<double>(lines * split.cost()) + packing * rows_packed / taps;
  const TileSplit all(p, p.shape.pixels());
  const double by_tiles =
      pixels * static_cast<double>(all.cost()) / static_cast<double>(p.shape.pixels()) + packing * pixels;
  return by_lines < by_tiles;
}

// As many steps as there is room for in the first cache for what a tile sees in them. By lines, the taps of a line see
// nearly the same.
int64_t steps_of_block(const ConvProblem& p, int64_t tile_rows) {
  const int64_t unroll = p.layout.unroll;
  const int64_t fitting = std::max<int64_t>(1, kXBytes / (tile_rows * step_bytes(p)));
  int64_t steps = fitting / unroll;
  if (p.by_lines) {
    const int64_t line = tap_steps(p) * p.shape.kernel[kLast], seen = ceil_div(line, p.shape.kernel[kLast]) + 1;
    if (seen <= fitting) steps = std::max(steps, fitting / seen * line / unroll);
  }
  return std::max<int64_t>(1, steps) * unroll;
}

}  // namespace

void choose_conv_blocks(ConvProblem& p, int64_t threads) {
  const ConvShape& shape = p.shape;
  threads = std::max<int64_t>(1, threads);
  const TileSplit line(p, shape.out[kLast]);
  const int64_t lines = shape.taps() > 1 && shape.stride[kLast] <= kMaxPhases ? fitting_lines(p, line) : 0;
  p.by_lines = lines > 0 && prefers_lines(p, line, lines);
  const TileSplit all(p, shape.pixels());
  const int64_t tile_rows = p.by_lines ? line.rows(0) : all.rows(0);
  if (p.by_lines) {
    const int64_t needed = planes(p) * ceil_div(shape.out[1], lines);
    const int64_t blocks = divides_panels(p, needed, threads) ? needed : even_blocks(needed, threads);
    const int64_t in_plane = std::min(ceil_div(blocks, planes(p)), shape.out[1]);
    p.block_pixels = ceil_div(shape.out[1], in_plane) * shape.out[kLast];
    p.block_panels = panels_for(p, planes(p) * ceil_div(shape.out[1], block_lines(p)), threads);
  } else {
    const int64_t sums = std::max<int64_t>(1, group_panels(p)) * kPanelRows * sum_size(p);
    const int64_t fitting = std::max<int64_t>(1, kSumBytes / (sums * tile_rows)) * tile_rows;
    const int64_t pixels = shape.pixels();
    const int64_t needed = ceil_div(pixels, fitting);
    const int64_t blocks = divides_panels(p, needed, threads)
                               ? needed
                               : std::min(even_blocks(needed, threads), ceil_div(pixels, tile_rows));
    p.block_pixels = ceil_div(pixels, blocks);
    p.block_panels = panels_for(p, ceil_div(pixels, p.block_pixels), threads);
  }
  p.block_panels = std::max<int64_t>(1, p.block_panels);
  p.block_steps = std::min(steps_of_block(p, tile_rows), std::max<int64_t>(1, p.layout.steps));
}

int64_t conv_block_count(const ConvProblem& p) { return pixel_blocks(p) * p.groups * panel_blocks(p); }

int64_t conv_block_memory(const ConvProblem& p) { return Memory(p).end; }

void conv_block(const ConvProblem& problem, int64_t index, void* memory) {
  ConvBlock(problem, index, static_cast<uint8_t*>(memory)).run();
}

}  // namespace nms
