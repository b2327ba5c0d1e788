// The packed product in integers with AVX2.
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

NMS_TARGET_REGION("avx2,fma,f16c")

namespace nms {
namespace {

#include "convert_lanes.h"

#include "convert_avx2.h"

#include "linear_rows.h"

#include "linear_avx2.h"

#include "linear_int8_rows.h"

// Byte w of a lane looks into window w. A shuffle reaches one window and gives 0 where an index is negative, so four
// of them, each with the other bytes' indices made negative, are put together.
struct Int8Shuffle {
  static constexpr int kLanes = 16;  // a lookup reaches a whole window
  static constexpr int kMaxRows = 4;
  static constexpr int kSharedPanels = 1;
  static constexpr int kMaxSharedRows = 4;
  static constexpr int kBusySums = 1;  // the sums are not what it waits for
  static constexpr int kHalves = 4;
  static constexpr int kValueBytes = 64;
  static constexpr int kInputBytes = 64;
  static constexpr int kSlotGroup = 1;

  struct Vec {
    __m256i low, high;  // rows 0 to 7 and 8 to 15 of the panel
  };
  struct Index {
    __m256i low[kHalves], high[kHalves];  // by window
  };
  struct Value {
    Vec signs, magnitudes;
  };
  struct Input {
    __m256i window[kHalves];  // in both halves of the vector
  };
  using Words = Vec;

  static NMS_INLINE void then(Vec& v, const uint8_t*& p, const uint8_t*& q) {
    asm("" : "+x"(v.low), "+x"(v.high), "+r"(p), "+r"(q));
  }

  static NMS_INLINE Vec zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static NMS_INLINE Vec add(const Vec& a, const Vec& b) {
    return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
  }
  static NMS_INLINE Vec load_sums(const void* sums, int row) {
    return load(static_cast<const int32_t*>(sums) + row * kPanelRows);
  }
  static NMS_INLINE void store_sums(void* sums, int row, const Vec& v) {
    __m256i* p = static_cast<__m256i*>(sums) + 2 * row;
    _mm256_storeu_si256(p, v.low);
    _mm256_storeu_si256(p + 1, v.high);
  }

  static NMS_INLINE Words words(const uint32_t* p) { return load(p); }
  static NMS_INLINE Value value(const void* p) {
    const Vec v = load(p);
    return {v, {_mm256_abs_epi8(v.low), _mm256_abs_epi8(v.high)}};
  }
  static NMS_INLINE Input input(const void* p) {
    Input in;
    NMS_UNROLL
    for (int w = 0; w < kHalves; ++w)
      in.window[w] = _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p) + w));
    return in;
  }

  template <class Slots, int kSlot, int kShift>
  static NMS_INLINE Index index(const Words& words) {
    const int start = Slots::kBits == 2 ? Slots::group_start(kSlot) : 0;
    return places({_mm256_srli_epi32(words.low, kShift), _mm256_srli_epi32(words.high, kShift)}, Slots::kBits, start);
  }
  static NMS_INLINE Index any_index(const Words& words, int shift) {
    const __m128i count = _mm_cvtsi32_si128(shift);
    return places({_mm256_srl_epi32(words.low, count), _mm256_srl_epi32(words.high, count)}, 4, 0);
  }
  template <class Slots, int kSlot>
  static NMS_INLINE Vec multiply_add(const Value& value, const Index& index, const Input& input, const Vec& sum) {
    return {dot(value.signs.low, value.magnitudes.low, lookup(input, index.low), sum.low),
            dot(value.signs.high, value.magnitudes.high, lookup(input, index.high), sum.high)};
  }

 private:
  static NMS_INLINE Vec load(const void* p) {
    return {load_integers(p), load_integers(static_cast<const uint8_t*>(p) + sizeof(__m256i))};
  }

  static NMS_INLINE Index places(const Vec& fields, int bits, int start) {
    Index index;
    NMS_UNROLL
    for (int w = 0; w < kHalves; ++w) {
      const uint32_t byte = 0xffu << (8 * w);
      const __m256i mask = _mm256_set1_epi32(static_cast<int>(((1u << bits) - 1) << (8 * w)));
      const __m256i rest =
          _mm256_set1_epi32(static_cast<int>((0x80808080u & ~byte) | static_cast<uint32_t>(start) << (8 * w)));
      index.low[w] = _mm256_or_si256(_mm256_and_si256(fields.low, mask), rest);
      index.high[w] = _mm256_or_si256(_mm256_and_si256(fields.high, mask), rest);
    }
    return index;
  }

  static NMS_INLINE __m256i lookup(const Input& input, const __m256i (&index)[kHalves]) {
    const __m256i first =
        _mm256_or_si256(_mm256_shuffle_epi8(input.window[0], index[0]), _mm256_shuffle_epi8(input.window[1], index[1]));
    const __m256i last =
        _mm256_or_si256(_mm256_shuffle_epi8(input.window[2], index[2]), _mm256_shuffle_epi8(input.window[3], index[3]));
    return _mm256_or_si256(first, last);
  }

  // Signs go to x, whose integers have no -128: a pair of products is at most 2 * 128 * 127 and fits into 16 bits.
  static NMS_INLINE __m256i dot(__m256i signs, __m256i magnitudes, __m256i x, __m256i sum) {
    const __m256i pairs = _mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(x, signs));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};

struct Avx2Rounding {
  static constexpr int kOffset = 0;
  static NMS_INLINE void quantize(const float* x, float inverse, uint8_t* packed) {
    const __m256 factor = _mm256_set1_ps(inverse);
    const __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), factor));
    const __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8), factor));
    // Packing works within 128 bits: put the four quarters back in order.
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xD8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), bytes);
  }
};

#include "linear_tile.h"

#include "conv_rows.h"

#include "linear_table.h"

}  // namespace

void use_avx2_int8(Int8Table& table) {
  use_int8_kernels<Avx2Rounding>(table, &max_tile_rows<Int8Shuffle>, &find_tile<Int8Shuffle>);
}

}  // namespace nms

NMS_TARGET_REGION_END

#endif
