// What    A weight as the blob of sparse tensor cores' software: [ values | metadata ], from its packed 2:4 form (1:2
// in
//         32 bits), or from a dense weight, of which the two largest of every four (one of two) are chosen on the way.
// Layout  The three of core/sparse24.h, pictured there. A thread takes rows r and r + 8, 64 bytes of each if they were
//         dense: their values are 32 bytes of a row, their nibbles 8 or 16 bytes in every layout:
//
//            dense row r      [ 64 bytes ]  --choose-->  values row r      [ 32 bytes ]
//            dense row r + 8  [ 64 bytes ]  --choose-->  values row r + 8  [ 32 bytes ]   metadata [ 8 bytes ]
//
// Launch  One thread per unit; eight neighbouring threads take eight neighbouring rows, whose nibbles adjoin (sm90, 8
//         bits) or alternate with those of the next 16 rows, so that sectors are written whole. Bytes moved: a dense
//         16-bit weight in once, 9/16 of it out; no second pass, as the library's prune and compress need.
#pragma once

#include <cstdint>

#include "../../core/bits.h"
#include "../../core/packed.h"
#include "../../core/sparse24.h"
#include "chunk.h"
#include "launch.cuh"
#include "layout.h"
#include "select_fixed.h"

namespace nms {

// D: the weight's type. kDense: src is [rows, k]; else it is the values, [rows, k / 2], and codes are its indices.
template <DType D, bool kDense>
struct PackSparse24 {
  using Bits = typename Element<D>::Bits;
  static constexpr int kBytes = static_cast<int>(sizeof(Bits));
  static constexpr int kM = kBytes == 4 ? 2 : 4;
  static constexpr int kGroups = unit_groups(kBytes);
  static constexpr int kNibbleWords = kGroups / 4;  // of 32 bits, of both rows
  static constexpr int kCodeBits = kBytes == 4 ? 2 : 4;

  MetadataLayout layout;
  const uint8_t* src;
  const uint8_t* codes;  // [rows, k / kM * kCodeBits / 8]; of packed weights
  int64_t rows, k;       // multiples of metadata_multiples()
  Divisor row_units;     // of 64 dense bytes
  uint8_t* blob;

  NMS_HD int64_t count() const { return rows / 2 * row_units.value(); }

  NMS_HD void operator()(int64_t index) const {
    const int64_t rest = index / 8;
    const int64_t row_block = row_units.quotient(rest);
    const int64_t unit = rest - row_block * row_units.value();
    const int64_t row = row_block * 16 + index % 8;
    uint32_t nibbles[kNibbleWords] = {};
    NMS_UNROLL
    for (int second = 0; second < 2; ++second) {
      uint32_t of_row[kGroups];
      take_row(row + 8 * second, unit, of_row);
      NMS_UNROLL
      for (int g = 0; g < kGroups; ++g) {
        // A compile-time place in each of the three; the right one is added.
        const int standard = unit_nibble(MetadataLayout::kCutlass, kBytes, second, g);
        const int sm90 = unit_nibble(MetadataLayout::kSm90, kBytes, second, g);
        if (kBytes == 2 && layout == MetadataLayout::kSm90)
          nibbles[sm90 / 8] |= of_row[g] << sm90 % 8 * 4;
        else
          nibbles[standard / 8] |= of_row[g] << standard % 8 * 4;
      }
    }
    const int64_t groups = k / kM;
    uint8_t* metadata = blob + rows * (k / 2) * kBytes;
    auto* to =
        reinterpret_cast<uint32_t*>(metadata + nibble_place(layout, kBytes, rows, groups, row, unit * kGroups) / 2);
    NMS_UNROLL
    for (int w = 0; w < kNibbleWords; w += 2) *reinterpret_cast<Pair*>(to + w) = Pair{nibbles[w], nibbles[w + 1]};
  }

 private:
  struct [[gnu::may_alias]] alignas(8) Pair {
    uint32_t low, high;
  };

  // Writes the values of a row's unit, gives its nibbles.
  NMS_HD void take_row(int64_t row, int64_t unit, uint32_t* nibbles /* [kGroups] */) const {
    uint8_t* values = blob + row * (k / 2) * kBytes + unit * (kPackBytes / 2);
    if constexpr (kDense) {
      const uint8_t* from = src + row * k * kBytes + unit * kPackBytes;
      NMS_UNROLL
      for (int half = 0; half < 2; ++half) {  // two chunks in, one out
        const Chunk in[2] = {load_chunk(from + half * 32), load_chunk(from + half * 32 + kChunkBytes)};
        Chunk out{};
        NMS_UNROLL
        for (int g = 0; g < kGroups / 2; ++g) nibbles[half * (kGroups / 2) + g] = choose(in, &out, g);
        store_chunk(values + half * kChunkBytes, out);
      }
    } else {
      const uint8_t* from = src + row * (k / 2) * kBytes + unit * (kPackBytes / 2);
      store_chunk(values, load_chunk(from));
      store_chunk(values + kChunkBytes, load_chunk(from + kChunkBytes));
      constexpr int kCodeBytes = kGroups * kCodeBits / 8;
      const uint8_t* code = codes + (row * row_units.value() + unit) * kCodeBytes;
      NMS_UNROLL
      for (int g = 0; g < kGroups; ++g) {
        const uint32_t one = code[g * kCodeBits / 8] >> g * kCodeBits % 8 & ((1u << kCodeBits) - 1);
        nibbles[g] = kM == 2 ? static_cast<uint32_t>(pair_nibble(static_cast<int>(one))) : one;
      }
    }
  }

  // Chooses in group g of the chunks, puts its values into `out`, gives its nibble.
  NMS_HD static uint32_t choose(const Chunk* in, Chunk* out, int g) {
    RegisterKey<D> keys[kM];
    Bits element[kM];
    NMS_UNROLL
    for (int i = 0; i < kM; ++i) {
      element[i] = chunk_element<Bits>(in, g * kM + i);
      keys[i] = magnitude_key<D, RegisterKey<D>>(element[i]);
    }
    const uint32_t kept = select_fixed<D, kM>(keys, kM / 2);
    if constexpr (kM == 2) {
      set_chunk_element(out, g, kept & 1 ? element[0] : element[1]);
      return static_cast<uint32_t>(pair_nibble(kept & 1 ? 0 : 1));
    } else {
      const uint32_t first = kept & 1 ? 0 : kept & 2 ? 1 : 2, second = kept & 8 ? 3 : kept & 4 ? 2 : 1;
      set_chunk_element(out, 2 * g, first == 0 ? element[0] : first == 1 ? element[1] : element[2]);
      set_chunk_element(out, 2 * g + 1, second == 3 ? element[3] : second == 2 ? element[2] : element[1]);
      return first | second << 2;
    }
  }
};

}  // namespace nms
