// The packed product of a block of panels with a tile of the batch: the loops around the inner loop.
#include "linear.h"

#include <algorithm>
#include <cstring>

namespace nms {
namespace {

constexpr int kTileRows[] = {1, 4, 8, kMaxTileRows};  // for which there are kernels

constexpr int64_t kEarlyBytes = 8192;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t sum_size(const LinearProblem& problem) {
  return problem.element_size == int{sizeof(double)} ? int64_t{sizeof(double)} : int64_t{sizeof(float)};
}

// One row of x that lies in memory as its packed tile would.
bool is_packed(const LinearProblem& problem) {
  const PanelLayout& layout = problem.layout;
  return problem.batch == 1 && problem.x_k == 1 && problem.kernels->input_bytes == problem.element_size &&
         layout.window == kWindowInputs && layout.steps * layout.step_inputs() == problem.k;
}

int64_t step_bytes(const LinearProblem& problem, int tile_rows) {
  return int64_t{tile_rows} * problem.layout.halves * kWindowInputs * problem.kernels->input_bytes;
}

// Steps [first, last) of a tile.
void pack_tile(const LinearProblem& problem, const BatchTiles& tiles, int64_t tile, int64_t first, int64_t last,
               void* packed) {
  PackInput p;
  p.x = static_cast<const uint8_t*>(problem.x) + tiles.first_row(tile) * problem.x_row * problem.element_size;
  p.x_row = problem.x_row;
  p.x_k = problem.x_k;
  p.rows = tiles.rows(tile);
  p.k = problem.k;
  p.tile_rows = tiles.tile_rows(tile);
  p.first_step = first;
  p.last_step = last;
  p.packed = packed;
  p.layout = &problem.layout;
  problem.kernels->pack_input(p);
}

// Some panels times some tiles.
class Block {
 public:
  // x: all tiles, packed; or null. stretch: memory for the part of a tile that one call of the kernel reads.
  Block(const LinearProblem& problem, const BatchTiles& tiles, int64_t index, const void* x, void* stretch, void* sums)
      : p_(problem),
        layout_(problem.layout),
        kernels_(*problem.kernels),
        tiles_(tiles),
        x_(static_cast<const uint8_t*>(x)),
        stretch_(stretch),
        sums_(static_cast<uint8_t*>(sums)) {
    const int64_t batch_blocks = ceil_div(tiles_.count(), p_.block_tiles);
    const int64_t panel_blocks = ceil_div(p_.panels, p_.block_panels);
    first_panel_ = (p_.weights_again ? index % panel_blocks : index / batch_blocks) * p_.block_panels;
    first_tile_ = (p_.weights_again ? index / panel_blocks : index % batch_blocks) * p_.block_tiles;
    panels_ = std::min(p_.block_panels, p_.panels - first_panel_);
    last_tile_ = std::min(first_tile_ + p_.block_tiles, tiles_.count());
  }

  void run() {
    if (layout_.steps == 0) std::memset(sums_, 0, static_cast<size_t>(sums_of(last_tile_ - 1, panels_) - sums_));
    for (int64_t step = 0; step < layout_.steps; step += p_.block_steps)
      for (int64_t tile = first_tile_; tile < last_tile_; ++tile) multiply(step, tile);
    for (int64_t tile = first_tile_; tile < last_tile_; ++tile) store(tile);
  }

 private:
  // Sums lie [tile, panel, tile rows, 16].
  uint8_t* sums_of(int64_t tile, int64_t panel) const {
    const int64_t before = (tiles_.first_row(tile) - tiles_.first_row(first_tile_)) * panels_;
    return sums_ + (before + panel * tiles_.tile_rows(tile)) * kPanelRows * sum_size(p_);
  }

  // Adds what the steps from `step` on give for all panels and one tile.
  void multiply(int64_t step, int64_t tile) {
    const int64_t slot = step * layout_.slots;
    const int tile_rows = tiles_.tile_rows(tile);
    LinearTile t;
    t.layout = &layout_;
    t.steps = std::min(p_.block_steps, layout_.steps - step);
    t.values_panel = layout_.panel_values() * p_.value_size();
    t.indices_panel = layout_.panel_words();
    t.first_field = static_cast<int>(slot % layout_.fields);
    t.from_zero = step == 0;
    if (x_ != nullptr) {
      t.x = x_ + tiles_.first_row(tile) * packed_row_bytes(p_) + step * step_bytes(p_, tile_rows);
    } else {
      pack_tile(p_, tiles_, tile, step, step + t.steps, stretch_);
      t.x = stretch_;
    }
    const uint8_t* values = static_cast<const uint8_t*>(p_.values) + first_panel_ * t.values_panel +
                            slot * layout_.slot_values() * p_.value_size();
    const uint32_t* indices = p_.indices + first_panel_ * t.indices_panel + layout_.word_of(slot) * kPanelRows;
    const int64_t stretch = t.steps * layout_.slots * layout_.slot_values() * p_.value_size();  // bytes of a panel
    LinearTileKernel kernel = kernels_.tile(layout_, tile_rows, panels_);
    for (int64_t panel = 0; panel < panels_; panel += kernel.panels) {
      if (panels_ - panel < kernel.panels) kernel = kernels_.tile(layout_, tile_rows, panels_ - panel);
      t.values = values + panel * t.values_panel;
      t.indices = indices + panel * t.indices_panel;
      t.sums = sums_of(tile, panel);
      // Long stretches are fetched shortly before their use. Of short ones the last of several tiles fetches what all
      // will need next; for the others they are in the second cache, and one ahead is early enough.
      const int64_t next = panel + kernel.panels;
      t.early = stretch >= 4 * kEarlyBytes ? static_cast<const uint8_t*>(t.values) + kEarlyBytes
                : t.steps == layout_.steps ? values + next * t.values_panel
                : tile + 1 == last_tile_   ? static_cast<const uint8_t*>(t.values) + stretch
                                           : values + (next < panels_ ? next : 0) * t.values_panel;
      kernel.run(t);
    }
  }

  void store(int64_t tile) const {
    StoreSums s;
    s.y_row = p_.rows;
    s.rows = tiles_.rows(tile);
    s.activation = p_.activation;
    for (int64_t panel = 0; panel < panels_; ++panel) {
      const int64_t output = (first_panel_ + panel) * kPanelRows;
      s.sums = sums_of(tile, panel);
      if (p_.int8.weight_scales) {
        s.int8.x_scales = p_.int8.x_scales + tiles_.first_row(tile);
        s.int8.weight_scales = p_.int8.weight_scales + output;
        s.int8.weight_sums = p_.int8.weight_sums + output;
      }
      s.bias = p_.bias ? static_cast<const uint8_t*>(p_.bias) + output * p_.element_size : nullptr;
      s.y = static_cast<uint8_t*>(p_.y) + (tiles_.first_row(tile) * p_.rows + output) * p_.element_size;
      s.outputs = static_cast<int>(std::min<int64_t>(kPanelRows, p_.rows - output));
      kernels_.store(s);
    }
  }

  const LinearProblem& p_;
  const PanelLayout& layout_;
  const LinearKernels& kernels_;
  const BatchTiles& tiles_;
  const uint8_t* x_;
  void* stretch_;
  uint8_t* sums_;
  int64_t first_panel_, panels_, first_tile_, last_tile_;
};

int64_t packed_bytes(const LinearProblem& problem) {
  if (is_packed(problem)) return 0;
  const BatchTiles tiles(problem.batch, problem.kernels->max_tile_rows(problem.layout));
  const int64_t steps = tiles.count() == 1 ? problem.layout.steps : problem.block_steps;
  return steps * step_bytes(problem, tiles.tile_rows(0));
}

int64_t sum_bytes(const LinearProblem& problem) {
  const BatchTiles tiles(problem.batch, problem.kernels->max_tile_rows(problem.layout));
  return problem.block_panels * problem.block_tiles * tiles.tile_rows(0) * kPanelRows * sum_size(problem);
}

}  // namespace

BatchTiles::BatchTiles(int64_t batch, int max_tile_rows)
    : batch_(batch), count_(ceil_div(batch, max_tile_rows)), max_rows_(max_tile_rows), last_tile_rows_(max_tile_rows) {
  if (count_ == 0) return;
  const int64_t last = batch - (count_ - 1) * max_tile_rows;
  for (int rows : kTileRows)
    if (rows >= last && rows < last_tile_rows_) last_tile_rows_ = rows;
}

int64_t packed_row_bytes(const LinearProblem& problem) { return problem.layout.steps * step_bytes(problem, 1); }

void choose_blocks(LinearProblem& problem, int64_t threads) {
  // Bytes of x between which the next panel has its turn. Of several tiles they stay in the first cache, together with
  // the values on their way; a single tile leaves the second cache to x: the weights only pass through, best without a
  // stop.
  constexpr int64_t kStretch = 16 << 10, kOneTile = 256 << 10;
  // What stays in the second cache while tile after tile passes by.
  constexpr int64_t kWeights = 256 << 10, kSums = 256 << 10;
  const PanelLayout& layout = problem.layout;
  const BatchTiles tiles(problem.batch, problem.kernels->max_tile_rows(layout));
  const int64_t tile_rows = tiles.tile_rows(0);

  const int64_t x_bytes = tiles.count() == 1 && (layout.slots > 2 || tile_rows <= 4) ? kOneTile : kStretch;
  problem.block_steps =
      std::max<int64_t>(1, x_bytes / step_bytes(problem, tiles.tile_rows(0)) / layout.unroll) * layout.unroll;

  const int64_t steps = std::min(problem.block_steps, std::max<int64_t>(1, layout.steps));
  const int64_t weight_bytes = steps * layout.slots * layout.slot_values() * problem.value_size();
  const int64_t fitting = std::clamp<int64_t>(kWeights / weight_bytes, 1, kMaxBlockPanels);
  const int64_t tile_sums = fitting * tile_rows * kPanelRows * sum_size(problem);
  problem.block_tiles = std::clamp<int64_t>(kSums / tile_sums, 1, tiles.count());
  // Several blocks per thread, so that one that is held up does not hold up all.
  const int64_t batch_blocks = ceil_div(tiles.count(), problem.block_tiles);
  const int64_t share = ceil_div(problem.panels * batch_blocks, 4 * std::max<int64_t>(1, threads));
  problem.block_panels = std::clamp<int64_t>(share, std::min<int64_t>(2, fitting), fitting);
  // Blocks alike: threads get equally many of them, and a small one at the end of each row would go to the same thread.
  const int64_t panel_blocks = std::max<int64_t>(1, ceil_div(problem.panels, problem.block_panels));
  problem.block_panels = std::max<int64_t>(1, ceil_div(problem.panels, panel_blocks));
  problem.block_tiles = std::max<int64_t>(1, ceil_div(tiles.count(), std::max<int64_t>(1, batch_blocks)));

  const int64_t all_weights = problem.panels * layout.panel_values() * problem.value_size();
  const int64_t all_x = problem.batch * problem.k * problem.element_size;
  problem.weights_again = all_x + all_weights * batch_blocks < all_weights + all_x * panel_blocks;
}

int64_t block_count(const LinearProblem& problem) {
  const BatchTiles tiles(problem.batch, problem.kernels->max_tile_rows(problem.layout));
  return ceil_div(problem.panels, problem.block_panels) * ceil_div(tiles.count(), problem.block_tiles);
}

int64_t block_memory(const LinearProblem& problem) { return packed_bytes(problem) + sum_bytes(problem); }

void multiply_blocks(const LinearProblem& problem, int64_t first, int64_t last, void* memory) {
  const BatchTiles tiles(problem.batch, problem.kernels->max_tile_rows(problem.layout));
  uint8_t* packed = static_cast<uint8_t*>(memory);
  uint8_t* sums = packed + packed_bytes(problem);
  const void* x = nullptr;
  if (problem.packed_x != nullptr) {
    x = problem.packed_x;
  } else if (is_packed(problem)) {
    x = problem.x;
  } else if (tiles.count() == 1) {
    pack_tile(problem, tiles, 0, 0, problem.layout.steps, packed);
    x = packed;
  }
  for (int64_t i = first; i < last; ++i) Block(problem, tiles, i, x, packed, sums).run();
}

}  // namespace nms
