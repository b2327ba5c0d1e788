// The product with packed bfloat16 weights along their rows, with AVX-512 BF16.
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
#include "matmul.h"
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

#include "linear_tile.h"

#include "transpose_avx512.h"

#include "matmul_dense_avx512.h"

#include "matmul_rows.h"

// Two rows of W at a time.
struct PairProducts512 {
  static constexpr int kLanes = 16, kVectors = 4;
  using Vec = __m512;
  using Numbers = __m512i;
  static NMS_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static NMS_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
  static NMS_INLINE Numbers numbers(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static NMS_INLINE Numbers spread(const uint8_t* p) {
    int32_t two;
    std::memcpy(&two, p, sizeof(two));
    return _mm512_set1_epi32(two);
  }
  static NMS_INLINE Vec multiply_add(Numbers a, Numbers b, Vec sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
};

}  // namespace

void use_avx512_bf16_matmul(MatmulTable& table) {
  table.of[static_cast<int>(DType::kBFloat16)] = {4,
                                                  2,
                                                  &dense_rows_of<DenseBFloat16Pairs>,
                                                  &block_product<PairProducts512>,
                                                  &pack_units<DType::kBFloat16, uint16_t, 2>,
                                                  &store_strip<DType::kBFloat16>};
}

}  // namespace nms

NMS_TARGET_REGION_END

#endif
