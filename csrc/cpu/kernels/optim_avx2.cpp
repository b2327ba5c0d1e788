// Optimizer steps with AVX2, sixteen weights at a time in two vectors.
#if defined(__x86_64__)

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../../core/convert.h"
#include "../../core/dtype.h"
#include "../../core/optim.h"
#include "optim.h"
#include "target_region.h"

NMS_TARGET_REGION("avx2,fma,f16c")

namespace nms {
namespace {

#include "convert_lanes.h"

#include "convert_avx2.h"

struct KeptLanes {
  __m256 low, high;  // all ones or zero

  static NMS_INLINE KeptLanes of_bits(uint16_t bits) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const auto spread = [bit](int byte) {
      return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(byte), bit), bit));
    };
    return {spread(bits & 0xFF), spread(bits >> 8)};
  }
  static NMS_INLINE KeptLanes of_words(const uint32_t* words) {
    const float* w = reinterpret_cast<const float*>(words);
    return {_mm256_loadu_ps(w), _mm256_loadu_ps(w + 8)};
  }
  static NMS_INLINE KeptLanes all() {
    const __m256 ones = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
    return {ones, ones};
  }
};

struct Lanes {
  __m256 low, high;

  static NMS_INLINE Lanes of(double x) {
    const __m256 all = _mm256_set1_ps(static_cast<float>(x));
    return {all, all};
  }
  static NMS_INLINE Lanes load(const void* p) {
    const float* from = static_cast<const float*>(p);
    return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
  }
  NMS_INLINE void store(void* p) const {
    float* to = static_cast<float*>(p);
    _mm256_storeu_ps(to, low);
    _mm256_storeu_ps(to + 8, high);
  }
};

NMS_INLINE Lanes operator*(Lanes a, Lanes b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
NMS_INLINE Lanes operator+(Lanes a, Lanes b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
NMS_INLINE Lanes operator-(Lanes a, Lanes b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
NMS_INLINE Lanes operator-(Lanes a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_xor_ps(a.low, sign), _mm256_xor_ps(a.high, sign)};
}
NMS_INLINE Lanes operator/(Lanes a, Lanes b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
NMS_INLINE Lanes square_root(Lanes a) { return {_mm256_sqrt_ps(a.low), _mm256_sqrt_ps(a.high)}; }
NMS_INLINE Lanes choose(KeptLanes kept, Lanes a, Lanes b) {
  return {_mm256_blendv_ps(b.low, a.low, kept.low), _mm256_blendv_ps(b.high, a.high, kept.high)};
}
NMS_INLINE Lanes larger(Lanes a, Lanes b) {
  const KeptLanes not_above{_mm256_cmp_ps(b.low, a.low, _CMP_LE_OQ), _mm256_cmp_ps(b.high, a.high, _CMP_LE_OQ)};
  return choose(not_above, a, b);
}

#include "../../core/optim_step.h"

#include "optim_loops.h"

}  // namespace

OptimTable avx2_optim() { return lanes_table(); }

}  // namespace nms

NMS_TARGET_REGION_END

#endif
