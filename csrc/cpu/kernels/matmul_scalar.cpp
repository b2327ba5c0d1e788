// The product with packed weights along their rows, without vector instructions.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../../core/convert.h"
#include "../../core/dtype.h"
#include "kernels.h"
#include "linear.h"
#include "matmul.h"
#include "target_region.h"

namespace nms {
namespace {

#include "convert_lanes.h"

#include "linear_rows.h"

#include "matmul_rows.h"

// The layout of core/panel_layout.h, read literally.
template <DType D>
void scalar_dense_rows(const DenseRows& d) {
  using Bits = typename Element<D>::Bits;
  using Number = typename Arithmetic<D>::Type;
  const PanelLayout& layout = *d.layout;
  const Bits* values = static_cast<const Bits*>(d.values);
  Number* rows = static_cast<Number*>(d.rows);
  const uint32_t mask = (1u << layout.index_bits) - 1;
  for (int lane = 0; lane < kPanelRows; ++lane) std::fill_n(rows + lane * kTileStride, kStripInputs, Number{0});
  for (int64_t step = 0; step < d.steps; ++step) {
    for (int slot = 0; slot < layout.slots; ++slot, values += layout.slot_values()) {
      const int64_t position = (d.first_step + step) * layout.slots + slot;
      const uint32_t* words = d.indices + layout.word_of(position) * kPanelRows;
      for (int half = 0; half < layout.halves; ++half) {
        Number* window = rows + (step * layout.halves + half) * layout.window;
        for (int lane = 0; lane < kPanelRows; ++lane) {
          const int place = layout.place_of(words[lane] >> layout.shift_of(position, half) & mask, slot);
          if (place >= layout.window) continue;  // damaged
          window[lane * kTileStride + place] = to_arithmetic<D>(values[lane * layout.halves + half]);
        }
      }
    }
  }
}

template <class Number>
void scalar_product(const BlockProduct& b) {
  for (int64_t row = 0; row < b.batch; ++row) {
    const Number* x = static_cast<const Number*>(b.x) + row * kBlockUnits;
    Number* sums = static_cast<Number*>(b.sums) + row * kStripInputs;
    for (int64_t unit = 0; unit < b.units; ++unit) {
      const Number* weights = static_cast<const Number*>(b.block) + unit * kTileStride;
      for (int i = 0; i < kStripInputs; ++i) sums[i] += x[unit] * weights[i];
    }
  }
}

template <DType D>
MatmulKernels scalar_kernels_of() {
  using Number = typename Arithmetic<D>::Type;
  return {sizeof(Number),
          1,
          [](const PanelLayout&) -> DenseRowsFn { return &scalar_dense_rows<D>; },
          &scalar_product<Number>,
          &pack_units<D, Number>,
          &store_strip<D>};
}

}  // namespace

MatmulTable scalar_matmul() {
  MatmulTable table;
  table.of[static_cast<int>(DType::kFloat64)] = scalar_kernels_of<DType::kFloat64>();
  table.of[static_cast<int>(DType::kFloat32)] = scalar_kernels_of<DType::kFloat32>();
  table.of[static_cast<int>(DType::kBFloat16)] = scalar_kernels_of<DType::kBFloat16>();
  table.of[static_cast<int>(DType::kFloat16)] = scalar_kernels_of<DType::kFloat16>();
  return table;
}

}  // namespace nms
