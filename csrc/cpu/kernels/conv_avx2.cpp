// The inner loops of packed convolutions with AVX2.
#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "../../core/convert.h"
#include "../../core/dtype.h"
#include "kernels.h"
#include "conv.h"
#include "linear.h"
#include "target_region.h"

NMS_TARGET_REGION("avx2,fma,f16c")

namespace nms {
namespace {

#include "convert_lanes.h"

#include "convert_avx2.h"

#include "linear_rows.h"

#include "linear_avx2.h"

#include "linear_tile.h"

#include "conv_rows.h"

#include "linear_table.h"

#include "conv_tile.h"

#include "conv_table.h"

}  // namespace

void use_avx2_conv(ConvTable& table) {
  table.of[static_cast<int>(DType::kFloat32)] = conv_kernels<Float32>();
  table.of[static_cast<int>(DType::kFloat16)] = conv_kernels<Float16>();
  table.of[static_cast<int>(DType::kBFloat16)] = conv_kernels<BFloat16>();
}

}  // namespace nms

NMS_TARGET_REGION_END

#endif
