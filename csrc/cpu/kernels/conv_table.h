// Which inner loop runs which pattern of a convolution, for the Formats of one instruction set.
//
// Note    Included inside a target region, after linear_table.h and conv_tile.h.
#pragma once

template <class Format, int kRows>
LinearTileKernel conv_kernel(const PanelLayout& layout, int64_t panels) {
  if constexpr (Format::kIndexBytes == 0) {
    return pattern_kernel<Format, kRows, true>(layout, panels);
  } else {
    const auto known = [panels]<class Slots>() -> LinearTileKernel {
      constexpr int kShared = shared_panels<Format>(Slots::kSlots, kRows);
      if (panels >= kShared) return {&DecodedTile<Format, Slots, kRows, kShared>::run, kShared};
      return {&DecodedTile<Format, Slots, kRows, 1>::run, 1};
    };
    return by_pattern<Format>(layout, known, LinearTileKernel{&AnyTile<Format, kRows, true>::run, 1});
  }
}

template <class Format>
LinearTileKernel find_conv_tile(const PanelLayout& layout, int tile_rows, int64_t panels) {
  if (tile_rows > max_tile_rows<Format>(layout)) return {nullptr, 0};
  // No fewer: a single row's sums would wait for each other.
  if (tile_rows == 4) return conv_kernel<Format, 4>(layout, panels);
  if constexpr (Format::kMaxRows >= 8) {
    if (tile_rows == 7) return conv_kernel<Format, 7>(layout, panels);
    if (tile_rows == 8) return conv_kernel<Format, 8>(layout, panels);
  }
  if constexpr (Format::kMaxRows >= 16) {
    if (tile_rows == 14) return conv_kernel<Format, 14>(layout, panels);
    if (tile_rows == 16) return conv_kernel<Format, 16>(layout, panels);
  }
  return {nullptr, 0};
}

template <class Format>
DecodedIndices find_decode(const PanelLayout& layout) {
  if constexpr (Format::kIndexBytes == 0) {
    return {};
  } else {
    const auto known = []<class Slots>() -> DecodedIndices {
      return {&Decode<Format, Slots>::run, Format::kIndexBytes};
    };
    return by_pattern<Format>(layout, known, DecodedIndices{});
  }
}

template <class Format>
ConvKernels conv_kernels() {
  return {&find_conv_tile<Format>, &find_decode<Format>};
}
