// How values, indices and inputs of the panel form become AVX2 vectors: two of eight lanes for the rows of a panel.
//
// A lookup reaches eight inputs, half a window. Groups of up to eight lie in one half, which follows from the slot; for
// others both halves are looked up and the right one is chosen. See linear_avx512.h for what a Format is.
//
// Note    Included inside the target region of linear_avx2.cpp.
#pragma once

NMS_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

NMS_INLINE __m256i load_integers(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

struct Sums256 {
  static constexpr int kLanes = 8;
  static constexpr int kMaxRows = 4;  // eight sums, of sixteen registers
  static constexpr int kSharedPanels = 1;
  static constexpr int kMaxSharedRows = 4;
  static constexpr int kBusySums = 4;  // each is two vectors
  static constexpr int kIndexBytes = 0;

  struct Vec {
    __m256 low, high;  // rows 0 to 7 and 8 to 15 of the panel
  };

  // What is read through p and q from here on is read after v is known. No instruction; only compilers take notice.
  static NMS_INLINE void then(Vec& v, const uint8_t*& p, const uint8_t*& q) {
    asm("" : "+x"(v.low), "+x"(v.high), "+r"(p), "+r"(q));
  }

  static NMS_INLINE Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static NMS_INLINE Vec add(const Vec& a, const Vec& b) {
    return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
  }
  static NMS_INLINE Vec load_sums(const void* sums, int row) {
    const float* p = static_cast<const float*>(sums) + row * kPanelRows;
    return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + kLanes)};
  }
  static NMS_INLINE void store_sums(void* sums, int row, const Vec& v) {
    float* p = static_cast<float*>(sums) + row * kPanelRows;
    _mm256_storeu_ps(p, v.low);
    _mm256_storeu_ps(p + kLanes, v.high);
  }
};

// One window of float32 inputs.
struct Lookup256 : Sums256 {
  static constexpr int kHalves = 1;
  static constexpr int kInputBytes = 64;
  static constexpr int kSlotGroup = 1;

  struct Integers {
    __m256i low, high;
  };
  using Words = Integers;
  using Index = Integers;
  using Value = Vec;
  using Input = Vec;  // here low and high are halves of the window

  static NMS_INLINE Words words(const uint32_t* p) { return {load_integers(p), load_integers(p + kLanes)}; }
  static NMS_INLINE Input input(const void* p) { return load_sums(p, 0); }

  template <class Slots, int kSlot, int kShift>
  static NMS_INLINE Index index(const Words& words) {
    return {index_of<Slots, kSlot, kShift>(words.low), index_of<Slots, kSlot, kShift>(words.high)};
  }
  static NMS_INLINE Index any_index(const Words& words, int shift) {
    const __m128i count = _mm_cvtsi32_si128(shift);
    return {_mm256_srl_epi32(words.low, count), _mm256_srl_epi32(words.high, count)};
  }
  template <class Slots, int kSlot>
  static NMS_INLINE Vec multiply_add(const Value& value, const Index& index, const Input& input, const Vec& sum) {
    return {_mm256_fmadd_ps(value.low, lookup<Slots, kSlot>(input, index.low), sum.low),
            _mm256_fmadd_ps(value.high, lookup<Slots, kSlot>(input, index.high), sum.high)};
  }

 private:
  template <class Slots, int kSlot, int kShift>
  static NMS_INLINE __m256i index_of(__m256i words) {
    const __m256i shifted = kShift == 0 ? words : _mm256_srli_epi32(words, kShift);
    if constexpr (Slots::kBits == 4) return shifted;  // the permutation looks at the low three bits only
    constexpr int kStart = Slots::group_start(kSlot) % kLanes;
    const __m256i field = _mm256_and_si256(shifted, _mm256_set1_epi32(3));
    return kStart == 0 ? field : _mm256_or_si256(field, _mm256_set1_epi32(kStart));
  }

  template <class Slots, int kSlot>
  static NMS_INLINE __m256 lookup(const Input& input, __m256i index) {
    if constexpr (Slots::kM <= kLanes) {
      return _mm256_permutevar8x32_ps(Slots::group_start(kSlot) < kLanes ? input.low : input.high, index);
    } else {
      const __m256i upper = _mm256_slli_epi32(index, 28);  // the place's fourth bit as the sign
      return _mm256_blendv_ps(_mm256_permutevar8x32_ps(input.low, index), _mm256_permutevar8x32_ps(input.high, index),
                              _mm256_castsi256_ps(upper));
    }
  }
};

struct Float32 : Lookup256 {
  static constexpr int kValueBytes = 64;
  static NMS_INLINE Value value(const void* p) { return load_sums(p, 0); }
};

struct Float16 : Lookup256 {  // computed in float32
  static constexpr int kValueBytes = 32;
  static NMS_INLINE Value value(const void* p) {
    const __m128i* halves = static_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
  }
};

// Two windows of float32 inputs; the first takes the low halves of values and index words, the second the high ones.
struct BFloat16 : Sums256 {
  static constexpr int kHalves = 2;
  static constexpr int kValueBytes = 64;
  static constexpr int kInputBytes = 128;
  static constexpr int kSlotGroup = 1;

  struct Index {
    Lookup256::Index first, second;
  };
  struct Pair {
    Vec first, second;
  };
  using Words = Lookup256::Words;
  using Value = Pair;
  using Input = Pair;

  static NMS_INLINE Words words(const uint32_t* p) { return Lookup256::words(p); }
  static NMS_INLINE Input input(const void* p) { return {load_sums(p, 0), load_sums(p, 1)}; }
  static NMS_INLINE Value value(const void* p) {
    const Words both = words(static_cast<const uint32_t*>(p));
    return {{first_of(both.low), first_of(both.high)}, {second_of(both.low), second_of(both.high)}};
  }
  template <class Slots, int kSlot, int kShift>
  static NMS_INLINE Index index(const Words& words) {
    return {Lookup256::index<Slots, kSlot, kShift>(words), Lookup256::index<Slots, kSlot, kShift + 16>(words)};
  }
  static NMS_INLINE Index any_index(const Words& words, int shift) {
    return {Lookup256::any_index(words, shift), Lookup256::any_index(words, shift + 16)};
  }
  template <class Slots, int kSlot>
  static NMS_INLINE Vec multiply_add(const Value& value, const Index& index, const Input& input, const Vec& sum) {
    return Lookup256::multiply_add<Slots, kSlot>(
        value.second, index.second, input.second,
        Lookup256::multiply_add<Slots, kSlot>(value.first, index.first, input.first, sum));
  }

 private:
  static NMS_INLINE __m256 first_of(__m256i both) { return _mm256_castsi256_ps(_mm256_slli_epi32(both, 16)); }
  static NMS_INLINE __m256 second_of(__m256i both) {
    return _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
};
