// Which inner loop runs which pattern of a convolution, for the Formats of one instruction set.
//
// Note    Included inside a target region, after linear_table.h.
#pragma once

template <class Format>
LinearTileKernel find_conv_tile(const PanelLayout& layout, int tile_rows, int64_t panels) {
  if (tile_rows > max_tile_rows<Format>(layout)) return {nullptr, 0};
  // No fewer: those take several sums each, in another order than tiles of more rows, and which tile a pixel belongs to
  // depends on the number of threads.
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
