// Which inner loop runs which pattern, for the Formats of one instruction set.
//
// Note    Included inside a target region, last.
#pragma once

// Panels that share each look at x. With few slots a window, x would be read as often as it is used.
template <class Format>
constexpr int shared_panels(int slots, int rows) {
  return slots <= 2 && rows <= Format::kMaxSharedRows ? Format::kSharedPanels : 1;
}

// What `known` returns for the layout's pattern, called as known.operator()<Slots>(), or else `other`.
template <class Format, class Known, class Result>
Result by_pattern(const PanelLayout& layout, const Known& known, Result other) {
  // Vectors as long as a window do not care in which half of it a group lies.
  constexpr int kEight = Format::kLanes < kWindowInputs ? 8 : 16;
  if (layout.index_bits == 2) {
    if (layout.m == 2) return known.template operator()<GroupFields<1, 2>>();
    if (layout.n == 2) return known.template operator()<GroupFields<2, 4>>();
    return known.template operator()<GroupFields<1, 4>>();
  }
  if (layout.m == 8) {
    if (layout.n == 1) return known.template operator()<WindowFields<2, kEight>>();
    if (layout.n == 2) return known.template operator()<WindowFields<4, kEight>>();
    if (layout.n == 4) return known.template operator()<WindowFields<8, kEight>>();
  }
  switch (layout.slots) {
    case 1:
      return known.template operator()<WindowFields<1, 16>>();
    case 2:
      return known.template operator()<WindowFields<2, 16>>();
    case 4:
      return known.template operator()<WindowFields<4, 16>>();
    case 8:
      return known.template operator()<WindowFields<8, 16>>();
    default:
      return other;
  }
}

template <class Format, int kRows, bool kPlaced = false>
LinearTileKernel pattern_kernel(const PanelLayout& layout, int64_t panels) {
  const auto known = [panels]<class Slots>() -> LinearTileKernel {
    constexpr int kShared = shared_panels<Format>(Slots::kSlots, kRows);
    if (panels >= kShared) return {&Tile<Format, Slots, kRows, kShared, kPlaced>::run, kShared};
    return {&Tile<Format, Slots, kRows, 1, kPlaced>::run, 1};
  };
  return by_pattern<Format>(layout, known, LinearTileKernel{&AnyTile<Format, kRows, kPlaced>::run, 1});
}

template <class Format>
LinearTileKernel find_tile(const PanelLayout& layout, int tile_rows, int64_t panels) {
  switch (tile_rows) {
    case 1:
      return pattern_kernel<Format, 1>(layout, panels);
    case 4:
      return pattern_kernel<Format, 4>(layout, panels);
    default:
      break;
  }
  if constexpr (Format::kMaxRows >= 8)
    if (tile_rows == 8) return pattern_kernel<Format, 8>(layout, panels);
  if constexpr (Format::kMaxRows >= 16)
    if (tile_rows == 16) return pattern_kernel<Format, 16>(layout, panels);
  return {nullptr, 0};
}

template <class Format>
int max_tile_rows(const PanelLayout& layout) {
  return layout.slots <= 2 ? Format::kMaxSharedRows : Format::kMaxRows;
}

template <DType D, class Format, class Packed>
LinearKernels linear_kernels() {
  return {sizeof(Packed),         &max_tile_rows<Format>, &find_tile<Format>,
          &pack_input<D, Packed>, &pack_rows<D, Packed>,  &store_sums<D>};
}
