// Sixteen by sixteen numbers of 32 bits, transposed in registers.
//
// Note    Included inside the target region of an AVX-512 source.
#pragma once

constexpr int kColumns = 16;  // of a block that is transposed at once

// v[row] lane column -> v[column] lane row.
NMS_INLINE void transpose(__m512i (&v)[kColumns]) {
  __m512i t[kColumns];
  NMS_UNROLL
  for (int i = 0; i < kColumns; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  NMS_UNROLL
  for (int i = 0; i < kColumns; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // Quarter q of v[4 i + j] now is column 4 q + j of rows 4 i to 4 i + 3.
  NMS_UNROLL
  for (int j = 0; j < 4; ++j) {
    const __m512i even_low = _mm512_shuffle_i32x4(v[j], v[4 + j], 0x88);
    const __m512i even_high = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(v[j], v[4 + j], 0xDD);
    const __m512i odd_high = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0xDD);
    t[j] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    t[8 + j] = _mm512_shuffle_i32x4(even_low, even_high, 0xDD);
    t[12 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xDD);
  }
  NMS_UNROLL
  for (int i = 0; i < kColumns; ++i) v[i] = t[i];
}
