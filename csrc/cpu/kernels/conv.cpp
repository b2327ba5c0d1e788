// The packed convolution of a block of panels with a block of pixels: the loops around the inner loop.
//
// What a panel has for a block of steps stays in the first cache while all tiles of the block pass by; then the next
// panel has its turn. Only where all panels together are small do they pass by the tile instead.
#include "conv.h"

#include <algorithm>
#include <cstring>

#include "conv_parts.h"
#include "conv_tiles.h"

namespace nms {
namespace {

// Asks for a cache line that will be written. A prefetch as for reading, which is what compilers make of
// __builtin_prefetch where they know no more than x86-64, would leave the line to be asked for again.
inline void fetch_to_write(const uint8_t* line) {
#if defined(__x86_64__)
  asm volatile("prefetchw %0" : : "m"(*line));
#else
  __builtin_prefetch(line, 1, 3);
#endif
}

class ConvBlock {
 public:
  ConvBlock(const ConvProblem& problem, int64_t index, uint8_t* memory)
      : p_(problem), shape_(problem.shape), layout_(problem.layout) {
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
      first_pixel_ = (plane_ * shape_.out[1] + first_line_) * shape_.out[kLastDim];
      pixels_ = shape_.out[kLastDim];
    } else {
      first_pixel_ = pixel_block * p_.block_pixels;
      pixels_ = std::min(p_.block_pixels, shape_.pixels() - first_pixel_);
    }
    channels_ = static_cast<const uint8_t*>(p_.x) + group_ * p_.inputs * p_.element_size;
    if (p_.by_lines && pixel_block + 1 < pixel_blocks(p_)) next_x_ = lines_of_image(pixel_block + 1);
    const ConvMemory parts(p_);
    x_ = memory;
    decoded_ = memory + parts.indices;
    sums_ = memory + parts.sums;
    x_steps_ = reinterpret_cast<int32_t*>(memory + parts.steps);
    x_rows_ = reinterpret_cast<const void**>(memory + parts.rows_of_x);
  }

  void run() {
    const TileSplit split(p_, pixels_);
    if (p_.by_lines)
      run(split, PackedLines(*this, Lines(p_, split.total_rows(), lines_)));
    else if (p_.tiles_first)
      run_tiles_first(split, PackedTiles(*this));
    else
      run(split, PackedTiles(*this));
  }

 private:
  struct Memory {
    const uint8_t* first;
    int64_t bytes;
  };

  struct Tile {
    int64_t line;       // of the block's; 0 by tiles
    int64_t first;      // pixel: in its line, or in the block
    int64_t first_row;  // of all tiles' rows
    int64_t index;      // of all tiles
    int rows;           // pixels
    int tile_rows;
  };

  template <class Packed>
  void run(const TileSplit& split, Packed x) {
    total_rows_ = split.total_rows() * lines_;
    choose_early_tiles(split.count());
    int64_t step = 0;
    do {  // without any steps, sums are begun nevertheless
      const int64_t last = std::min(step + p_.block_steps, layout_.steps);
      x.begin(step, last);
      int64_t at_once = 1;
      for (int64_t panel = 0; panel < panels_; panel += at_once) {
        at_once = kernel(split.rows(0), panels_ - panel).panels;
        begin_panels(panel, at_once, step, last);
        each_tile(split, [&](const Tile& tile) {
          if (panel == 0) x.pack(tile);
          if (last == layout_.steps) fetch_outputs(tile, panel, at_once);
          const TileInputs inputs = x.inputs(tile);
          bool stored = false;
          x.each_run(tile, [&](int64_t from, int64_t to, bool from_zero, bool is_last) {
            const bool stores = is_last && last == layout_.steps && can_store(tile, panel, at_once);
            multiply(tile, panel, at_once, step, from, to, from_zero, inputs, stores);
            stored = stored || stores;
          });
          if (last == layout_.steps && !stored) store(tile, panel, at_once);
        });
      }
      step = last;
    } while (step < layout_.steps);
  }

  template <class Packed>
  void run_tiles_first(const TileSplit& split, Packed x) {
    const int64_t steps = layout_.steps;
    x.begin(0, steps);
    if (p_.decoded.decode != nullptr)
      for (int64_t panel = 0; panel < panels_; ++panel)
        p_.decoded.decode(words_at(panel, 0), steps * layout_.slots, decoded_ + panel * decoded_panel(steps));
    early_ = values_at(0, 0);
    each_tile(split, [&](const Tile& tile) {
      x.pack(tile);
      const TileInputs inputs = x.inputs(tile);
      next_x_ = x.after(tile);
      int64_t at_once = 1;
      for (int64_t panel = 0; panel < panels_; panel += at_once) {
        at_once = kernel(split.rows(0), panels_ - panel).panels;
        fetch_outputs(tile, panel, at_once);
        const bool stores = can_store(tile, panel, at_once);
        multiply(tile, panel, at_once, 0, 0, steps, true, inputs, stores);
        if (!stores) store(tile, panel, at_once);
      }
    });
  }

  template <class Do>
  void each_tile(const TileSplit& split, const Do& action) const {
    int64_t first_row = 0, index = 0;
    for (int64_t line = 0; line < lines_; ++line) {
      int64_t first = 0;
      for (int64_t i = 0; i < split.count(); ++i) {
        const int tile_rows = split.rows(i);
        action(Tile{line, first, first_row, index++, static_cast<int>(std::min<int64_t>(tile_rows, pixels_ - first)),
                    tile_rows});
        first += tile_rows;
        first_row += tile_rows;
      }
    }
  }

  // ---- x ----

  // Where a tile finds its rows: LinearTile::x and x_row.
  struct TileInputs {
    const uint8_t* x;
    int64_t row;
  };

  // Where the channels of a place lie; null outside of the image.
  const void* place(int64_t image, int64_t z, int64_t y, int64_t x) const {
    if (is_outside(z, 0) || is_outside(y, 1) || is_outside(x, kLastDim)) return nullptr;
    return channels_ +
           (image * p_.x_image + z * p_.x_place[0] + y * p_.x_place[1] + x * p_.x_place[kLastDim]) * p_.element_size;
  }
  bool is_outside(int64_t at, int d) const { return static_cast<uint64_t>(at) >= static_cast<uint64_t>(shape_.in[d]); }

  // The lines of the image that a block sees, if they lie side by side.
  Memory lines_of_image(int64_t pixel_block) const {
    if (p_.x_place[1] != shape_.in[kLastDim] * p_.x_place[kLastDim] || shape_.in[0] > 1) return {nullptr, 0};
    const int64_t image = pixel_block / plane_blocks(p_), line = pixel_block % plane_blocks(p_) * block_lines(p_);
    const int64_t y = line * shape_.stride[1] - shape_.padding[1];
    const int64_t count = (block_lines(p_) - 1) * shape_.stride[1] + (shape_.kernel[1] - 1) * shape_.dilation[1] + 1;
    const int64_t first = std::clamp<int64_t>(y, 0, shape_.in[1] - 1), last = std::min(y + count, shape_.in[1]);
    return {static_cast<const uint8_t*>(place(image, 0, first, 0)), (last - first) * p_.x_place[1] * p_.element_size};
  }

  // Asks for memory: all of it at once comes sooner than one line after the other.
  static void fetch(const void* memory, int64_t bytes) {
    const char* first = static_cast<const char*>(memory);
    for (int64_t i = 0; i < bytes; i += kCacheLine) __builtin_prefetch(first + i, 0, 2);
  }

  PackRows rows_to_pack(int64_t count, int64_t first_step, int64_t last_step, int64_t packed_row) const {
    PackRows pack;
    pack.rows = x_rows_;
    pack.k = p_.inputs;
    pack.count = count;
    pack.first_step = first_step;
    pack.last_step = last_step;
    pack.packed_row = packed_row;
    pack.layout = &layout_;
    return pack;
  }

  // Lines of the image, each packed when the first tile needs it.
  class PackedLines {
   public:
    PackedLines(const ConvBlock& block, const Lines& lines)
        : b_(block),
          lines_(lines),
          image_(block.plane_ / block.shape_.out[0]),
          z_(block.plane_ % block.shape_.out[0] * block.shape_.stride[0] - block.shape_.padding[0]),
          y_(block.first_line_ * block.shape_.stride[1] - block.shape_.padding[1]),
          line_steps_(block.shape_.kernel[kLastDim] * lines.steps),
          // Words are read from their first field on.
          skips_(block.p_.decoded.decode != nullptr || line_steps_ % block.layout_.unroll == 0) {
      for (int64_t step = 0; step < block.layout_.steps; ++step)
        block.x_steps_[step] = static_cast<int32_t>(lines.offset(block.p_, step));
    }

    void begin(int64_t step, int64_t last) {
      step_ = step;
      last_ = last;
    }

    void pack(const Tile& tile) {
      const ConvShape& shape = b_.shape_;
      const int64_t needed = tile.line * shape.stride[1] + (shape.kernel[1] - 1) * shape.dilation[1] + 1;
      if (packed_ >= needed) return;
      for (; packed_ < needed; ++packed_)
        for (int64_t plane = 0; plane < shape.kernel[0]; ++plane)
          pack_line(z_ + plane * shape.dilation[0], y_ + packed_, plane * lines_.count + packed_);
    }

    TileInputs inputs(const Tile& tile) const {
      const int64_t line = tile.line * b_.shape_.stride[1] * lines_.line_bytes();
      return {b_.x_ + line + tile.first * lines_.place_bytes, lines_.place_bytes};
    }

    // Runs of steps in which the tile's taps lie inside of the image, if only by one place. The last of a tile says so,
    // unless it was in an earlier block of steps.
    template <class Do>
    void each_run(const Tile& tile, const Do& action) const {
      const ConvShape& shape = b_.shape_;
      const int64_t y = y_ + tile.line * shape.stride[1];
      int64_t run = 0, run_end = 0;  // not yet handed on
      bool begun = false;            // in this block of steps or before it
      const auto hand_on = [&](bool last) {
        begun = begun || run < std::min(run_end, step_);
        const int64_t from = std::max(run, step_), to = std::min(run_end, last_);
        const bool none = last && !begun && last_ == b_.layout_.steps;  // of all steps
        if (from < to || none) action(from, std::max(from, to), !begun, last);
        begun = begun || from < to;
      };
      const int64_t tap_lines = shape.kernel[0] * shape.kernel[1];
      for (int64_t i = 0; i < tap_lines && skips_; ++i) {
        if (b_.is_outside(z_ + i / shape.kernel[1] * shape.dilation[0], 0) ||
            b_.is_outside(y + i % shape.kernel[1] * shape.dilation[1], 1))
          continue;
        if (run_end != i * line_steps_) {
          hand_on(false);
          run = i * line_steps_;
        }
        run_end = (i + 1) * line_steps_;
      }
      if (!skips_) run_end = b_.layout_.steps;
      hand_on(true);
    }

   private:
    void pack_line(int64_t z, int64_t y, int64_t index) const {
      if (skips_ && (b_.is_outside(z, 0) || b_.is_outside(y, 1))) return;
      uint8_t* packed = b_.x_ + index * lines_.line_bytes();
      PackRows pack = b_.rows_to_pack(lines_.places, 0, lines_.steps + lines_.fills, lines_.place_bytes);
      for (int64_t phase = 0; phase < lines_.phases; ++phase, packed += lines_.phase_bytes()) {
        if (!has_phase(phase)) continue;
        int64_t x = phase - b_.shape_.padding[kLastDim];
        for (int64_t i = 0; i < lines_.places; ++i, x += lines_.phases) b_.x_rows_[i] = b_.place(image_, z, y, x);
        pack.packed = packed;
        b_.p_.kernels->pack_rows(pack);
      }
    }

    // Whether some tap looks at places that lie `phase` behind multiples of the stride.
    bool has_phase(int64_t phase) const {
      const ConvShape& shape = b_.shape_;
      for (int64_t i = 0; i < shape.kernel[kLastDim]; ++i)
        if (i * shape.dilation[kLastDim] % shape.stride[kLastDim] == phase) return true;
      return false;
    }

    const ConvBlock& b_;
    const Lines lines_;
    const int64_t image_, z_, y_;  // of the first tap of the block's first pixel
    const int64_t line_steps_;     // of a line of the kernel
    const bool skips_;             // lines outside of the image; else they are zeros
    int64_t packed_ = 0;           // lines, of each plane
    int64_t step_ = 0, last_ = 0;
  };

  // Any pixels: what they see in a block of steps, packed row by row; or left where it lies.
  class PackedTiles {
   public:
    explicit PackedTiles(const ConvBlock& block)
        : b_(block), row_(row_bytes(block.p_, block.p_.block_steps)), steps_of_tap_(tap_steps(block.p_)) {}

    void begin(int64_t step, int64_t last) {
      step_ = step;
      last_ = last;
      for (int64_t i = step; i < last; ++i) b_.x_steps_[i] = static_cast<int32_t>((i - step) * step_bytes(b_.p_));
    }

    void pack(const Tile& tile) const {
      if (is_in_place(tile)) return;
      const ConvShape& shape = b_.shape_;
      int64_t at[kMaxTileRows][kMaxConvDims], image[kMaxTileRows];
      Pixel pixel(shape, b_.first_pixel_ + tile.first);
      for (int row = 0; row < tile.rows; ++row, pixel.next(shape)) {
        for (int d = 0; d < kMaxConvDims; ++d) at[row][d] = pixel.at[d] * shape.stride[d] - shape.padding[d];
        image[row] = pixel.image;
      }
      if (shape.taps() == 1) fetch_pixels(pixel, tile.tile_rows);
      std::fill_n(b_.x_rows_, tile.tile_rows, nullptr);
      for (int64_t from = step_; from < last_;) {
        const int64_t of_tap = from / steps_of_tap_, before = of_tap * steps_of_tap_;
        const bool some = of_tap < shape.taps();
        const int64_t to = some ? std::min(last_, before + steps_of_tap_) : last_;
        const Tap tap(shape, of_tap);
        for (int row = 0; row < tile.rows; ++row)
          b_.x_rows_[row] = some ? b_.place(image[row], at[row][0] + tap.shift[0], at[row][1] + tap.shift[1],
                                            at[row][kLastDim] + tap.shift[kLastDim])
                                 : nullptr;
        PackRows pack = b_.rows_to_pack(tile.tile_rows, from - before, to - before, row_);
        pack.packed = packed(tile) + (from - step_) * step_bytes(b_.p_);
        b_.p_.kernels->pack_rows(pack);
        from = to;
      }
    }

    TileInputs inputs(const Tile& tile) const {
      if (!is_in_place(tile)) return {packed(tile), row_};
      const int64_t row = b_.p_.x_place[kLastDim] * b_.p_.element_size;
      return {b_.channels_ + (b_.first_pixel_ + tile.first) * row + step_ * step_bytes(b_.p_), row};
    }

    // The rows that the next tile will read, if in place.
    Memory after(const Tile& tile) const {
      const TileInputs rows = inputs(tile);
      return is_in_place(tile) ? Memory{rows.x + tile.rows * rows.row, tile.rows * rows.row} : Memory{nullptr, 0};
    }

    template <class Do>
    void each_run(const Tile&, const Do& action) const {
      action(step_, last_, step_ == 0, true);
    }

   private:
    bool is_in_place(const Tile& tile) const { return b_.p_.in_place && tile.rows == tile.tile_rows; }
    uint8_t* packed(const Tile& tile) const {
      return b_.x_ + (b_.p_.in_place || b_.p_.tiles_first ? 0 : tile.first_row * row_);
    }

    // What the next tile will pack of its pixels: only where each is read once.
    void fetch_pixels(Pixel pixel, int count) const {
      const ConvShape& shape = b_.shape_;
      const int64_t inputs = b_.layout_.step_inputs(), end = std::min(last_ * inputs, b_.p_.inputs);
      for (int i = 0; i < count && pixel.image < shape.batch; ++i, pixel.next(shape)) {
        int64_t at[kMaxConvDims];
        for (int d = 0; d < kMaxConvDims; ++d) at[d] = pixel.at[d] * shape.stride[d] - shape.padding[d];
        const void* channels = b_.place(pixel.image, at[0], at[1], at[kLastDim]);
        if (channels == nullptr) continue;
        fetch(static_cast<const uint8_t*>(channels) + step_ * inputs * b_.p_.element_size,
              (end - step_ * inputs) * b_.p_.element_size);
      }
    }

    const ConvBlock& b_;
    const int64_t row_, steps_of_tap_;
    int64_t step_ = 0, last_ = 0;
  };

  // ---- Products ----

  const uint8_t* values_at(int64_t panel, int64_t step) const {
    const int64_t at = (first_panel_ + panel) * layout_.panel_values() + step * layout_.slots * layout_.slot_values();
    return static_cast<const uint8_t*>(p_.values) + at * p_.element_size;
  }
  const uint32_t* words_at(int64_t panel, int64_t step) const {
    return p_.indices + (first_panel_ + panel) * layout_.panel_words() +
           layout_.word_of(step * layout_.slots) * kPanelRows;
  }
  int64_t decoded_panel(int64_t steps) const { return steps * layout_.slots * p_.decoded.slot_bytes; }

  // All values at once are more than memory delivers while one tile is computed. And the first line may leave out
  // steps that lie outside of the image, and their values with them.
  void choose_early_tiles(int64_t line_tiles) {
    constexpr int64_t kEarlyTiles = 4;
    if (p_.decoded.decode == nullptr) return;
    first_early_tile_ = p_.by_lines && lines_ > 2 ? line_tiles : 0;
    const int64_t others = line_tiles * lines_ - first_early_tile_;
    early_tiles_ = std::min(kEarlyTiles, others > kEarlyTiles ? others : (others + 1) / 2);
  }

  // Makes the indices of some panels ready, and says what comes after them.
  void begin_panels(int64_t panel, int64_t count, int64_t step, int64_t last) {
    const bool more = panel + count < panels_;
    const int64_t next = more ? panel + count : 0, next_step = more ? step : last;
    early_ = next_step < layout_.steps ? values_at(next, next_step) : values_at(panel, step);
    if (p_.decoded.decode == nullptr) return;
    first_decoded_ = panel;
    for (int64_t i = 0; i < count; ++i) {
      p_.decoded.decode(words_at(panel + i, step), (last - step) * layout_.slots,
                        decoded_ + i * decoded_panel(last - step));
      if (next_step < layout_.steps && next + i < panels_)
        fetch(words_at(next + i, next_step), (last - step) * layout_.slots / layout_.fields * kCacheLine);
    }
  }

  // Sums lie [panels, taken as many at once as kernels do; tiles; of these panels; tile rows; 16]; if there is only one
  // block of steps, each tile's are stored before the next one's begin.
  uint8_t* sums_of(const Tile& tile, int64_t panel, int64_t at_once) const {
    if (p_.block_steps >= layout_.steps) return sums_;
    return sums_ + (panel * total_rows_ + tile.first_row * at_once) * kPanelRows * sum_size(p_);
  }

  // p_.tile, asked once for each: a tile of few steps takes not much longer than the search.
  const LinearTileKernel& kernel(int tile_rows, int64_t panels) {
    const int64_t most = std::min(panels, kMaxPanelsAtOnce);
    LinearTileKernel& found = found_kernels_[most - 1][tile_rows - 1];
    if (found.run == nullptr) found = p_.tile(layout_, tile_rows, most);
    return found;
  }

  // Adds what steps [from, to) of a block of steps that begins at `step` give for some panels. `stores`: and stores it.
  void multiply(const Tile& tile, int64_t panel, int64_t at_once, int64_t step, int64_t from, int64_t to,
                bool from_zero, const TileInputs& inputs, bool stores) {
    LinearTile t;
    t.layout = &layout_;
    t.steps = to - from;
    t.from_zero = from_zero;
    t.x = inputs.x;
    t.x_row = inputs.row;
    t.x_steps = x_steps_ + from;
    t.values = values_at(panel, from);
    t.values_panel = layout_.panel_values() * p_.element_size;
    // Some tiles fetch the values for all; others what the next block sees of the image.
    const int64_t step_values = layout_.slots * layout_.slot_values() * p_.element_size;
    const int64_t stretch = t.steps * step_values, early_tile = tile.index - first_early_tile_;
    t.early = t.values;
    t.early_panel = t.values_panel;
    t.early_step = step_values;
    if (0 <= early_tile && early_tile < early_tiles_) {
      t.early_step = ceil_div(step_values, early_tiles_);
      const int64_t block_steps = std::min(p_.block_steps, layout_.steps - step);
      t.early = early_ + (early_tile * block_steps + from - step) * t.early_step;
    } else if (next_x_.bytes > 0) {
      t.early = next_x_.first;
      t.early_panel = stretch;
      next_x_.first += at_once * stretch;
      next_x_.bytes -= at_once * stretch;
    }
    t.first_field = static_cast<int>(from * layout_.slots % layout_.fields);
    t.indices = words_at(panel, from);
    t.indices_panel = layout_.panel_words();
    if (p_.decoded.decode != nullptr) {
      const int64_t step_words = p_.decoded.slot_bytes * layout_.slots / static_cast<int64_t>(sizeof(uint32_t));
      t.indices_panel = (std::min(step + p_.block_steps, layout_.steps) - step) * step_words;
      t.indices = reinterpret_cast<const uint32_t*>(decoded_) + (panel - first_decoded_) * t.indices_panel +
                  (from - step) * step_words;
    }
    t.sums = sums_of(tile, panel, at_once);
    StoreSums outputs;
    if (stores) {
      outputs = outputs_to_store(tile, panel);
      t.outputs = &outputs;
    }
    kernel(tile.tile_rows, at_once).run(t);
  }

  // ---- y ----

  uint8_t* outputs_of(const Tile& tile, int64_t output) const {
    const int64_t pixel = first_pixel_ + tile.line * shape_.out[kLastDim] + tile.first;
    return static_cast<uint8_t*>(p_.y) + (pixel * p_.outputs + output) * p_.element_size;
  }

  void fetch_outputs(const Tile& tile, int64_t panel, int64_t at_once) const {
    const uint8_t* y = outputs_of(tile, (first_panel_ + panel) * kPanelRows);
    const int64_t row = p_.outputs * p_.element_size, bytes = at_once * kPanelRows * p_.element_size;
    for (int i = 0; i < tile.rows; ++i, y += row)
      for (int64_t at = 0; at < bytes; at += kCacheLine) fetch_to_write(y + at);
  }

  int64_t outputs_end() const { return (group_ + 1) * (p_.outputs / p_.groups); }  // of the group

  // Whether a kernel can store what it has summed; see LinearTile::outputs.
  bool can_store(const Tile& tile, int64_t panel, int64_t at_once) const {
    return p_.decoded.decode != nullptr && tile.rows == tile.tile_rows && p_.residual == nullptr &&
           (p_.activation == Activation::kNone || p_.activation == Activation::kRelu) &&
           (first_panel_ + panel + at_once) * kPanelRows <= outputs_end();
  }

  // But for the sums.
  StoreSums outputs_to_store(const Tile& tile, int64_t panel) const {
    const int64_t output = (first_panel_ + panel) * kPanelRows;
    StoreSums s;
    s.sums = nullptr;
    s.y_row = p_.outputs;
    s.rows = tile.rows;
    s.activation = p_.activation;
    s.bias = p_.bias ? static_cast<const uint8_t*>(p_.bias) + output * p_.element_size : nullptr;
    s.y = outputs_of(tile, output);
    // Lies as y does.
    const int64_t at = static_cast<uint8_t*>(s.y) - static_cast<uint8_t*>(p_.y);
    s.residual = p_.residual ? static_cast<const uint8_t*>(p_.residual) + at : nullptr;
    s.outputs = static_cast<int>(std::min<int64_t>(kPanelRows, outputs_end() - output));
    return s;
  }

  void store(const Tile& tile, int64_t first, int64_t at_once) const {
    for (int64_t i = 0; i < at_once; ++i) {
      StoreSums s = outputs_to_store(tile, first + i);
      s.sums = sums_of(tile, first, at_once) + i * tile.tile_rows * kPanelRows * sum_size(p_);
      p_.kernels->store(s);
    }
  }

  const ConvProblem& p_;
  const ConvShape& shape_;
  const PanelLayout& layout_;
  int64_t group_, first_panel_, panels_;
  int64_t plane_ = 0, first_line_ = 0, lines_ = 1;
  int64_t first_pixel_;
  int64_t pixels_;                                  // side by side: of each line, or of the block
  int64_t total_rows_ = 0;                          // of all tiles
  int64_t first_early_tile_ = 0, early_tiles_ = 1;  // that fetch the values to be used next
  const uint8_t* channels_;
  LinearTileKernel found_kernels_[kMaxPanelsAtOnce][kMaxTileRows] = {};
  int64_t first_decoded_ = 0;       // the panel whose indices come first
  const uint8_t* early_ = nullptr;  // the values to be used next
  Memory next_x_ = {nullptr, 0};    // not yet asked for
  uint8_t* x_;
  uint8_t* decoded_;
  uint8_t* sums_;
  int32_t* x_steps_;
  const void** x_rows_;
};

}  // namespace

void conv_block(const ConvProblem& problem, int64_t index, void* memory) {
  ConvBlock(problem, index, static_cast<uint8_t*>(memory)).run();
}

}  // namespace nms
