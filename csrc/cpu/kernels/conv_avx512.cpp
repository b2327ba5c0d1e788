// The inner loops of packed convolutions with AVX-512F. conv_avx512_bf16.cpp has those of bfloat16 on newer processors.
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

// GCC 12's own intrinsics leave don't-care operands uninitialised, and warn about it (GCC bug 105593).
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

NMS_TARGET_REGION("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

namespace nms {
namespace {

#include "convert_lanes.h"

#include "convert_avx512.h"

#include "linear_rows.h"

#include "linear_avx512.h"

#include "linear_tile.h"

#include "conv_rows.h"

#include "linear_table.h"

#include "conv_tile.h"

#include "conv_table.h"

}  // namespace

void use_avx512_conv(ConvTable& table) {
  table.of[static_cast<int>(DType::kFloat32)] = conv_kernels<Float32>();
  table.of[static_cast<int>(DType::kFloat16)] = conv_kernels<Float16>();
  table.of[static_cast<int>(DType::kBFloat16)] = conv_kernels<BFloat16>();
}

}  // namespace nms

NMS_TARGET_REGION_END

#endif
