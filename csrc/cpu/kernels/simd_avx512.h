// AVX-512 vectors of 32-bit and 16-bit keys. F, BW, DQ and VL only, so that every AVX-512 server since Skylake-X runs
// it.
//
// A vector has four 128-bit parts. Keys are signed; 16-bit lanes also serve the 8-bit element types.
// Note    Included by kernels_avx512.cpp inside its target region. simd_avx2.h offers the same names.
#pragma once

using Vec = __m512i;

constexpr int kVectorBytes = 64;
constexpr int kParts = 4;

NMS_INLINE Vec zero() { return _mm512_setzero_si512(); }
NMS_INLINE Vec bit_and(Vec a, Vec b) { return _mm512_and_si512(a, b); }
NMS_INLINE Vec bit_xor(Vec a, Vec b) { return _mm512_xor_si512(a, b); }
NMS_INLINE Vec load(const void* p) { return _mm512_loadu_si512(p); }
NMS_INLINE Vec load_bytes(const void* p, int bytes) { return _mm512_maskz_loadu_epi8(low_bits(bytes), p); }
NMS_INLINE void store_bytes(void* p, Vec v, int bytes) { _mm512_mask_storeu_epi8(p, low_bits(bytes), v); }
NMS_INLINE void store(void* p, Vec v) { _mm512_storeu_si512(p, v); }
NMS_INLINE void stream(void* p /* aligned to kVectorBytes */, Vec v) {
  _mm512_stream_si512(static_cast<__m512i*>(p), v);
}

NMS_INLINE void prefetch(const void* p, int bytes_ahead) {
  _mm_prefetch(static_cast<const char*>(p) + bytes_ahead, _MM_HINT_T0);
}

// Parts 0, 2 of a, then of b; and parts 1, 3.
NMS_INLINE Vec even_parts(Vec a, Vec b) { return _mm512_shuffle_i32x4(a, b, 0x88); }
NMS_INLINE Vec odd_parts(Vec a, Vec b) { return _mm512_shuffle_i32x4(a, b, 0xDD); }

NMS_INLINE Vec absolute16(Vec a) { return _mm512_abs_epi16(a); }
template <int kShift>
NMS_INLINE Vec shift_left16(Vec a) {
  return _mm512_slli_epi16(a, kShift);
}

NMS_INLINE Vec low32(Vec a, Vec b) { return _mm512_unpacklo_epi32(a, b); }
NMS_INLINE Vec high32(Vec a, Vec b) { return _mm512_unpackhi_epi32(a, b); }
NMS_INLINE Vec low64(Vec a, Vec b) { return _mm512_unpacklo_epi64(a, b); }
NMS_INLINE Vec high64(Vec a, Vec b) { return _mm512_unpackhi_epi64(a, b); }
NMS_INLINE Vec low16(Vec a, Vec b) { return _mm512_unpacklo_epi16(a, b); }
NMS_INLINE Vec high16(Vec a, Vec b) { return _mm512_unpackhi_epi16(a, b); }

// Where in a block's threshold vector (see simd_choose.h) lane `lane` of the block's vector f finds its own: for
// groups shorter than a vector.
constexpr int threshold_lane(int lanes, int m, int f, int lane) {
  const int per_part = lanes / kParts;
  const int part = lane / per_part;
  return m == per_part ? part * per_part + f : (2 * (f / per_part) + part / 2) * per_part + f % per_part;
}

template <class Index, int kLanes, int kM>
struct SpreadTable {
  alignas(64) Index lane[kM][kLanes] = {};
  constexpr SpreadTable() {
    for (int f = 0; f < kM; ++f)
      for (int i = 0; i < kLanes; ++i) lane[f][i] = static_cast<Index>(threshold_lane(kLanes, kM, f, i));
  }
};

struct Lanes32 {
  using Key = int32_t;
  using Mask = __mmask16;  // one bit per lane
  static constexpr int kLanes = 16;
  static constexpr int kPerPart = 4;
  using MaskBits = uint16_t;  // a mask in memory
  static constexpr int kMaskBytes = sizeof(MaskBits);

  static NMS_INLINE Vec broadcast(Key key) { return _mm512_set1_epi32(key); }
  static NMS_INLINE Vec max(Vec a, Vec b) { return _mm512_max_epi32(a, b); }
  static NMS_INLINE Vec min(Vec a, Vec b) { return _mm512_min_epi32(a, b); }
  static NMS_INLINE Vec add(Vec a, Vec b) { return _mm512_add_epi32(a, b); }
  static NMS_INLINE Vec subtract(Vec a, Vec b) { return _mm512_sub_epi32(a, b); }
  static NMS_INLINE Mask less(Vec a, Vec b) { return _mm512_cmplt_epi32_mask(a, b); }
  static NMS_INLINE Mask equal(Vec a, Vec b) { return _mm512_cmpeq_epi32_mask(a, b); }
  static NMS_INLINE Vec from_lane(int lane, Vec before, Vec from) {
    return _mm512_mask_mov_epi32(from, static_cast<Mask>(low_bits(lane)), before);
  }
  static NMS_INLINE Vec add_one_where(Mask where, Vec a) {
    return _mm512_mask_sub_epi32(a, where, a, _mm512_set1_epi32(-1));
  }

  // Lane i of the result is lane i ^ kFlip of v. Groups of four keys are compared with their neighbours through it.
  template <int kFlip>
  static NMS_INLINE Vec neighbours(Vec v) {
    constexpr int kOrder = kFlip | (1 ^ kFlip) << 2 | (2 ^ kFlip) << 4 | (3 ^ kFlip) << 6;
    return _mm512_shuffle_epi32(v, static_cast<_MM_PERM_ENUM>(kOrder));
  }

  // The masks of 64 keys, one bit each.
  static NMS_INLINE uint64_t word(const Mask (&m)[4]) {
    return static_cast<uint64_t>(m[0]) | static_cast<uint64_t>(m[1]) << 16 | static_cast<uint64_t>(m[2]) << 32 |
           static_cast<uint64_t>(m[3]) << 48;
  }
  static NMS_INLINE uint64_t lane_bits(Mask m) { return m; }
  static NMS_INLINE void store_masks(uint8_t* out, int64_t stride, Mask first, Mask second) {
    std::memcpy(out, &first, sizeof(first));
    std::memcpy(out + stride, &second, sizeof(second));
  }

  // A 32 x kLanes matrix of bits and its transpose: masks[i] has a bit per lane, words[lane] a bit per i.
  static NMS_INLINE void transpose_masks(const uint8_t* masks /* [32][kMaskBytes] */, uint32_t* words /* [kLanes] */) {
    const Vec all = load(masks);
    Vec bit = _mm512_set1_epi16(1);
    for (int lane = 0; lane < kLanes; ++lane) {
      words[lane] = _mm512_test_epi16_mask(all, bit);
      bit = _mm512_add_epi16(bit, bit);
    }
  }
  static NMS_INLINE void transpose_words(const uint32_t* words, uint8_t* masks) {
    const Vec all = load(words);
    Vec bit = _mm512_set1_epi32(1);
    for (int i = 0; i < 32; ++i) {
      const Mask mask = _mm512_test_epi32_mask(all, bit);
      std::memcpy(masks + i * kMaskBytes, &mask, sizeof(mask));
      bit = _mm512_add_epi32(bit, bit);
    }
  }

  // Within each part, v[i] lane j <-> v[j] lane i.
  static NMS_INLINE void transpose_parts(Vec* v /* [kPerPart] */) {
    const Vec a = low32(v[0], v[1]), b = high32(v[0], v[1]), c = low32(v[2], v[3]), d = high32(v[2], v[3]);
    v[0] = low64(a, c);
    v[1] = high64(a, c);
    v[2] = low64(b, d);
    v[3] = high64(b, d);
  }

  template <int kM>
  static NMS_INLINE Vec spread(const Key* thresholds, int f) {
    static constexpr SpreadTable<int32_t, kLanes, kM> kTable;
    return _mm512_permutexvar_epi32(load(kTable.lane[f]), load(thresholds));
  }
};

struct Lanes16 {
  using Key = int16_t;
  using Mask = __mmask32;
  static constexpr int kLanes = 32;
  static constexpr int kPerPart = 8;
  using MaskBits = uint32_t;
  static constexpr int kMaskBytes = sizeof(MaskBits);

  static NMS_INLINE Vec broadcast(Key key) { return _mm512_set1_epi16(key); }
  static NMS_INLINE Vec max(Vec a, Vec b) { return _mm512_max_epi16(a, b); }
  static NMS_INLINE Vec min(Vec a, Vec b) { return _mm512_min_epi16(a, b); }
  static NMS_INLINE Vec add(Vec a, Vec b) { return _mm512_add_epi16(a, b); }
  static NMS_INLINE Vec subtract(Vec a, Vec b) { return _mm512_sub_epi16(a, b); }
  static NMS_INLINE Mask less(Vec a, Vec b) { return _mm512_cmplt_epi16_mask(a, b); }
  static NMS_INLINE Mask equal(Vec a, Vec b) { return _mm512_cmpeq_epi16_mask(a, b); }
  static NMS_INLINE Vec from_lane(int lane, Vec before, Vec from) {
    return _mm512_mask_mov_epi16(from, static_cast<Mask>(low_bits(lane)), before);
  }
  static NMS_INLINE Vec add_one_where(Mask where, Vec a) {
    return _mm512_mask_sub_epi16(a, where, a, _mm512_set1_epi16(-1));
  }

  template <int kFlip>
  static NMS_INLINE Vec neighbours(Vec v) {
    if constexpr (kFlip == 2) {
      return _mm512_shuffle_epi32(v, static_cast<_MM_PERM_ENUM>(0xB1));  // pairs of keys change places
    } else {
      constexpr int f = kFlip;
      constexpr auto bytes = [](int key) { return static_cast<int>(2 * key | (2 * key + 1) << 8); };
      constexpr auto pair = [bytes](int key) { return bytes(key ^ f) | bytes((key + 1) ^ f) << 16; };
      const Vec order = _mm512_broadcast_i32x4(_mm_setr_epi32(pair(0), pair(2), pair(4), pair(6)));
      return _mm512_shuffle_epi8(v, order);
    }
  }

  static NMS_INLINE uint64_t word(const Mask (&m)[2]) {
    return static_cast<uint64_t>(m[0]) | static_cast<uint64_t>(m[1]) << 32;
  }
  static NMS_INLINE uint64_t lane_bits(Mask m) { return m; }
  static NMS_INLINE void store_masks(uint8_t* out, int64_t stride, Mask first, Mask second) {
    std::memcpy(out, &first, sizeof(first));
    std::memcpy(out + stride, &second, sizeof(second));
  }

  static NMS_INLINE void transpose_masks(const uint8_t* masks /* [32][kMaskBytes] */, uint32_t* words /* [kLanes] */) {
    const Vec first = load(masks), last = load(masks + kVectorBytes);
    Vec low = low_halves(first, last);
    Vec high = low_halves(_mm512_srli_epi32(first, 16), _mm512_srli_epi32(last, 16));
    Vec bit = _mm512_set1_epi16(1);
    for (int lane = 0; lane < 16; ++lane) {
      words[lane] = _mm512_test_epi16_mask(low, bit);
      words[lane + 16] = _mm512_test_epi16_mask(high, bit);
      bit = _mm512_add_epi16(bit, bit);
    }
  }
  static NMS_INLINE void transpose_words(const uint32_t* words, uint8_t* masks) {
    transpose_masks(reinterpret_cast<const uint8_t*>(words), reinterpret_cast<uint32_t*>(masks));  // it is 32 x 32
  }

  static NMS_INLINE void transpose_parts(Vec* v /* [kPerPart] */) {
    Vec a[8], b[8];
    NMS_UNROLL
    for (int i = 0; i < 8; i += 2) {
      a[i] = low16(v[i], v[i + 1]);
      a[i + 1] = high16(v[i], v[i + 1]);
    }
    NMS_UNROLL
    for (int i = 0; i < 8; i += 4) {
      b[i] = low32(a[i], a[i + 2]);
      b[i + 1] = high32(a[i], a[i + 2]);
      b[i + 2] = low32(a[i + 1], a[i + 3]);
      b[i + 3] = high32(a[i + 1], a[i + 3]);
    }
    NMS_UNROLL
    for (int i = 0; i < 4; ++i) {
      v[2 * i] = low64(b[i], b[i + 4]);
      v[2 * i + 1] = high64(b[i], b[i + 4]);
    }
  }

  template <int kM>
  static NMS_INLINE Vec spread(const Key* thresholds, int f) {
    static constexpr SpreadTable<int16_t, kLanes, kM> kTable;
    return _mm512_permutexvar_epi16(load(kTable.lane[f]), load(thresholds));
  }

 private:
  static NMS_INLINE Vec low_halves(Vec a, Vec b) {  // of each 32 bits
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(a)), _mm512_cvtepi32_epi16(b), 1);
  }
};

// Elements of kSize bytes.
//
//   raw     kLanes elements, one per lane of Lanes; 8-bit elements are sign-extended to 16-bit lanes
//   kept    kStep elements of which those without a bit become zero
//   spread  writes kLanes elements, of ones where there is a bit, of zeros elsewhere; spread_half half as many
//
// Functions named _first touch only the first `count` elements.
template <int kSize>
struct Elements;

template <>
struct Elements<4> {
  using Lanes = Lanes32;
  using StepBits = uint16_t;
  static constexpr int kStep = 16;

  static NMS_INLINE Vec raw(const void* p) { return load(p); }
  static NMS_INLINE Vec raw_first(const void* p, int count) {
    return _mm512_maskz_loadu_epi32(static_cast<__mmask16>(low_bits(count)), p);
  }
  static NMS_INLINE Vec kept(const void* src, StepBits bits) { return _mm512_maskz_loadu_epi32(bits, src); }
  static NMS_INLINE Vec kept_first(const void* src, StepBits bits, int count) {
    return kept(src, static_cast<StepBits>(bits & low_bits(count)));
  }
  static NMS_INLINE void store_first(void* dst, Vec v, int count) {
    _mm512_mask_storeu_epi32(dst, static_cast<__mmask16>(low_bits(count)), v);
  }
  static NMS_INLINE void spread(void* out, uint32_t bits) {
    store(out, _mm512_movm_epi32(static_cast<__mmask16>(bits)));
  }
  static NMS_INLINE void spread_half(void* out, uint32_t bits) {
    _mm256_storeu_si256(static_cast<__m256i*>(out), _mm256_movm_epi32(static_cast<__mmask8>(bits)));
  }
};

template <>
struct Elements<2> {
  using Lanes = Lanes16;
  using StepBits = uint32_t;
  static constexpr int kStep = 32;

  static NMS_INLINE Vec raw(const void* p) { return load(p); }
  static NMS_INLINE Vec raw_first(const void* p, int count) {
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>(low_bits(count)), p);
  }
  static NMS_INLINE Vec kept(const void* src, StepBits bits) { return _mm512_maskz_loadu_epi16(bits, src); }
  static NMS_INLINE Vec kept_first(const void* src, StepBits bits, int count) {
    return kept(src, static_cast<StepBits>(bits & low_bits(count)));
  }
  static NMS_INLINE void store_first(void* dst, Vec v, int count) {
    _mm512_mask_storeu_epi16(dst, static_cast<__mmask32>(low_bits(count)), v);
  }
  static NMS_INLINE void spread(void* out, uint32_t bits) { store(out, _mm512_movm_epi16(bits)); }
  static NMS_INLINE void spread_half(void* out, uint32_t bits) {
    _mm256_storeu_si256(static_cast<__m256i*>(out), _mm256_movm_epi16(static_cast<__mmask16>(bits)));
  }
};

template <>
struct Elements<1> {
  using Lanes = Lanes16;
  using StepBits = uint64_t;
  static constexpr int kStep = 64;

  static NMS_INLINE Vec raw(const void* p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
  }
  static NMS_INLINE Vec raw_first(const void* p, int count) {
    return _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(static_cast<__mmask32>(low_bits(count)), p));
  }
  static NMS_INLINE Vec kept(const void* src, StepBits bits) { return _mm512_maskz_loadu_epi8(bits, src); }
  static NMS_INLINE Vec kept_first(const void* src, StepBits bits, int count) {
    return kept(src, bits & low_bits(count));
  }
  static NMS_INLINE void store_first(void* dst, Vec v, int count) { _mm512_mask_storeu_epi8(dst, low_bits(count), v); }
  static NMS_INLINE void spread(void* out, uint32_t bits) {
    _mm256_storeu_si256(static_cast<__m256i*>(out), _mm256_movm_epi8(bits));
  }
  static NMS_INLINE void spread_half(void* out, uint32_t bits) {
    _mm_storeu_si128(static_cast<__m128i*>(out), _mm_movm_epi8(static_cast<__mmask16>(bits)));
  }
};

// The elements that have a bit, side by side. Works in whole vectors: what is read behind the last element and written
// behind the last value is of no use. Compressing in registers and storing all of it is much faster than the
// instruction's own store form on some processors. The forms for 16 and 8 bits need VBMI2.
template <int kSize>
void pack_kept(const char* elements, const uint8_t* mask, int64_t count, char* values) {
  if constexpr (kSize == 4) {
    for (int64_t i = 0; i < count; i += 16) {
      __mmask16 bits;
      std::memcpy(&bits, mask + i / 8, sizeof(bits));
      store(values, _mm512_maskz_compress_epi32(bits, load(elements + 4 * i)));
      values += 4 * __builtin_popcount(bits);
    }
  } else if constexpr (kSize == 2) {
    pack_words_vbmi2(elements, mask, count, values);
  } else {
    pack_bytes_vbmi2(elements, mask, count, values);
  }
}

// Set bits of a ^ b.
struct BitCounter {
  Vec total;

  BitCounter() : total(zero()) {}  // written out: an implicit one would be compiled after the target region
  NMS_INLINE void add(const void* a, const void* b) {
    const Vec nibbles = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    const Vec low_nibble = _mm512_set1_epi8(15);
    const Vec differing = bit_xor(load(a), load(b));
    const Vec low = _mm512_shuffle_epi8(nibbles, bit_and(differing, low_nibble));
    const Vec high = _mm512_shuffle_epi8(nibbles, bit_and(_mm512_srli_epi16(differing, 4), low_nibble));
    total = _mm512_add_epi64(total, _mm512_sad_epu8(_mm512_add_epi8(low, high), zero()));
  }
  NMS_INLINE int64_t sum() const { return _mm512_reduce_add_epi64(total); }
};

// grad + factor * where(bit, 0, w): kFloats at a time, product and sum each rounded.
struct PrunedSum {
  static constexpr int kFloats = 16;
  __m512 factor;

  explicit NMS_INLINE PrunedSum(float f) : factor(_mm512_set1_ps(f)) {}
  NMS_INLINE Vec of(const float* grad, const float* w, const uint8_t* bits) const {
    __mmask16 kept;
    std::memcpy(&kept, bits, sizeof(kept));
    const __m512 g = _mm512_loadu_ps(grad);
    const __m512 term = _mm512_mul_ps(factor, _mm512_loadu_ps(w));
    return _mm512_castps_si512(_mm512_mask_add_ps(g, _knot_mask16(kept), g, term));
  }
};

// where(bit, grad + factor * w, 0), in the same way.
struct KeptSum {
  static constexpr int kFloats = 16;
  __m512 factor;

  explicit NMS_INLINE KeptSum(float f) : factor(_mm512_set1_ps(f)) {}
  NMS_INLINE Vec of(const float* grad, const float* w, const uint8_t* bits) const {
    __mmask16 kept;
    std::memcpy(&kept, bits, sizeof(kept));
    const __m512 term = _mm512_mul_ps(factor, _mm512_loadu_ps(w));
    return _mm512_castps_si512(_mm512_maskz_add_ps(kept, _mm512_loadu_ps(grad), term));
  }
};
