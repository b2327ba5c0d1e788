// The packed product in integers, without vector instructions.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../../core/convert.h"
#include "../../core/dtype.h"
#include "../../core/quantize.h"
#include "kernels.h"
#include "linear_int8.h"
#include "target_region.h"

namespace nms {
namespace {

#include "convert_lanes.h"

#include "linear_rows.h"

#include "linear_int8_rows.h"

#include "scalar_tile.h"

struct ScalarRounding {
  static constexpr int kOffset = 0;
  static NMS_INLINE void quantize(const float* x, float inverse, uint8_t* packed) {
    for (int i = 0; i < kWindowInputs; ++i) packed[i] = static_cast<uint8_t>(nms::quantize(x[i], inverse));
  }
};

template <int kRows>
constexpr LinearTileKernel kScalarInt8{&scalar_tile<DType::kInt8, kRows, false, int8_t, int32_t>, 1};

LinearTileKernel scalar_int8_tile(const PanelLayout&, int tile_rows, int64_t) {
  return tile_rows == 1 ? kScalarInt8<1> : tile_rows == 4 ? kScalarInt8<4> : kScalarInt8<8>;
}

int scalar_int8_tile_rows(const PanelLayout&) { return 8; }

}  // namespace

Int8Table scalar_int8() {
  Int8Table table;
  use_int8_kernels<ScalarRounding>(table, &scalar_int8_tile_rows, &scalar_int8_tile);
  return table;
}

}  // namespace nms
