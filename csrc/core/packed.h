// The packed form's indices: per group one code of group_bits bits, which says where the kept values stood.
//
//   "index"    n fields of index_bits bits (2 for m <= 4, 4 for m <= 16, 8 above), ascending, low bits first.
//              For 2:4 that is the sparse tensor cores' nibble  idx0 | idx1 << 2:
//                kept 0,1 -> 0x4   0,2 -> 0x8   0,3 -> 0xC   1,2 -> 0x9   1,3 -> 0xD   2,3 -> 0xE
//   "bitmask"  m bits, chosen where the indices would take more room (n * index_bits > m).
//
// A short last group names virtual positions behind its end, so that every group has exactly n distinct positions.
#pragma once

#include <cstdint>

#include "bits.h"
#include "hd.h"

namespace nms {

struct PackedFormat {
  int n, m;
  int index_bits;  // width of one index field; 0 for a bitmask
  int group_bits;  // width of a group's code
};

NMS_HD constexpr PackedFormat packed_format(int n, int m) {
  const int index_bits = m <= 4 ? 2 : m <= 16 ? 4 : 8;
  return n * index_bits <= m ? PackedFormat{n, m, index_bits, n * index_bits} : PackedFormat{n, m, 0, m};
}

NMS_HD int64_t index_row_bytes(PackedFormat format, int64_t groups) { return (groups * format.group_bits + 7) / 8; }

// Fills a short group's mask (fewer than n bits) with the virtual positions that follow its `len` real ones.
NMS_HD uint64_t fill_short_group(uint64_t mask, int len, int n) {
  for (int missing = n - popcount64(mask), i = len; missing > 0; --missing, ++i) mask |= uint64_t{1} << i;
  return mask;
}

NMS_HD uint64_t encode_group(uint64_t mask /* n of m bits set */, PackedFormat format) {
  if (format.index_bits == 0) return mask;
  uint64_t code = 0;
  for (int shift = 0; mask != 0; mask &= mask - 1, shift += format.index_bits)
    code |= static_cast<uint64_t>(lowest_bit(mask)) << shift;
  return code;
}

// Position of each of a group's values, one call after the other: first, second, ... . -1 when there is none: a code
// that no encoder writes can name no position outside the group.
class GroupDecoder {
 public:
  NMS_HD GroupDecoder(uint64_t code, PackedFormat format) : code_(code), format_(format) {}

  NMS_HD int next() {
    if (format_.index_bits == 0) {
      if (code_ == 0) return -1;
      const int position = lowest_bit(code_);
      code_ &= code_ - 1;
      return position;
    }
    const int position = static_cast<int>(code_ & low_bits(format_.index_bits));
    code_ >>= format_.index_bits;
    return position < format_.m ? position : -1;
  }

 private:
  uint64_t code_;
  PackedFormat format_;
};

// True when the code names n distinct positions of the group in ascending order.
NMS_HD bool is_legal_code(uint64_t code, PackedFormat format) {
  if (format.index_bits == 0) return popcount64(code) == format.n;
  GroupDecoder decoder(code, format);
  for (int j = 0, previous = -1; j < format.n; ++j) {
    const int position = decoder.next();
    if (position <= previous) return false;
    previous = position;
  }
  return true;
}

}  // namespace nms
