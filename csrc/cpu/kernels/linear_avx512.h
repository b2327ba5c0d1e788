// How values, indices and inputs of the panel form become AVX-512 vectors: sixteen lanes, one per row of a panel.
//
// A Format has
//   kHalves       windows in a step
//   kValueBytes   of one slot; kInputBytes of one row of x in a step; kSlotGroup slots are held in registers at once
//   words         sixteen index words
//   index         the permutation for one slot: field at bit kShift of the words
//   load_index    what store_index has written, kIndexBytes of it; 0 where such vectors are of no use
//   multiply_add  sum + value * (input looked up by index)
//   outputs       sixteen of them, as numbers: of a bias; write_outputs is the other way
//
// Note    Included inside the target region of an AVX-512 source.
#pragma once

constexpr int kSlotGroupSize = 4;

NMS_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

// (words & mask) | start: a field cut out and moved to its group, in one instruction.
NMS_INLINE __m512i masked_or(__m512i words, __m512i mask, __m512i start) {
  return _mm512_ternarylogic_epi32(words, mask, start, 0xEA);
}

// Keeps compilers from reading memory once more for every use of v.
template <class Vector>
NMS_INLINE Vector in_register(Vector v) {
  asm("" : "+v"(v));
  return v;
}

struct Sums512 {
  static constexpr int kLanes = 16;
  static constexpr int kMaxRows = 16;      // of a tile: as many sums as fit into 32 registers beside a group of slots
  static constexpr int kSharedPanels = 2;  // at most, and then
  static constexpr int kMaxSharedRows = 8;
  static constexpr int kBusySums = 8;

  using Vec = __m512;

  // What is read through p and q from here on is read after v is known. No instruction; only compilers take notice.
  static NMS_INLINE void then(Vec& v, const uint8_t*& p, const uint8_t*& q) { asm("" : "+v"(v), "+r"(p), "+r"(q)); }

  static NMS_INLINE Vec zero() { return _mm512_setzero_ps(); }
  static NMS_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  // No less than `least` in any lane; NaN passes.
  static NMS_INLINE Vec at_least(float least, Vec v) { return _mm512_max_ps(_mm512_set1_ps(least), v); }
  static NMS_INLINE Vec load_sums(const void* sums, int row) {
    return _mm512_loadu_ps(static_cast<const float*>(sums) + row * kPanelRows);
  }
  static NMS_INLINE void store_sums(void* sums, int row, Vec v) {
    _mm512_storeu_ps(static_cast<float*>(sums) + row * kPanelRows, v);
  }
};

// One window of float32 inputs.
struct Lookup512 : Sums512 {
  static constexpr int kHalves = 1;
  static constexpr int kInputBytes = 64;
  static constexpr int kSlotGroup = kSlotGroupSize;

  using Words = __m512i;
  using Index = __m512i;
  using Value = __m512;
  using Input = __m512;

  static constexpr int kIndexBytes = 64;

  static NMS_INLINE Words words(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static NMS_INLINE Input input(const void* p) { return in_register(_mm512_loadu_ps(p)); }
  static NMS_INLINE Index load_index(const void* p) { return in_register(_mm512_loadu_si512(p)); }
  static NMS_INLINE void store_index(void* p, Index index) { _mm512_storeu_si512(p, index); }

  template <class Slots, int kSlot, int kShift>
  static NMS_INLINE Index index(Words words) {
    const __m512i shifted = kShift == 0 ? words : _mm512_srli_epi32(words, kShift);
    if constexpr (Slots::kBits == 4) return shifted;  // the permutation looks at the low four bits only
    return masked_or(shifted, _mm512_set1_epi32(3), _mm512_set1_epi32(Slots::group_start(kSlot)));
  }
  static NMS_INLINE Index any_index(Words words, int shift) {
    return _mm512_srl_epi32(words, _mm_cvtsi32_si128(shift));
  }
  template <class Slots, int kSlot>
  static NMS_INLINE Vec multiply_add(Value value, Index index, Input input, Vec sum) {
    return _mm512_fmadd_ps(value, _mm512_permutexvar_ps(index, input), sum);
  }
};

struct Float32 : Lookup512 {
  static constexpr int kValueBytes = 64;
  static constexpr int kOutputBytes = 64;
  static NMS_INLINE Vec outputs(const void* p) { return _mm512_loadu_ps(p); }
  static NMS_INLINE void write_outputs(void* p, Vec v) { _mm512_storeu_ps(p, v); }
  static NMS_INLINE Value value(const void* p) { return _mm512_loadu_ps(p); }
};

struct Float16 : Lookup512 {  // computed in float32
  static constexpr int kValueBytes = 32;
  static constexpr int kOutputBytes = 32;
  static NMS_INLINE Vec outputs(const void* p) { return value(p); }
  static NMS_INLINE void write_outputs(void* p, Vec v) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static NMS_INLINE Value value(const void* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
  }
};

// What bfloat16 Formats have in common.
struct BFloat16Outputs : Sums512 {
  static constexpr int kOutputBytes = 32;
  static NMS_INLINE Vec outputs(const void* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static NMS_INLINE void write_outputs(void* p, Vec v) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), narrow_bfloat16(v));
  }
};

// Two windows of float32 inputs; the first takes the low halves of values and index words, the second the high ones.
struct BFloat16 : BFloat16Outputs {
  static constexpr int kHalves = 2;
  static constexpr int kValueBytes = 64;
  static constexpr int kInputBytes = 128;
  static constexpr int kSlotGroup = kSlotGroupSize / 2;

  struct Pair {
    __m512 low, high;
  };
  struct Index {
    __m512i low, high;
  };
  using Words = __m512i;
  using Value = Pair;
  using Input = Pair;

  static constexpr int kIndexBytes = 128;

  static NMS_INLINE Index load_index(const void* p) {
    const __m512i* halves = static_cast<const __m512i*>(p);
    return {_mm512_loadu_si512(halves), _mm512_loadu_si512(halves + 1)};
  }
  static NMS_INLINE void store_index(void* p, const Index& index) {
    __m512i* halves = static_cast<__m512i*>(p);
    _mm512_storeu_si512(halves, index.low);
    _mm512_storeu_si512(halves + 1, index.high);
  }
  static NMS_INLINE Words words(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static NMS_INLINE Input input(const void* p) {
    const float* windows = static_cast<const float*>(p);
    return {in_register(_mm512_loadu_ps(windows)), in_register(_mm512_loadu_ps(windows + kWindowInputs))};
  }
  static NMS_INLINE Value value(const void* p) {
    const __m512i both = _mm512_loadu_si512(p);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
  }
  template <class Slots, int kSlot, int kShift>
  static NMS_INLINE Index index(Words words) {
    return {Lookup512::index<Slots, kSlot, kShift>(words), Lookup512::index<Slots, kSlot, kShift + 16>(words)};
  }
  static NMS_INLINE Index any_index(Words words, int shift) {
    return {Lookup512::any_index(words, shift), Lookup512::any_index(words, shift + 16)};
  }
  template <class Slots, int kSlot>
  static NMS_INLINE Vec multiply_add(const Value& value, const Index& index, const Input& input, Vec sum) {
    sum = _mm512_fmadd_ps(value.low, _mm512_permutexvar_ps(index.low, input.low), sum);
    return _mm512_fmadd_ps(value.high, _mm512_permutexvar_ps(index.high, input.high), sum);
  }
};
