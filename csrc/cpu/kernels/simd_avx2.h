// AVX2 vectors of 32-bit and 16-bit keys.
//
// A vector has two 128-bit parts. Masks are vectors too: a lane is all ones or all zeros.
// Note    Included by kernels_avx2.cpp inside its target region. simd_avx512.h offers the same names.
#pragma once

using Vec = __m256i;

constexpr int kVectorBytes = 32;
constexpr int kParts = 2;

NMS_INLINE Vec zero() { return _mm256_setzero_si256(); }
NMS_INLINE Vec bit_and(Vec a, Vec b) { return _mm256_and_si256(a, b); }
NMS_INLINE Vec bit_xor(Vec a, Vec b) { return _mm256_xor_si256(a, b); }
NMS_INLINE Vec load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
NMS_INLINE void store(void* p, Vec v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
NMS_INLINE void stream(void* p /* aligned to kVectorBytes */, Vec v) {
  _mm256_stream_si256(static_cast<__m256i*>(p), v);
}

NMS_INLINE void prefetch(const void* p, int bytes_ahead) {
  _mm_prefetch(static_cast<const char*>(p) + bytes_ahead, _MM_HINT_T0);
}

// Part 0 of a and of b; and part 1.
NMS_INLINE Vec even_parts(Vec a, Vec b) { return _mm256_permute2x128_si256(a, b, 0x20); }
NMS_INLINE Vec odd_parts(Vec a, Vec b) { return _mm256_permute2x128_si256(a, b, 0x31); }

NMS_INLINE Vec absolute16(Vec a) { return _mm256_abs_epi16(a); }
template <int kShift>
NMS_INLINE Vec shift_left16(Vec a) {
  return _mm256_slli_epi16(a, kShift);
}

NMS_INLINE Vec low32(Vec a, Vec b) { return _mm256_unpacklo_epi32(a, b); }
NMS_INLINE Vec high32(Vec a, Vec b) { return _mm256_unpackhi_epi32(a, b); }
NMS_INLINE Vec low64(Vec a, Vec b) { return _mm256_unpacklo_epi64(a, b); }
NMS_INLINE Vec high64(Vec a, Vec b) { return _mm256_unpackhi_epi64(a, b); }
NMS_INLINE Vec low16(Vec a, Vec b) { return _mm256_unpacklo_epi16(a, b); }
NMS_INLINE Vec high16(Vec a, Vec b) { return _mm256_unpackhi_epi16(a, b); }

// 32 bytes of zeros, then 32 of ones: from 32 - n on, all bytes but the first n are set.
struct ByteRamp {
  alignas(32) uint8_t bytes[64] = {};
  constexpr ByteRamp() {
    for (int i = 32; i < 64; ++i) bytes[i] = 0xFF;
  }
};

// The first n bytes of `before`, the others of `from`.
NMS_INLINE Vec from_byte(int n, Vec before, Vec from) {
  static constexpr ByteRamp kRamp;
  return _mm256_blendv_epi8(before, from, load(kRamp.bytes + 32 - n));
}

// words[j] = bit j of each of 32 bytes.
NMS_INLINE void top_bits_first(Vec bytes, uint32_t* words /* [8] */) {
  for (int j = 7; j >= 0; --j) {
    words[j] = static_cast<uint32_t>(_mm256_movemask_epi8(bytes));
    bytes = _mm256_add_epi8(bytes, bytes);
  }
}

struct Lanes32 {
  using Key = int32_t;
  using Mask = Vec;
  static constexpr int kLanes = 8;
  static constexpr int kPerPart = 4;
  using MaskBits = uint8_t;  // a mask in memory
  static constexpr int kMaskBytes = sizeof(MaskBits);

  static NMS_INLINE Vec broadcast(Key key) { return _mm256_set1_epi32(key); }
  static NMS_INLINE Vec max(Vec a, Vec b) { return _mm256_max_epi32(a, b); }
  static NMS_INLINE Vec min(Vec a, Vec b) { return _mm256_min_epi32(a, b); }
  static NMS_INLINE Vec add(Vec a, Vec b) { return _mm256_add_epi32(a, b); }
  static NMS_INLINE Vec subtract(Vec a, Vec b) { return _mm256_sub_epi32(a, b); }
  static NMS_INLINE Mask less(Vec a, Vec b) { return _mm256_cmpgt_epi32(b, a); }
  static NMS_INLINE Mask equal(Vec a, Vec b) { return _mm256_cmpeq_epi32(a, b); }
  static NMS_INLINE Vec from_lane(int lane, Vec before, Vec from) { return from_byte(4 * lane, before, from); }
  static NMS_INLINE Vec add_one_where(Mask where, Vec a) { return subtract(a, where); }

  // Lane i of the result is lane i ^ kFlip of v. Groups of four keys are compared with their neighbours through it.
  template <int kFlip>
  static NMS_INLINE Vec neighbours(Vec v) {
    return _mm256_shuffle_epi32(v, kFlip | (1 ^ kFlip) << 2 | (2 ^ kFlip) << 4 | (3 ^ kFlip) << 6);
  }

  // The masks of 64 keys, one bit each.
  static NMS_INLINE uint64_t word(const Mask (&m)[8]) { return half_word(m) | half_word(m + 4) << 32; }
  static NMS_INLINE uint64_t lane_bits(Mask m) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(m)));
  }
  static NMS_INLINE void store_masks(uint8_t* out, int64_t stride, Mask first, Mask second) {
    out[0] = static_cast<uint8_t>(lane_bits(first));
    out[stride] = static_cast<uint8_t>(lane_bits(second));
  }

  // A 32 x kLanes matrix of bits and its transpose: masks[i] has a bit per lane, words[lane] a bit per i.
  static NMS_INLINE void transpose_masks(const uint8_t* masks /* [32][kMaskBytes] */, uint32_t* words /* [kLanes] */) {
    top_bits_first(load(masks), words);
  }
  static NMS_INLINE void transpose_words(const uint32_t* words, uint8_t* masks) {
    Vec all = load(words);
    for (int i = 31; i >= 0; --i) {
      masks[i] = static_cast<uint8_t>(lane_bits(all));
      all = add(all, all);
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
  static NMS_INLINE Vec spread(const Key*, int) {
    static_assert(kM >= kLanes, "a group of 32-bit keys fills at least one vector");
    return zero();
  }

 private:
  static NMS_INLINE uint64_t half_word(const Mask* m /* [4] */) {
    // Packing works within parts, so the bytes come out as four-byte runs of m0 m1 m2 m3 low parts, then high parts.
    const Vec bytes = _mm256_packs_epi16(_mm256_packs_epi32(m[0], m[1]), _mm256_packs_epi32(m[2], m[3]));
    const Vec in_order = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    return static_cast<uint32_t>(_mm256_movemask_epi8(in_order));
  }
};

struct Lanes16 {
  using Key = int16_t;
  using Mask = Vec;
  static constexpr int kLanes = 16;
  static constexpr int kPerPart = 8;
  using MaskBits = uint16_t;
  static constexpr int kMaskBytes = sizeof(MaskBits);

  static NMS_INLINE Vec broadcast(Key key) { return _mm256_set1_epi16(key); }
  static NMS_INLINE Vec max(Vec a, Vec b) { return _mm256_max_epi16(a, b); }
  static NMS_INLINE Vec min(Vec a, Vec b) { return _mm256_min_epi16(a, b); }
  static NMS_INLINE Vec add(Vec a, Vec b) { return _mm256_add_epi16(a, b); }
  static NMS_INLINE Vec subtract(Vec a, Vec b) { return _mm256_sub_epi16(a, b); }
  static NMS_INLINE Mask less(Vec a, Vec b) { return _mm256_cmpgt_epi16(b, a); }
  static NMS_INLINE Mask equal(Vec a, Vec b) { return _mm256_cmpeq_epi16(a, b); }
  static NMS_INLINE Vec from_lane(int lane, Vec before, Vec from) { return from_byte(2 * lane, before, from); }
  static NMS_INLINE Vec add_one_where(Mask where, Vec a) { return subtract(a, where); }

  template <int kFlip>
  static NMS_INLINE Vec neighbours(Vec v) {
    if constexpr (kFlip == 2) {
      return _mm256_shuffle_epi32(v, 0xB1);  // pairs of keys change places
    } else {
      constexpr int f = kFlip;
      constexpr auto bytes = [](int key) { return static_cast<int>(2 * key | (2 * key + 1) << 8); };
      constexpr auto pair = [bytes](int key) { return bytes(key ^ f) | bytes((key + 1) ^ f) << 16; };
      const Vec order = _mm256_broadcastsi128_si256(_mm_setr_epi32(pair(0), pair(2), pair(4), pair(6)));
      return _mm256_shuffle_epi8(v, order);
    }
  }

  static NMS_INLINE uint64_t word(const Mask (&m)[4]) { return half_word(m) | half_word(m + 2) << 32; }
  static NMS_INLINE uint64_t lane_bits(Mask m) { return half_word_of(m, zero()); }
  static NMS_INLINE void store_masks(uint8_t* out, int64_t stride, Mask first, Mask second) {
    const uint32_t both = static_cast<uint32_t>(half_word_of(first, second));
    std::memcpy(out, &both, kMaskBytes);
    const uint16_t high = static_cast<uint16_t>(both >> 16);
    std::memcpy(out + stride, &high, kMaskBytes);
  }

  static NMS_INLINE void transpose_masks(const uint8_t* masks /* [32][kMaskBytes] */, uint32_t* words /* [kLanes] */) {
    const Vec a = load(masks), b = load(masks + kVectorBytes), low_byte = _mm256_set1_epi16(0xFF);
    top_bits_first(bytes_of(bit_and(a, low_byte), bit_and(b, low_byte)), words);
    top_bits_first(bytes_of(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8)), words + 8);
  }
  static NMS_INLINE void transpose_words(const uint32_t* words, uint8_t* masks) {
    Vec a = load(words), b = load(words + 8);
    for (int i = 31; i >= 0; --i) {
      masks[2 * i] = static_cast<uint8_t>(Lanes32::lane_bits(a));
      masks[2 * i + 1] = static_cast<uint8_t>(Lanes32::lane_bits(b));
      a = Lanes32::add(a, a);
      b = Lanes32::add(b, b);
    }
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
    static_assert(kM == kPerPart, "longer groups fill at least one vector");  // group f of each part
    return _mm256_shuffle_epi8(load(thresholds), _mm256_set1_epi16(static_cast<int16_t>(2 * f | (2 * f + 1) << 8)));
  }

 private:
  static NMS_INLINE uint64_t half_word_of(Mask low, Mask high) {
    const Vec bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(low, high), 0xD8);  // undo packing within parts
    return static_cast<uint32_t>(_mm256_movemask_epi8(bytes));
  }
  static NMS_INLINE Vec bytes_of(Vec low, Vec high) {  // 16-bit lanes that hold a byte each
    return _mm256_permute4x64_epi64(_mm256_packus_epi16(low, high), 0xD8);
  }
  static NMS_INLINE uint64_t half_word(const Mask* m /* [2] */) { return half_word_of(m[0], m[1]); }
};

// ---- The first bytes of a vector. AVX2 has no masked access below 32 bits, and a slow masked store on some
// processors, so both are made of the widest moves that fit; two of them may overlap. ----

NMS_INLINE uint64_t load_up_to_8(const char* p, int bytes) {
  if (bytes >= 8) {
    uint64_t all;
    std::memcpy(&all, p, 8);
    return all;
  }
  if (bytes >= 4) {
    uint32_t head, tail;
    std::memcpy(&head, p, 4);
    std::memcpy(&tail, p + bytes - 4, 4);
    return head | static_cast<uint64_t>(tail) << (8 * (bytes - 4));
  }
  uint64_t all = 0;
  for (int i = 0; i < bytes; ++i) all |= static_cast<uint64_t>(static_cast<uint8_t>(p[i])) << (8 * i);
  return all;
}

NMS_INLINE void store_up_to_8(char* p, uint64_t value, int bytes) {
  if (bytes >= 8) {
    std::memcpy(p, &value, 8);
  } else if (bytes >= 4) {
    const uint32_t head = static_cast<uint32_t>(value), tail = static_cast<uint32_t>(value >> (8 * (bytes - 4)));
    std::memcpy(p, &head, 4);
    std::memcpy(p + bytes - 4, &tail, 4);
  } else {
    for (int i = 0; i < bytes; ++i) p[i] = static_cast<char>(value >> (8 * i));
  }
}

NMS_INLINE __m128i load_up_to_16(const char* p, int bytes) {
  if (bytes >= 16) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  if (bytes > 8)
    return _mm_set_epi64x(static_cast<int64_t>(load_up_to_8(p + 8, bytes - 8)),
                          static_cast<int64_t>(load_up_to_8(p, 8)));
  return _mm_cvtsi64_si128(static_cast<int64_t>(load_up_to_8(p, bytes)));
}

NMS_INLINE void store_up_to_16(char* p, __m128i value, int bytes) {
  if (bytes >= 16) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), value);
    return;
  }
  store_up_to_8(p, static_cast<uint64_t>(_mm_cvtsi128_si64(value)), bytes);
  if (bytes > 8) store_up_to_8(p + 8, static_cast<uint64_t>(_mm_extract_epi64(value, 1)), bytes - 8);
}

NMS_INLINE Vec load_bytes(const void* src, int bytes) {
  const char* p = static_cast<const char*>(src);
  const __m128i low = load_up_to_16(p, bytes);
  const __m128i high = bytes > 16 ? load_up_to_16(p + 16, bytes - 16) : _mm_setzero_si128();
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

NMS_INLINE void store_bytes(void* dst, Vec v, int bytes) {
  char* p = static_cast<char*>(dst);
  store_up_to_16(p, _mm256_castsi256_si128(v), bytes);
  if (bytes > 16) store_up_to_16(p + 16, _mm256_extracti128_si256(v, 1), bytes - 16);
}

// Elements of kSize bytes.
//
//   raw     kLanes elements, one per lane of Lanes; 8-bit elements are sign-extended to 16-bit lanes
//   kept    kStep elements of which those without a bit become zero
//   spread  writes kLanes elements, of ones where there is a bit, of zeros elsewhere; spread_half half as many
//
// Functions named _first touch only the first `count` elements.
template <int kSize>
struct WholeLanes {  // what 32-bit and 16-bit elements share: an element is a lane
  static NMS_INLINE Vec raw(const void* p) { return load(p); }
  static NMS_INLINE Vec raw_first(const void* p, int count) { return load_bytes(p, kSize * count); }
  static NMS_INLINE void store_first(void* dst, Vec v, int count) { store_bytes(dst, v, kSize * count); }
};

template <int kSize>
struct Elements;

template <>
struct Elements<4> : WholeLanes<4> {
  using Lanes = Lanes32;
  using StepBits = uint8_t;
  static constexpr int kStep = 8;

  static NMS_INLINE Vec mask(StepBits bits) {
    const Vec bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(bit_and(_mm256_set1_epi32(bits), bit), bit);
  }
  static NMS_INLINE Vec kept(const void* src, StepBits bits) { return bit_and(load(src), mask(bits)); }
  static NMS_INLINE Vec kept_first(const void* src, StepBits bits, int count) {
    return bit_and(raw_first(src, count), mask(bits));
  }
  static NMS_INLINE void spread(void* out, uint32_t bits) { store(out, mask(static_cast<StepBits>(bits))); }
  static NMS_INLINE void spread_half(void* out, uint32_t bits) {
    _mm_storeu_si128(static_cast<__m128i*>(out), _mm256_castsi256_si128(mask(static_cast<StepBits>(bits))));
  }
};

template <>
struct Elements<2> : WholeLanes<2> {
  using Lanes = Lanes16;
  using StepBits = uint16_t;
  static constexpr int kStep = 16;

  static NMS_INLINE Vec mask(StepBits bits) {
    const Vec bit = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768);
    return _mm256_cmpeq_epi16(bit_and(_mm256_set1_epi16(static_cast<int16_t>(bits)), bit), bit);
  }
  static NMS_INLINE Vec kept(const void* src, StepBits bits) { return bit_and(load(src), mask(bits)); }
  static NMS_INLINE Vec kept_first(const void* src, StepBits bits, int count) {
    return bit_and(raw_first(src, count), mask(bits));
  }
  static NMS_INLINE void spread(void* out, uint32_t bits) { store(out, mask(static_cast<StepBits>(bits))); }
  static NMS_INLINE void spread_half(void* out, uint32_t bits) {
    _mm_storeu_si128(static_cast<__m128i*>(out), _mm256_castsi256_si128(mask(static_cast<StepBits>(bits))));
  }
};

template <>
struct Elements<1> {
  using Lanes = Lanes16;
  using StepBits = uint32_t;
  static constexpr int kStep = 32;

  static NMS_INLINE Vec mask(StepBits bits) {
    const Vec copies = _mm256_set1_epi32(static_cast<int>(bits));  // byte i / 8 of the bits for element i
    const Vec byte =
        _mm256_shuffle_epi8(copies, _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303));
    const Vec bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201ull));
    return _mm256_cmpeq_epi8(bit_and(byte, bit), bit);
  }
  static NMS_INLINE Vec raw(const void* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  }
  static NMS_INLINE Vec raw_first(const void* p, int count) {
    return _mm256_cvtepi8_epi16(load_up_to_16(static_cast<const char*>(p), count));
  }
  static NMS_INLINE Vec kept(const void* src, StepBits bits) { return bit_and(load(src), mask(bits)); }
  static NMS_INLINE Vec kept_first(const void* src, StepBits bits, int count) {
    return bit_and(load_bytes(src, count), mask(bits));
  }
  static NMS_INLINE void store_first(void* dst, Vec v, int count) { store_bytes(dst, v, count); }

  static NMS_INLINE void spread(void* out, uint32_t bits) {  // half of a step
    _mm_storeu_si128(static_cast<__m128i*>(out), _mm256_castsi256_si128(mask(bits)));
  }
  static NMS_INLINE void spread_half(void* out, uint32_t bits) {
    _mm_storel_epi64(static_cast<__m128i*>(out), _mm256_castsi256_si128(mask(bits)));
  }
};

// Positions of the set bits of each byte, in order: entry [bits][j] is the j-th; unused entries are 0.
struct PositionsTable {
  uint8_t position[256][8] = {};
  constexpr PositionsTable() {
    for (int bits = 0; bits < 256; ++bits)
      for (int i = 0, j = 0; i < 8; ++i)
        if (bits >> i & 1) position[bits][j++] = static_cast<uint8_t>(i);
  }
};

// The elements that have a bit, side by side. Works in steps of eight: what is read behind the last element and written
// behind the last value is of no use.
template <int kSize>
void pack_kept(const char* elements, const uint8_t* mask, int64_t count, char* values) {
  static constexpr PositionsTable kTable;
  for (int64_t i = 0; i < count; i += 8) {
    const uint8_t bits = mask[i / 8];
    const char* from = elements + i * kSize;
    const __m128i positions = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kTable.position[bits]));
    if constexpr (kSize == 4) {
      store(values, _mm256_permutevar8x32_epi32(load(from), _mm256_cvtepu8_epi32(positions)));
    } else if constexpr (kSize == 2) {  // element p is bytes 2p and 2p + 1
      const __m128i twice = _mm_add_epi8(positions, positions);
      const __m128i order = _mm_unpacklo_epi8(twice, _mm_add_epi8(twice, _mm_set1_epi8(1)));
      const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(values), _mm_shuffle_epi8(all, order));
    } else {
      const __m128i all = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(values), _mm_shuffle_epi8(all, positions));
    }
    values += kSize * __builtin_popcount(bits);
  }
}

// Set bits of a ^ b.
struct BitCounter {
  Vec total;

  BitCounter() : total(zero()) {}  // written out: an implicit one would be compiled after the target region
  NMS_INLINE void add(const void* a, const void* b) {
    const Vec nibbles = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    const Vec low_nibble = _mm256_set1_epi8(15);
    const Vec differing = bit_xor(load(a), load(b));
    const Vec low = _mm256_shuffle_epi8(nibbles, bit_and(differing, low_nibble));
    const Vec high = _mm256_shuffle_epi8(nibbles, bit_and(_mm256_srli_epi16(differing, 4), low_nibble));
    total = _mm256_add_epi64(total, _mm256_sad_epu8(_mm256_add_epi8(low, high), zero()));
  }
  NMS_INLINE int64_t sum() const {
    const __m128i pair = _mm_add_epi64(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
    return _mm_cvtsi128_si64(pair) + _mm_extract_epi64(pair, 1);
  }
};

// grad + factor * where(bit, 0, w): kFloats at a time, product and sum each rounded.
struct PrunedSum {
  static constexpr int kFloats = 8;
  __m256 factor;
  __m256i places;

  explicit NMS_INLINE PrunedSum(float f)
      : factor(_mm256_set1_ps(f)), places(_mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128)) {}
  NMS_INLINE Vec of(const float* grad, const float* w, const uint8_t* bits) const {
    const __m256i kept = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(*bits), places), places);
    const __m256 g = _mm256_loadu_ps(grad);
    const __m256 sum = _mm256_add_ps(g, _mm256_mul_ps(factor, _mm256_loadu_ps(w)));
    return _mm256_castps_si256(_mm256_blendv_ps(sum, g, _mm256_castsi256_ps(kept)));
  }
};

// where(bit, grad + factor * w, 0), in the same way.
struct KeptSum {
  static constexpr int kFloats = 8;
  __m256 factor;
  __m256i places;

  explicit NMS_INLINE KeptSum(float f)
      : factor(_mm256_set1_ps(f)), places(_mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128)) {}
  NMS_INLINE Vec of(const float* grad, const float* w, const uint8_t* bits) const {
    const __m256i kept = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(*bits), places), places);
    const __m256 sum = _mm256_add_ps(_mm256_loadu_ps(grad), _mm256_mul_ps(factor, _mm256_loadu_ps(w)));
    return _mm256_and_si256(_mm256_castps_si256(sum), kept);
  }
};
