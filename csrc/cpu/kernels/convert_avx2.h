// Conversions of the 16-bit types with AVX2.
//
// Note    Included inside the target region of an AVX2 source with F16C, after convert_lanes.h.
#pragma once

template <>
struct Conversion<DType::kFloat16> {
  static NMS_INLINE void widen(const uint16_t* in, float* out) {
    const __m128i* halves = reinterpret_cast<const __m128i*>(in);
    _mm256_storeu_ps(out, _mm256_cvtph_ps(_mm_loadu_si128(halves)));
    _mm256_storeu_ps(out + 8, _mm256_cvtph_ps(_mm_loadu_si128(halves + 1)));
  }
  static NMS_INLINE void narrow(const float* in, uint16_t* out) {
    __m128i* halves = reinterpret_cast<__m128i*>(out);
    _mm_storeu_si128(halves, _mm256_cvtps_ph(_mm256_loadu_ps(in), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    _mm_storeu_si128(halves + 1,
                     _mm256_cvtps_ph(_mm256_loadu_ps(in + 8), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};

template <>
struct Conversion<DType::kBFloat16> {
  static NMS_INLINE void widen(const uint16_t* in, float* out) {
    for (int i = 0; i < kConvertLanes; ++i) out[i] = to_arithmetic<DType::kBFloat16>(in[i]);
  }
  static NMS_INLINE void narrow(const float* in, uint16_t* out) {
    const __m256i both = _mm256_packus_epi32(upper_halves(in), upper_halves(in + 8));
    // Packing works within 128 bits: put the four quarters back in order.
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permute4x64_epi64(both, 0xD8));
  }

 private:
  static NMS_INLINE __m256i upper_halves(const float* in) {  // as core/convert.h, eight at once
    const __m256 v = _mm256_loadu_ps(in);
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  }
};
