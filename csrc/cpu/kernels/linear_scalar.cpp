// The packed product without vector instructions: the layout of core/panel_layout.h, read literally.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../../core/convert.h"
#include "../../core/dtype.h"
#include "kernels.h"
#include "linear.h"
#include "target_region.h"

namespace nms {
namespace {

#include "convert_lanes.h"

#include "linear_rows.h"

#include "conv_rows.h"

// Any number of rows up to 16, any pattern.
template <DType D, int kRows>
void scalar_tile(const LinearTile& t) {
  using Bits = typename Element<D>::Bits;
  using Number = typename Arithmetic<D>::Type;
  const PanelLayout& layout = *t.layout;
  const Bits* values = static_cast<const Bits*>(t.values);
  const Number* x = static_cast<const Number*>(t.x);
  Number* sums = static_cast<Number*>(t.sums);
  const uint32_t mask = (1u << layout.index_bits) - 1;
  for (int64_t step = 0; step < t.steps; ++step) {
    for (int slot = 0; slot < layout.slots; ++slot) {
      const int64_t position = t.first_field + step * layout.slots + slot;
      const uint32_t* words = t.indices + layout.word_of(position) * kPanelRows;
      for (int half = 0; half < layout.halves; ++half) {
        const int shift = layout.shift_of(position, half);
        for (int lane = 0; lane < kPanelRows; ++lane) {
          const int place = layout.place_of(words[lane] >> shift & mask, slot);
          const Number value = to_arithmetic<D>(values[lane * layout.halves + half]);
          for (int row = 0; row < kRows; ++row)
            sums[row * kPanelRows + lane] += value * x[(row * layout.halves + half) * kWindowInputs + place];
        }
      }
      values += layout.slot_values();
    }
    x += kRows * layout.halves * kWindowInputs;
  }
}

template <DType D>
LinearTileKernel scalar_find_tile(const PanelLayout&, int tile_rows, int64_t) {
  switch (tile_rows) {
    case 1:
      return {&scalar_tile<D, 1>, 1};
    case 4:
      return {&scalar_tile<D, 4>, 1};
    default:
      return {&scalar_tile<D, 8>, 1};
  }
}

int scalar_max_tile_rows(const PanelLayout&) { return 8; }

template <DType D>
LinearKernels scalar_kernels_of() {
  using Number = typename Arithmetic<D>::Type;
  return {sizeof(Number),         &scalar_max_tile_rows, &scalar_find_tile<D>,
          &pack_input<D, Number>, &pack_rows<D, Number>, &store_sums<D>};
}

}  // namespace

LinearTable scalar_linear() {
  LinearTable table;
  table.of[static_cast<int>(DType::kFloat64)] = scalar_kernels_of<DType::kFloat64>();
  table.of[static_cast<int>(DType::kFloat32)] = scalar_kernels_of<DType::kFloat32>();
  table.of[static_cast<int>(DType::kBFloat16)] = scalar_kernels_of<DType::kBFloat16>();
  table.of[static_cast<int>(DType::kFloat16)] = scalar_kernels_of<DType::kFloat16>();
  return table;
}

}  // namespace nms
