// The packed product with AVX2.
#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../../core/convert.h"
#include "../../core/dtype.h"
#include "kernels.h"
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

}  // namespace

void use_avx2_linear(LinearTable& table) {
  table.of[static_cast<int>(DType::kFloat32)] = linear_kernels<DType::kFloat32, Float32, float>();
  table.of[static_cast<int>(DType::kFloat16)] = linear_kernels<DType::kFloat16, Float16, float>();
  table.of[static_cast<int>(DType::kBFloat16)] = linear_kernels<DType::kBFloat16, BFloat16, float>();
}

}  // namespace nms

NMS_TARGET_REGION_END

#endif
