// The packed product of bfloat16 weights with AVX-512 BF16.
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

#if !defined(__clang__)  // as in linear_avx512.cpp
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define NMS_REGION_HAS_BF16
NMS_TARGET_REGION("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")

namespace nms {
namespace {

#include "convert_lanes.h"

#include "convert_avx512.h"

#include "linear_rows.h"

#include "linear_avx512.h"

#include "linear_bf16dot.h"

#include "linear_tile.h"

#include "conv_rows.h"

#include "linear_table.h"

}  // namespace

void use_avx512_bf16_linear(LinearTable& table) {
  table.of[static_cast<int>(DType::kBFloat16)] = linear_kernels<DType::kBFloat16, BFloat16Dot, uint16_t>();
}

}  // namespace nms

NMS_TARGET_REGION_END

#endif
