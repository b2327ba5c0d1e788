// Compression: the kept values of each row side by side, and the codes of their places.
//
// Note    Included inside a target region, after simd_rows.h.
#pragma once

// ---- Codes. The masks of 64 keys become the codes of their groups; for every m here these fill whole bytes. ----

// 2:4 and, generally, anything that is looked up per group of four: entry [mask] is the group's code.
template <int kN>
struct NibbleCodes {
  alignas(16) uint8_t code[16] = {};
  constexpr NibbleCodes() {
    for (int mask = 0; mask < 16; ++mask)
      for (int i = 0, shift = 0; i < 4 && shift < 2 * kN; ++i)
        if (mask >> i & 1) {
          code[mask] = static_cast<uint8_t>(code[mask] | i << shift);
          shift += 2;
        }
  }
};

struct Codes24 {
  static constexpr int kBytes = 8;
  NMS_INLINE uint64_t operator()(uint64_t masks) const {  // a nibble of the mask -> idx0 | idx1 << 2
    static constexpr NibbleCodes<2> kTable;
    const __m128i table = _mm_load_si128(reinterpret_cast<const __m128i*>(kTable.code));
    const __m128i nibble = _mm_set1_epi8(15);
    const __m128i bytes = _mm_cvtsi64_si128(static_cast<int64_t>(masks));
    const __m128i low = _mm_shuffle_epi8(table, _mm_and_si128(bytes, nibble));
    const __m128i high = _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble));
    return static_cast<uint64_t>(_mm_cvtsi128_si64(_mm_or_si128(low, _mm_slli_epi16(high, 4))));
  }
};

struct Codes14 {
  static constexpr int kBytes = 4;
  NMS_INLINE uint64_t operator()(uint64_t masks) const {  // one bit of four -> its place, in two bits
    const uint64_t bit0 = (masks >> 1 | masks >> 3) & 0x1111111111111111;
    const uint64_t bit1 = (masks >> 2 | masks >> 3) & 0x1111111111111111;
    return _pext_u64(bit0 | bit1 << 1, 0x3333333333333333);
  }
};

struct Codes12 {
  static constexpr int kBytes = 8;
  NMS_INLINE uint64_t operator()(uint64_t masks) const { return masks >> 1 & 0x5555555555555555; }
};

// Places of the set bits of each byte, four bits each, the lowest first.
struct PlacesTable {
  uint32_t places[256] = {};
  constexpr PlacesTable() {
    for (int bits = 0; bits < 256; ++bits)
      for (uint32_t i = 0, shift = 0; i < 8; ++i)
        if (bits >> i & 1) {
          places[bits] |= i << shift;
          shift += 4;
        }
  }
};

template <int kM /* 8 or 16: places of four bits */>
struct CodesOfPlaces {
  int group_bits;
  int kBytes = 64 / kM * group_bits / 8;

  NMS_INLINE uint64_t operator()(uint64_t masks) const {
    static constexpr PlacesTable kTable;
    uint64_t codes = 0;
    for (int group = 0, shift = 0; group < 64; group += kM, shift += group_bits) {
      uint64_t code = kTable.places[masks >> group & 0xFF];
      if constexpr (kM == 16) {  // the second byte's places are 8 and more
        const uint64_t second = masks >> group >> 8 & 0xFF;
        const uint64_t places = kTable.places[second] | (0x88888888 & low_bits(4 * popcount64(second)));
        code |= places << (4 * popcount64(masks >> group & 0xFF));
      }
      codes |= code << shift;
    }
    return codes;
  }
};

struct CodesAny {
  PackedFormat format;
  int kBytes = 64 / format.m * format.group_bits / 8;

  NMS_INLINE uint64_t operator()(uint64_t masks) const {
    uint64_t codes = 0;
    for (int group = 0, shift = 0; group < 64; group += format.m, shift += format.group_bits)
      codes |= encode_group(masks >> group & low_bits(format.m), format) << shift;
    return codes;
  }
};

template <class Codes>
void write_codes(const uint8_t* mask, int64_t groups, PackedFormat format, Codes codes, uint8_t* out) {
  const int64_t word_groups = 64 / format.m;
  for (; groups >= word_groups; groups -= word_groups, mask += 8, out += codes.kBytes) {
    uint64_t masks;
    std::memcpy(&masks, mask, 8);
    const uint64_t code = codes(masks);
    std::memcpy(out, &code, static_cast<size_t>(codes.kBytes));
  }
  if (groups > 0) {
    uint64_t masks = 0;
    std::memcpy(&masks, mask, static_cast<size_t>((groups * format.m + 7) / 8));
    const int used = static_cast<int>(groups) * format.group_bits;
    const uint64_t code = codes(masks) & low_bits(used);
    std::memcpy(out, &code, static_cast<size_t>((used + 7) / 8));
  }
}

// out = the codes of `groups` groups, beginning at a byte.
inline void write_codes(const uint8_t* mask, int64_t groups, PackedFormat format, uint8_t* out) {
  if (format.index_bits == 0) return copy_bits(mask, groups * format.m, out);
  if (format.m == 4 && format.n == 2) return write_codes(mask, groups, format, Codes24{}, out);
  if (format.m == 4 && format.n == 1) return write_codes(mask, groups, format, Codes14{}, out);
  if (format.m == 2 && format.n == 1) return write_codes(mask, groups, format, Codes12{}, out);
  if (format.m == 8) return write_codes(mask, groups, format, CodesOfPlaces<8>{format.group_bits}, out);
  if (format.m == 16) return write_codes(mask, groups, format, CodesOfPlaces<16>{format.group_bits}, out);
  write_codes(mask, groups, format, CodesAny{format}, out);
}

// ---- Values ----

inline void copy_bytes(const void* src, void* dst, int64_t bytes, bool past_cache) {
  const char* from = static_cast<const char*>(src);
  char* to = static_cast<char*>(dst);
  int64_t i = 0;
  if (past_cache && is_aligned(to, kVectorBytes))
    for (; i + kVectorBytes <= bytes; i += kVectorBytes) stream(to + i, load(from + i));
  std::memcpy(to + i, from + i, static_cast<size_t>(bytes - i));
}

// What    Chooses along rows, packs the values in the first-level cache, and writes them and the codes.
// Layout  As CompressPanel. Packing goes to a buffer first, because it writes a little more than it means to, and
// because
//         whole chunks can then be streamed.
template <DType D>
void compress(const CompressPanel& p) {
  if (!has_chooser(p.m)) return scalar_kernels().compress[static_cast<int>(D)](p);
  using Bits = BitsOf<D>;
  constexpr int kSize = sizeof(Bits);
  const PackedFormat format = packed_format(p.n, p.m);
  alignas(64) Bits packed[kChunk<typename Keys<D>::L> + kSlack];
  choose_rows<D>(
      p.src, p.src_row, p.src_k, p.rows, p.k, p.n, p.m, nullptr, 0,
      [&](int64_t row, int64_t first, int64_t count, const Bits* elements, const uint8_t* mask) {
        const int64_t groups = (count + p.m - 1) / p.m;
        pack_kept<kSize>(reinterpret_cast<const char*>(elements), mask, groups * p.m, reinterpret_cast<char*>(packed));
        Bits* values = static_cast<Bits*>(p.values) + row * p.values_row + first / p.m * p.n;
        copy_bytes(packed, values, groups * p.n * kSize, p.stream);
        write_codes(mask, groups, format, p.indices + row * p.indices_row + first / p.m * format.group_bits / 8);
      });
  if (p.stream) _mm_sfence();
}
