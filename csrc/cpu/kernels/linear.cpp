// The packed product of a block of panels with a tile of the batch: the loops around the inner loop.
#include "linear.h"

#include <algorithm>

namespace nms {
namespace {

constexpr int kTileRows[] = {1, 4, 8, kMaxTileRows};  // for which there are kernels

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

BatchTiles::BatchTiles(int64_t batch, int max_tile_rows)
    : batch_(batch), count_(ceil_div(batch, max_tile_rows)), max_rows_(max_tile_rows), last_tile_rows_(max_tile_rows) {
  if (count_ == 0) return;
  const int64_t last = batch - (count_ - 1) * max_tile_rows;
  for (int rows : kTileRows)
    if (rows >= last && rows < last_tile_rows_) last_tile_rows_ = rows;
}

int64_t packed_row_bytes(const LinearKernels& kernels, const PanelLayout& layout) {
  return layout.steps * layout.halves * kWindowInputs * kernels.input_bytes;
}

void choose_blocks(LinearProblem& problem, int64_t threads) {
  constexpr int64_t kFirstCache = 24 << 10;    // of x; the rest is for values on their way
  constexpr int64_t kSecondCache = 384 << 10;  // of weights, which stay while tile after tile passes by
  const PanelLayout& layout = problem.layout;
  const BatchTiles tiles(problem.batch, problem.kernels->max_tile_rows(layout));
  const int64_t step_bytes =
      std::max<int64_t>(1, tiles.tile_rows(0) * layout.halves * kWindowInputs * problem.kernels->input_bytes);
  // Steps end with a word of indices only after `unroll` of them; an odd number of slots never ends with a word
  // soon, but its kernels can begin within one.
  problem.block_steps = std::max<int64_t>(1, kFirstCache / step_bytes / layout.unroll) * layout.unroll;
  const int64_t panel_bytes = std::max<int64_t>(
      1, layout.panel_values() * problem.element_size + layout.panel_words() * int64_t{sizeof(uint32_t)});
  const int64_t fitting = std::clamp<int64_t>(kSecondCache / panel_bytes, 1, kMaxBlockPanels);
  // Several blocks per thread, so that one that is held up does not hold up all.
  const int64_t share = ceil_div(problem.panels * tiles.count(), 4 * std::max<int64_t>(1, threads) * tiles.count());
  problem.block_panels = std::clamp<int64_t>(share, std::min<int64_t>(2, fitting), fitting);
}

int64_t block_count(const LinearProblem& problem) {
  const BatchTiles tiles(problem.batch, problem.kernels->max_tile_rows(problem.layout));
  return ceil_div(problem.panels, problem.block_panels) * tiles.count();
}

void multiply_block(const LinearProblem& problem, int64_t index) {
  const PanelLayout& layout = problem.layout;
  const LinearKernels& kernels = *problem.kernels;
  const BatchTiles tiles(problem.batch, kernels.max_tile_rows(layout));
  const int64_t tile = index % tiles.count();
  const int64_t first_panel = index / tiles.count() * problem.block_panels;
  const int64_t panels = std::min(problem.block_panels, problem.panels - first_panel);
  const int tile_rows = tiles.tile_rows(tile);

  const int64_t sum_bytes = problem.element_size == 8 ? 8 : 4;
  const int64_t panel_sum_bytes = tile_rows * kPanelRows * sum_bytes;
  alignas(64) uint8_t sums[kMaxBlockPanels * kMaxTileRows * kPanelRows * sizeof(double)];
  std::fill_n(sums, panels * panel_sum_bytes, uint8_t{0});

  const int64_t step_values = layout.slots * layout.slot_values() * problem.element_size;
  const int64_t step_inputs = tile_rows * layout.halves * kWindowInputs * kernels.input_bytes;
  const uint8_t* x = static_cast<const uint8_t*>(problem.packed_x) +
                     tiles.first_row(tile) * packed_row_bytes(kernels, layout);
  LinearTile t;
  t.layout = &layout;
  t.values_panel = layout.panel_values() * problem.element_size;
  t.indices_panel = layout.panel_words();
  for (int64_t step = 0; step < layout.steps; step += problem.block_steps) {
    t.steps = std::min(problem.block_steps, layout.steps - step);
    t.x = x + step * step_inputs;
    t.first_field = static_cast<int>(step * layout.slots % layout.fields);
    const int64_t first_word = layout.word_of(step * layout.slots);
    for (int64_t panel = 0; panel < panels;) {
      const LinearTileKernel kernel = kernels.tile(layout, tile_rows, panels - panel);
      t.values = static_cast<const uint8_t*>(problem.values) + (first_panel + panel) * t.values_panel +
                 step * step_values;
      t.indices = problem.indices + (first_panel + panel) * t.indices_panel + first_word * kPanelRows;
      t.sums = sums + panel * panel_sum_bytes;
      kernel.run(t);
      panel += kernel.panels;
    }
  }

  StoreSums s;
  s.y_row = problem.rows;
  s.rows = tiles.rows(tile);
  s.activation = problem.activation;
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t first_output = (first_panel + panel) * kPanelRows;
    s.sums = sums + panel * panel_sum_bytes;
    s.bias = problem.bias ? static_cast<const uint8_t*>(problem.bias) + first_output * problem.element_size : nullptr;
    s.y = static_cast<uint8_t*>(problem.y) +
          (tiles.first_row(tile) * problem.rows + first_output) * problem.element_size;
    s.outputs = static_cast<int>(std::min<int64_t>(kPanelRows, problem.rows - first_output));
    kernels.store(s);
  }
}

}  // namespace nms
