// The packed product without vector instructions: the layout of core/panel_layout.h, read literally.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../../core/convert.h"
#include "../../core/dtype.h"
#include "conv.h"
#include "kernels.h"
#include "linear.h"
#include "target_region.h"

namespace nms {
namespace {

#include "convert_lanes.h"

#include "linear_rows.h"

#include "conv_rows.h"

#include "scalar_tile.h"

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

template <DType D>
LinearTileKernel scalar_conv_tile(const PanelLayout&, int tile_rows, int64_t) {
  switch (tile_rows) {
    case 1:
      return {&scalar_tile<D, 1, true>, 1};
    case 8:
      return {&scalar_tile<D, 8, true>, 1};
    default:
      return {nullptr, 0};
  }
}

DecodedIndices no_decoding(const PanelLayout&) { return {}; }

}  // namespace

ConvTable scalar_conv() {
  ConvTable table;
  table.of[static_cast<int>(DType::kFloat64)] = {&scalar_conv_tile<DType::kFloat64>, &no_decoding};
  table.of[static_cast<int>(DType::kFloat32)] = {&scalar_conv_tile<DType::kFloat32>, &no_decoding};
  table.of[static_cast<int>(DType::kBFloat16)] = {&scalar_conv_tile<DType::kBFloat16>, &no_decoding};
  table.of[static_cast<int>(DType::kFloat16)] = {&scalar_conv_tile<DType::kFloat16>, &no_decoding};
  return table;
}

LinearTable scalar_linear() {
  LinearTable table;
  table.of[static_cast<int>(DType::kFloat64)] = scalar_kernels_of<DType::kFloat64>();
  table.of[static_cast<int>(DType::kFloat32)] = scalar_kernels_of<DType::kFloat32>();
  table.of[static_cast<int>(DType::kBFloat16)] = scalar_kernels_of<DType::kBFloat16>();
  table.of[static_cast<int>(DType::kFloat16)] = scalar_kernels_of<DType::kFloat16>();
  return table;
}

}  // namespace nms
