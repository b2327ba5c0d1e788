// Which inner loop runs which pattern of a convolution, for the Formats of one instruction set.
//
// Note    Included inside a target region, after linear_table.h.
#pragma once

template <class Format>
LinearTileKernel find_conv_tile(const PanelLayout& layout, int tile_rows, int64_t panels) {
  if (tile_rows > max_tile_rows<Format>(layout)) return {nullptr, 0};
  // No fewer: a single row's sums would wait for each other.
  if (tile_rows == 4) return pattern_kernel<Format, 4, true>(layout, panels);
  if constexpr (Format::kMaxRows >= 8) {
    if (tile_rows == 7) return pattern_kernel<Format, 7, true>(layout, panels);
    if (tile_rows == 8) return pattern_kernel<Format, 8, true>(layout, panels);
  }
  if constexpr (Format::kMaxRows >= 16) {
    if (tile_rows == 14) return pattern_kernel<Format, 14, true>(layout, panels);
    if (tile_rows == 16) return pattern_kernel<Format, 16, true>(layout, panels);
  }
  return {nullptr, 0};
}
