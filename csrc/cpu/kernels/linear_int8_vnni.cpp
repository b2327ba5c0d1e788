// The packed product in integers with AVX-512 VNNI (dot products of bytes) and VBMI (permutations of bytes).
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
#include "../../core/quantize.h"
#include "kernels.h"
#include "linear_int8.h"
#include "target_region.h"

// GCC 12's own intrinsics leave don't-care operands uninitialised, and warn about it (GCC bug 105593).
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

NMS_TARGET_REGION("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,avx2,fma,f16c")

namespace nms {
namespace {

#include "convert_lanes.h"

#include "convert_avx512.h"

#include "linear_rows.h"

#include "linear_avx512.h"

#include "linear_int8_rows.h"

// A step's 64 inputs are one vector, and a lane's four indices choose among all of them: window w begins at 16 w.
struct Int8Dot {
  static constexpr int kLanes = 16;
  static constexpr int kMaxRows = 16;
  static constexpr int kSharedPanels = 2;
  static constexpr int kMaxSharedRows = 8;
  static constexpr int kBusySums = 4;  // a dot product takes four cycles
  static constexpr int kHalves = 4;
  static constexpr int kValueBytes = 64;
  static constexpr int kInputBytes = 64;
  static constexpr int kSlotGroup = kSlotGroupSize;

  using Vec = __m512i;
  using Words = __m512i;
  using Index = __m512i;
  using Value = __m512i;
  using Input = __m512i;

  static NMS_INLINE void then(Vec& v, const uint8_t*& p, const uint8_t*& q) { asm("" : "+v"(v), "+r"(p), "+r"(q)); }

  static NMS_INLINE Vec zero() { return _mm512_setzero_si512(); }
  static NMS_INLINE Vec add(Vec a, Vec b) { return _mm512_add_epi32(a, b); }
  static NMS_INLINE Vec load_sums(const void* sums, int row) {
    return _mm512_loadu_si512(static_cast<const int32_t*>(sums) + row * kPanelRows);
  }
  static NMS_INLINE void store_sums(void* sums, int row, Vec v) {
    _mm512_storeu_si512(static_cast<int32_t*>(sums) + row * kPanelRows, v);
  }

  static NMS_INLINE Words words(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static NMS_INLINE Value value(const void* p) { return _mm512_loadu_si512(p); }
  static NMS_INLINE Input input(const void* p) { return in_register(_mm512_loadu_si512(p)); }

  template <class Slots, int kSlot, int kShift>
  static NMS_INLINE Index index(Words words) {
    const __m512i shifted = kShift == 0 ? words : _mm512_srli_epi32(words, kShift);
    const int start = Slots::kBits == 2 ? Slots::group_start(kSlot) : 0;
    return places(shifted, Slots::kBits, start);
  }
  static NMS_INLINE Index any_index(Words words, int shift) {
    return places(_mm512_srl_epi32(words, _mm_cvtsi32_si128(shift)), 4, 0);
  }
  template <class Slots, int kSlot>
  static NMS_INLINE Vec multiply_add(Value value, Index index, Input input, Vec sum) {
    return _mm512_dpbusd_epi32(sum, _mm512_permutexvar_epi8(index, input), value);
  }

 private:
  static NMS_INLINE Index places(__m512i fields, int bits, int start) {
    constexpr int kEveryByte = 0x01010101, kWindowStarts = 0x30201000;
    return masked_or(fields, _mm512_set1_epi32(((1 << bits) - 1) * kEveryByte),
                     _mm512_set1_epi32(kWindowStarts + start * kEveryByte));
  }
};

struct VnniRounding {
  static constexpr int kOffset = 128;
  static NMS_INLINE void quantize(const float* x, float inverse, uint8_t* packed) {
    const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), _mm512_set1_ps(inverse)));
    const __m128i bytes = _mm_xor_si128(_mm512_cvtepi32_epi8(rounded), _mm_set1_epi8(static_cast<char>(kOffset)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), bytes);
  }
};

#include "linear_tile.h"

#include "conv_rows.h"

#include "linear_table.h"

}  // namespace

void use_vnni_int8(Int8Table& table) {
  use_int8_kernels<VnniRounding>(table, &max_tile_rows<Int8Dot>, &find_tile<Int8Dot>);
}

}  // namespace nms

NMS_TARGET_REGION_END

#endif
