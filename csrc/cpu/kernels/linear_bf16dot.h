// The bfloat16 Format of processors with AVX-512 BF16: inputs stay bfloat16, products are taken two at a time.
//
// Note    Included after linear_avx512.h, inside a target region that has avx512bf16.
#pragma once

// Two windows of bfloat16 inputs in one vector: a permutation of 32 places, then two products a lane.
struct BFloat16Dot : BFloat16Outputs {
  static constexpr int kHalves = 2;
  static constexpr int kValueBytes = 64;
  static constexpr int kInputBytes = 64;
  static constexpr int kSlotGroup = kSlotGroupSize;

  using Words = __m512i;
  using Index = __m512i;
  using Value = __m512i;
  using Input = __m512i;

  static constexpr int kSecondWindow = kWindowInputs << 16;  // the high halves look into the upper 16 places

  static NMS_INLINE Words words(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static NMS_INLINE Input input(const void* p) { return in_register(_mm512_loadu_si512(p)); }
  static NMS_INLINE Value value(const void* p) { return _mm512_loadu_si512(p); }
  static constexpr int kIndexBytes = 64;

  static NMS_INLINE Index load_index(const void* p) { return in_register(_mm512_loadu_si512(p)); }
  static NMS_INLINE void store_index(void* p, Index index) { _mm512_storeu_si512(p, index); }

  template <class Slots, int kSlot, int kShift>
  static NMS_INLINE Index index(Words words) {
    constexpr int kStart = Slots::kBits == 2 ? Slots::group_start(kSlot) : 0;
    const __m512i shifted = kShift == 0 ? words : _mm512_srli_epi16(words, kShift);
    return masked_or(shifted, _mm512_set1_epi16((1 << Slots::kBits) - 1),
                     _mm512_set1_epi32(kSecondWindow | kStart << 16 | kStart));
  }
  static NMS_INLINE Index any_index(Words words, int shift) {
    return masked_or(_mm512_srl_epi16(words, _mm_cvtsi32_si128(shift)), _mm512_set1_epi16(15),
                     _mm512_set1_epi32(kSecondWindow));
  }
  template <class Slots, int kSlot>
  static NMS_INLINE Vec multiply_add(Value value, Index index, Input input, Vec sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)value, (__m512bh)_mm512_permutexvar_epi16(index, input));
  }
};
