// From strided tensors to the kernels' panels, and panels to threads.
//
// Layout  A weight is rows x k: k runs along the group dim, a row is one choice of all other dims, counted in their
//         order (which is also the order of rows in packed outputs). Neighbouring dims that one stride describes are
//         merged, so a contiguous [O, I] and a channels_last [O, I, H, W] weight are one panel of rows; an OIHW weight
//         grouped along I is O panels of H*W rows.
// Launch  Panels are cut into tiles of about kTileElements, which torch's own thread pool works through.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "../torch_utils.h"

namespace nms {

constexpr int64_t kTileElements = 16384;  // 64 KiB of float32: in and out stay within a core's second-level cache

// Less than this is done sooner than a second thread is awake.
constexpr int64_t kGrainElements = 4 * kTileElements;

// Outputs of at least this many bytes are written past the cache: they would not survive in it until they are read,
// and a write without reading the line first saves a third of the traffic.
constexpr int64_t kStreamBytes = int64_t{16} << 20;

struct Operand {               // a strided tensor of the common shape; strides in elements
  std::vector<int64_t> outer;  // per outer dim
  int64_t row = 0, k = 0;
};

struct Panels {
  std::vector<int64_t> outer_sizes;
  int64_t panels = 1, rows = 1, k = 0;  // rows per panel
  Operand a, b;                         // source and, where there is one, destination

  int64_t total_rows() const { return panels * rows; }
  bool empty() const { return total_rows() == 0 || k == 0; }
};

struct Tile {
  int64_t a, b;       // element offsets of its first element
  int64_t first_row;  // counted over all panels
  int64_t first_k;
  int64_t rows, k;
};

// `whole` elements along k must stay together; when rows lie end to end and hold a multiple of it, they become one row.
Panels make_panels(const Tensor& a, const Tensor* b, int64_t dim, int64_t whole);

class Tiling {
 public:
  // Tiles begin at multiples of `unit` along k.
  Tiling(const Panels& panels, int64_t unit);

  int64_t size() const { return panels_.panels * row_tiles_ * k_tiles_; }
  Tile operator[](int64_t index) const;

  // Tiles that are worth a thread of their own.
  int64_t grain() const { return ceil_div(kGrainElements, tile_rows_ * tile_k_); }

 private:
  const Panels& panels_;
  int64_t tile_rows_, tile_k_, row_tiles_, k_tiles_;
};

// fn(tile) for every tile, in parallel.
template <class Fn>
void parallel_tiles(const Panels& panels, int64_t unit, const Fn& fn) {
  if (panels.empty()) return;
  const Tiling tiles(panels, unit);
  torch::stable::parallel_for(0, tiles.size(), tiles.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) fn(tiles[i]);
  });
}

}  // namespace nms
