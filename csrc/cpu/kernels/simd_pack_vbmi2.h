// Packing of 16-bit and 8-bit elements on processors with AVX-512 VBMI2.
//
// Note    Has a target region of its own: kernels_avx512.cpp must not need VBMI2, and asks the processor for it.
#pragma once

NMS_TARGET_REGION(NMS_AVX512_VBMI2)

namespace nms {
namespace {

// The elements that have a bit, side by side; see pack_kept() in simd_avx512.h.
inline void pack_words_vbmi2(const char* elements, const uint8_t* mask, int64_t count, char* values) {
  for (int64_t i = 0; i < count; i += 32) {
    uint32_t bits;
    std::memcpy(&bits, mask + i / 8, sizeof(bits));
    _mm512_storeu_si512(values, _mm512_maskz_compress_epi16(bits, _mm512_loadu_si512(elements + 2 * i)));
    values += 2 * __builtin_popcount(bits);
  }
}

inline void pack_bytes_vbmi2(const char* elements, const uint8_t* mask, int64_t count, char* values) {
  for (int64_t i = 0; i < count; i += 64) {
    uint64_t bits;
    std::memcpy(&bits, mask + i / 8, sizeof(bits));
    _mm512_storeu_si512(values, _mm512_maskz_compress_epi8(bits, _mm512_loadu_si512(elements + i)));
    values += __builtin_popcountll(bits);
  }
}

}  // namespace
}  // namespace nms

NMS_TARGET_REGION_END
