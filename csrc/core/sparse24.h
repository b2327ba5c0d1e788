// Metadata of sparse tensor cores: which of every four (float32: of every two) weights are kept, four bits a group, and
// where three layouts put group q of row r.
//
//   nibble  idx0 | idx1 << 2: the packed form's code of 2:4 (packed.h). A float32 pair counts as four halves:
//           first kept -> 0x4 (halves 0, 1), second kept -> 0xE (halves 2, 3).
//   blob    [ values [rows, k / 2] | metadata, rows * groups / 2 bytes ]
//
// kCutlass is what torch.sparse's CUTLASS path stores. The other two are what cuSPARSELt was found to store for 16-bit
// weights on compute capability 8.0 and 9.0; NVIDIA documents neither, so a packer may use them only where the library
// of this device was seen to give the same bytes.
#pragma once

#include <cstdint>

#include "hd.h"

namespace nms {

enum class MetadataLayout : int { kCutlass, kSm80, kSm90 };

// What a layout needs rows and groups per row to be multiples of; 0, 0: it has no such weights.
struct MetadataMultiples {
  int rows, groups;
};

NMS_HD MetadataMultiples metadata_multiples(MetadataLayout layout, int element_bytes) {
  if (layout == MetadataLayout::kCutlass)
    return element_bytes == 1 ? MetadataMultiples{16, 16} : MetadataMultiples{32, 8};
  if (element_bytes != 2) return {0, 0};
  return layout == MetadataLayout::kSm80 ? MetadataMultiples{128, 32} : MetadataMultiples{64, 16};
}

// 1:2 code (0 or 1) -> nibble.
NMS_HD int pair_nibble(int code) { return code == 0 ? 0x4 : 0xE; }

// Inside a tile of 32 rows and 8 groups, in 16-bit words of four groups: rows r, r + 8 are neighbours.
//        word  0      1      2      3      4       5       6       7      8 ...
//   (row, c)  (0,0)  (8,0)  (0,1)  (8,1)  (16,0)  (24,0)  (16,1)  (24,1)  (1,0) ...        c: first, second four groups
NMS_HD int64_t tile_word(int64_t r, int64_t c) { return r % 8 * 8 + r % 32 / 16 * 4 + r % 16 / 8 + c % 2 * 2; }

// Which nibble of the metadata (2 i: low half of byte i, 2 i + 1: high half) belongs to group q of row r.
NMS_HD int64_t nibble_place(MetadataLayout layout, int element_bytes, int64_t rows, int64_t groups, int64_t r,
                            int64_t q) {
  switch (layout) {
    case MetadataLayout::kCutlass:
      if (element_bytes == 1) {  // 32-bit words of eight groups, tiles of 16 rows and 16 groups, down the rows first
        const int64_t c = q / 8;
        return (r / 16 * 32 + c / 2 * 2 * rows + r % 8 * 4 + r % 16 / 8 + c % 2 * 2) * 8 + q % 8;
      }
      return (r / 32 * 64 + q / 8 * 2 * rows + tile_word(r, q / 4)) * 4 + q % 4;  // tiles down the rows first
    case MetadataLayout::kSm80:  // the same tiles, in blocks of 128 rows and 16 groups
      return (r / 128 * 512 + q / 16 * 512 * (rows / 128) + q % 16 / 8 * 256 + r % 128 / 32 * 64 +
              tile_word(r, q / 4)) *
                 4 +
             q % 4;
    default: {  // kSm90: stripes of 64 rows, along k inside a stripe; rows r and r + 8 share bytes
      const int64_t byte = r / 64 * 32 * groups + q / 8 * 256 + r % 64 / 16 * 64 + r % 8 * 8 + q % 4 * 2 + q % 8 / 4;
      return byte * 2 + r % 16 / 8;
    }
  }
}

// ---- What a thread packs at once ----
//
// Rows r and r + 8, 64 bytes of each: in every layout their nibbles lie side by side, 8 bytes (8-bit types: 16) from a
// multiple of as many bytes on. In 16-bit words of four nibbles, of groups q, q + 1, ...:
//
//   16 and 32 bits, cutlass and sm80     r: 0-3    r + 8: 0-3    r: 4-7    r + 8: 4-7
//   8 bits, cutlass                      r: 0-3, r: 4-7, r + 8: 0-3, r + 8: 4-7, r: 8-11, r: 12-15, r + 8: 8-11, 12-15
//   sm90, bytes of r (low), r + 8        0, 4, 1, 5, 2, 6, 3, 7
constexpr int kPackBytes = 64;  // of a dense row

// Groups of a row in a unit.
NMS_HD constexpr int unit_groups(int element_bytes) { return element_bytes == 1 ? 16 : 8; }

// Which of the unit's nibbles belongs to its group g of row r + 8 * second.
NMS_HD constexpr int unit_nibble(MetadataLayout layout, int element_bytes, int second, int g) {
  if (layout == MetadataLayout::kSm90) return (g % 4 * 2 + g / 4) * 2 + second;
  const int word = element_bytes == 1 ? 8 : 4;  // nibbles
  return (second + g / word * 2) * word + g % word;
}

}  // namespace nms
