// Bit streams: packed masks and packed indices are fields of 1..64 bits, one after the other, low bits first.
#pragma once

#include <cstdint>

#include "hd.h"

namespace nms {

NMS_HD uint64_t low_bits(int count) { return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1; }

NMS_HD int popcount64(uint64_t word) {
#if defined(__CUDA_ARCH__)
  return __popcll(word);
#else
  return __builtin_popcountll(word);
#endif
}

NMS_HD int lowest_bit(uint64_t word) {  // word != 0
#if defined(__CUDA_ARCH__)
  return __ffsll(static_cast<long long>(word)) - 1;
#else
  return __builtin_ctzll(word);
#endif
}

// Writes fields from a byte boundary on; finish() writes the last, partly filled byte with zeros above.
class BitWriter {
 public:
  NMS_HD explicit BitWriter(uint8_t* out) : out_(out) {}

  NMS_HD void put(uint64_t field, int width) {
    if (filled_ + width > 64) {  // at most 7 bits are ever pending, so this happens for width > 57 only
      const int first = 32;
      put_short(field & low_bits(first), first);
      put_short(field >> first, width - first);
    } else {
      put_short(field, width);
    }
  }

  NMS_HD void finish() {
    if (filled_ > 0) *out_++ = static_cast<uint8_t>(pending_);
    pending_ = 0;
    filled_ = 0;
  }

 private:
  NMS_HD void put_short(uint64_t field, int width) {
    pending_ |= field << filled_;
    filled_ += width;
    while (filled_ >= 8) {
      *out_++ = static_cast<uint8_t>(pending_);
      pending_ >>= 8;
      filled_ -= 8;
    }
  }

  uint8_t* out_;
  uint64_t pending_ = 0;
  int filled_ = 0;
};

// The field of `width` bits that starts `offset` bits into the stream. Reads only the bytes that hold it.
NMS_HD uint64_t read_bits(const uint8_t* stream, int64_t offset, int width) {
  const uint8_t* byte = stream + (offset >> 3);
  const int skip = static_cast<int>(offset & 7);
  uint64_t field = *byte >> skip;
  for (int have = 8 - skip; have < width; have += 8) field |= static_cast<uint64_t>(*++byte) << have;
  return field & low_bits(width);
}

}  // namespace nms
