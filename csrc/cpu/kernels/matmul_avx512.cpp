// The product with packed weights along their rows, with AVX-512F. matmul_avx512_bf16.cpp has the bfloat16 kernels of
// newer processors.
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

NMS_TARGET_REGION("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

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

struct Products512 {
  static constexpr int kLanes = 16, kVectors = 4;
  using Vec = __m512;
  using Numbers = __m512;
  static NMS_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static NMS_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
  static NMS_INLINE Numbers numbers(const uint8_t* p) { return _mm512_loadu_ps(p); }
  static NMS_INLINE Numbers spread(const uint8_t* p) { return _mm512_set1_ps(*reinterpret_cast<const float*>(p)); }
  static NMS_INLINE Vec multiply_add(Numbers a, Numbers b, Vec sum) { return _mm512_fmadd_ps(a, b, sum); }
};

template <DType D, class Source>
MatmulKernels kernels_of() {
  return {4, 1, &dense_rows_of<Source>, &block_product<Products512>, &pack_units<D, float>, &store_strip<D>};
}

}  // namespace

void use_avx512_matmul(MatmulTable& table) {
  table.of[static_cast<int>(DType::kFloat32)] = kernels_of<DType::kFloat32, DenseFloat32>();
  table.of[static_cast<int>(DType::kFloat16)] = kernels_of<DType::kFloat16, DenseFloat16>();
  table.of[static_cast<int>(DType::kBFloat16)] = kernels_of<DType::kBFloat16, DenseBFloat16>();
}

}  // namespace nms

NMS_TARGET_REGION_END

#endif
