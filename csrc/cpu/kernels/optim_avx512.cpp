// Optimizer steps with AVX-512F, sixteen weights at a time.
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

// GCC 12's own intrinsics leave don't-care operands uninitialised, and warn about it (GCC bug 105593).
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

NMS_TARGET_REGION(NMS_AVX512 ",fma,f16c")

namespace nms {
namespace {

#include "convert_lanes.h"

#include "convert_avx512.h"

struct KeptLanes {
  __mmask16 bits;

  static NMS_INLINE KeptLanes of_bits(uint16_t bits) { return {bits}; }
  static NMS_INLINE KeptLanes of_words(const uint32_t* words) {
    const __m512i all = _mm512_loadu_si512(words);
    return {_mm512_test_epi32_mask(all, all)};
  }
  static NMS_INLINE KeptLanes all() { return {0xFFFF}; }
};

struct Lanes {
  __m512 v;

  static NMS_INLINE Lanes of(double x) { return {_mm512_set1_ps(static_cast<float>(x))}; }
  static NMS_INLINE Lanes load(const void* p) { return {_mm512_loadu_ps(p)}; }
  NMS_INLINE void store(void* p) const { _mm512_storeu_ps(p, v); }
};

NMS_INLINE Lanes operator*(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
NMS_INLINE Lanes operator+(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
NMS_INLINE Lanes operator-(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
NMS_INLINE Lanes operator-(Lanes a) { return {_mm512_xor_ps(a.v, _mm512_set1_ps(-0.0f))}; }
NMS_INLINE Lanes operator/(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }
NMS_INLINE Lanes square_root(Lanes a) { return {_mm512_sqrt_ps(a.v)}; }
NMS_INLINE Lanes choose(KeptLanes kept, Lanes a, Lanes b) { return {_mm512_mask_blend_ps(kept.bits, b.v, a.v)}; }
NMS_INLINE Lanes larger(Lanes a, Lanes b) { return choose(KeptLanes{_mm512_cmp_ps_mask(b.v, a.v, _CMP_LE_OQ)}, a, b); }

#include "../../core/optim_step.h"

#include "optim_loops.h"

}  // namespace

OptimTable avx512_optim() { return lanes_table(); }

}  // namespace nms

NMS_TARGET_REGION_END

#endif
