// Conversions of the 16-bit types with AVX-512.
//
// Note    Included inside the target region of an AVX-512 source with F16C, after convert_lanes.h.
#pragma once

template <>
struct Conversion<DType::kFloat16> {
  static NMS_INLINE void widen(const uint16_t* in, float* out) {
    _mm512_storeu_ps(out, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in))));
  }
  static NMS_INLINE void narrow(const float* in, uint16_t* out) {
    const __m256i halves = _mm512_cvtps_ph(_mm512_loadu_ps(in), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), halves);
  }
};

// As core/convert.h, sixteen at once; with AVX-512 BF16 in one instruction, which flushes what is below the normal
// numbers to zero, as its products do. Files whose region has it say so with NMS_REGION_HAS_BF16.
NMS_INLINE __m256i narrow_bfloat16(__m512 v) {
#if defined(NMS_REGION_HAS_BF16)
  return (__m256i)_mm512_cvtneps_pbh(v);
#else
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __m512i chosen = _mm512_mask_mov_epi32(rounded, nan, quiet);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16));
#endif
}

template <>
struct Conversion<DType::kBFloat16> {
  static NMS_INLINE void widen(const uint16_t* in, float* out) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in)));
    _mm512_storeu_si512(out, _mm512_slli_epi32(wide, 16));
  }
  static NMS_INLINE void narrow(const float* in, uint16_t* out) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), narrow_bfloat16(_mm512_loadu_ps(in)));
  }
};
