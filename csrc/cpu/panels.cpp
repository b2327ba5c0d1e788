#include "panels.h"

namespace nms {
namespace {

struct Dim {
  int64_t size, a, b;  // strides
};

std::vector<Dim> merged_rows(const Tensor& a, const Tensor* b, int64_t dim) {
  std::vector<Dim> dims;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (d == dim || a.size(d) == 1) continue;
    const Dim next{a.size(d), a.stride(d), b ? b->stride(d) : 0};
    if (!dims.empty() && dims.back().a == next.size * next.a && (!b || dims.back().b == next.size * next.b))
      dims.back() = Dim{dims.back().size * next.size, next.a, next.b};
    else
      dims.push_back(next);
  }
  return dims;
}

}  // namespace

Panels make_panels(const Tensor& a, const Tensor* b, int64_t dim, int64_t whole) {
  std::vector<Dim> dims = merged_rows(a, b, dim);
  if (dims.empty()) dims.push_back(Dim{1, 0, 0});
  Panels panels;
  panels.k = a.size(dim);
  panels.a.k = a.stride(dim);
  panels.b.k = b ? b->stride(dim) : 0;
  panels.rows = dims.back().size;
  panels.a.row = dims.back().a;
  panels.b.row = dims.back().b;
  dims.pop_back();
  for (const Dim& outer : dims) {
    panels.outer_sizes.push_back(outer.size);
    panels.a.outer.push_back(outer.a);
    panels.b.outer.push_back(outer.b);
    panels.panels *= outer.size;
  }

  const bool end_to_end =
      panels.a.k == 1 && panels.a.row == panels.k && (!b || (panels.b.k == 1 && panels.b.row == panels.k));
  if (panels.panels == 1 && panels.rows > 1 && end_to_end && panels.k % whole == 0) {
    panels.k *= panels.rows;
    panels.rows = 1;
  }
  return panels;
}

Tiling::Tiling(const Panels& panels, int64_t unit) : panels_(panels) {
  // Rows next to each other in memory (a strided group dim) are best taken many at a time; else whole rows are.
  constexpr int64_t kInterleavedRows = 256;
  const bool interleaved = panels.a.row == 1 && panels.a.k != 1;
  const int64_t wanted_k = interleaved ? kTileElements / std::min(panels.rows, kInterleavedRows) : kTileElements;
  tile_k_ = std::min(panels.k, std::max<int64_t>(1, wanted_k / unit) * unit);
  tile_rows_ = std::clamp<int64_t>(kTileElements / tile_k_, 1, panels.rows);
  row_tiles_ = ceil_div(panels.rows, tile_rows_);
  k_tiles_ = ceil_div(panels.k, tile_k_);
}

Tile Tiling::operator[](int64_t index) const {
  const int64_t k_tile = index % k_tiles_;
  const int64_t row_tile = index / k_tiles_ % row_tiles_;
  const int64_t panel = index / k_tiles_ / row_tiles_;
  Tile tile;
  tile.first_k = k_tile * tile_k_;
  tile.k = std::min(tile_k_, panels_.k - tile.first_k);
  const int64_t row = row_tile * tile_rows_;
  tile.rows = std::min(tile_rows_, panels_.rows - row);
  tile.first_row = panel * panels_.rows + row;
  tile.a = row * panels_.a.row + tile.first_k * panels_.a.k;
  tile.b = row * panels_.b.row + tile.first_k * panels_.b.k;
  int64_t rest = panel;
  for (size_t d = panels_.outer_sizes.size(); d-- > 0;) {
    const int64_t position = rest % panels_.outer_sizes[d];
    rest /= panels_.outer_sizes[d];
    tile.a += position * panels_.a.outer[d];
    tile.b += position * panels_.b.outer[d];
  }
  return tile;
}

}  // namespace nms
