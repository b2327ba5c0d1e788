// Panels to dense rows with AVX-512.
//
// What    Column by column of a window: where a slot's field names the column, its values are taken, sixteen lanes at
//         once. Sixteen columns are then transposed to rows.
// Layout  A Source says how a step's values and index words become vectors, one for each of its turns: a window in
//         lanes of 32 bits, or both windows of a bfloat16 step in lanes of 16.
//
// Note    Included inside the target region of an AVX-512 source, after transpose_avx512.h and linear_tile.h (which
//         has the Slots).
#pragma once

// One window of 32-bit numbers at a time.
struct WideLanes {
  static NMS_INLINE __m512i shifted(__m512i words, int shift) {
    return _mm512_srl_epi32(words, _mm_cvtsi32_si128(shift));
  }
  template <int kBits, int kShift>
  static NMS_INLINE __m512i field(__m512i words) {
    return _mm512_and_si512(_mm512_srli_epi32(words, kShift), _mm512_set1_epi32((1 << kBits) - 1));
  }
  template <int kPlace>
  static NMS_INLINE __m512i take(__m512i column, __m512i field, __m512i values) {
    return _mm512_mask_mov_epi32(column, _mm512_cmpeq_epi32_mask(field, _mm512_set1_epi32(kPlace)), values);
  }
  static NMS_INLINE void store_rows(const __m512i (&rows)[kColumns], int, float* out) {
    NMS_UNROLL
    for (int i = 0; i < kColumns; ++i) _mm512_storeu_si512(out + i * kTileStride, rows[i]);
  }
};

struct DenseFloat32 : WideLanes {
  static constexpr int kHalves = 1, kTurns = 1, kValueBytes = 64;
  template <int kTurn>
  static NMS_INLINE __m512i words(const uint32_t* p) {
    return _mm512_loadu_si512(p);
  }
  template <int kTurn>
  static NMS_INLINE __m512i values(const uint8_t* p) {
    return _mm512_loadu_si512(p);
  }
};

struct DenseFloat16 : WideLanes {
  static constexpr int kHalves = 1, kTurns = 1, kValueBytes = 32;
  template <int kTurn>
  static NMS_INLINE __m512i words(const uint32_t* p) {
    return _mm512_loadu_si512(p);
  }
  template <int kTurn>
  static NMS_INLINE __m512i values(const uint8_t* p) {
    return _mm512_castps_si512(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
  }
};

// One window after the other, as float32.
struct DenseBFloat16 : WideLanes {
  static constexpr int kHalves = 2, kTurns = 2, kValueBytes = 64;
  template <int kTurn>
  static NMS_INLINE __m512i words(const uint32_t* p) {
    const __m512i both = _mm512_loadu_si512(p);
    return kTurn == 0 ? both : _mm512_srli_epi32(both, 16);
  }
  template <int kTurn>
  static NMS_INLINE __m512i values(const uint8_t* p) {
    const __m512i both = _mm512_loadu_si512(p);
    return kTurn == 0 ? _mm512_slli_epi32(both, 16)
                      : _mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
  }
};

// Both windows at once: sixteen rows of the first, then of the second, so that 32 bits are two rows side by side.
struct DenseBFloat16Pairs {
  static constexpr int kHalves = 2, kTurns = 1, kValueBytes = 64;

  static NMS_INLINE __m512i window_by_window(__m512i v) {
    const __m512i order = _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1, 30, 28, 26, 24,
                                           22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    return _mm512_permutexvar_epi16(order, v);
  }
  template <int kTurn>
  static NMS_INLINE __m512i words(const uint32_t* p) {
    return window_by_window(_mm512_loadu_si512(p));
  }
  template <int kTurn>
  static NMS_INLINE __m512i values(const uint8_t* p) {
    return window_by_window(_mm512_loadu_si512(p));
  }
  static NMS_INLINE __m512i shifted(__m512i words, int shift) {
    return _mm512_srl_epi16(words, _mm_cvtsi32_si128(shift));
  }
  template <int kBits, int kShift>
  static NMS_INLINE __m512i field(__m512i words) {
    return _mm512_and_si512(_mm512_srli_epi16(words, kShift), _mm512_set1_epi16((1 << kBits) - 1));
  }
  template <int kPlace>
  static NMS_INLINE __m512i take(__m512i column, __m512i field, __m512i values) {
    return _mm512_mask_mov_epi16(column, _mm512_cmpeq_epi16_mask(field, _mm512_set1_epi16(kPlace)), values);
  }
  static NMS_INLINE void store_rows(const __m512i (&rows)[kColumns], int window, float* out) {
    NMS_UNROLL
    for (int i = 0; i < kColumns; ++i) _mm512_storeu_si512(out + i % 8 * kTileStride + i / 8 * window, rows[i]);
  }
};

// Patterns whose slots are known: a slot is compared with the columns of its group only.
template <class Source, class Slots>
struct DensePanel {
  static constexpr int kSlots = Slots::kSlots;
  static constexpr int kFields = 32 / Source::kHalves / Slots::kBits;
  static constexpr int kSteps = kFields >= kSlots ? kFields / kSlots : 1;  // of a word
  static constexpr int kWords = kFields >= kSlots ? 1 : kSlots / kFields;  // of a step
  using Columns = __m512i[kColumns];
  using Words = __m512i[kWords];

  static void run(const DenseRows& d) {
    const uint8_t* values = static_cast<const uint8_t*>(d.values);
    const int64_t last = d.first_step + d.steps;
    float* rows = static_cast<float*>(d.rows);
    for (int64_t step = d.first_step; step < last; ++step, values += kSlots * Source::kValueBytes) {
      const uint32_t* words = d.indices + step / kSteps * kWords * kPanelRows;
      const int shift = static_cast<int>(step % kSteps) * kSlots * Slots::kBits;
      NMS_UNROLL
      for (int i = 0; i < kWords; ++i) prefetch(words + d.early_words + i * kPanelRows);
      turns(std::make_integer_sequence<int, Source::kTurns>{}, words, shift, values, d.early_values, rows);
      rows += Source::kHalves * kWindowInputs;
    }
  }

 private:
  template <int... kTurn>
  static NMS_INLINE void turns(std::integer_sequence<int, kTurn...>, const uint32_t* index_words, int shift,
                               const uint8_t* values, int64_t early, float* rows) {
    (turn<kTurn>(index_words, shift, values, early, rows + kTurn * kWindowInputs), ...);
  }
  template <int kTurn>
  static NMS_INLINE void turn(const uint32_t* index_words, int shift, const uint8_t* values, int64_t early,
                              float* rows) {
    Words words;
    NMS_UNROLL
    for (int i = 0; i < kWords; ++i) {
      words[i] = Source::template words<kTurn>(index_words + i * kPanelRows);
      if (kSteps > 1) words[i] = Source::shifted(words[i], shift);
    }
    Columns columns;
    NMS_UNROLL
    for (int i = 0; i < kColumns; ++i) columns[i] = _mm512_setzero_si512();
    slots<kTurn>(std::make_integer_sequence<int, kSlots>{}, words, values, early, columns);
    transpose(columns);
    Source::store_rows(columns, kWindowInputs, rows);
  }
  template <int kTurn, int... kSlot>
  static NMS_INLINE void slots(std::integer_sequence<int, kSlot...>, const Words& words, const uint8_t* values,
                               int64_t early, Columns& columns) {
    (slot<kTurn, kSlot>(std::make_integer_sequence<int, Slots::kM>{}, words, values, early, columns), ...);
  }
  template <int kTurn, int kSlot, int... kPlace>
  static NMS_INLINE void slot(std::integer_sequence<int, kPlace...>, const Words& words, const uint8_t* values,
                              int64_t early, Columns& columns) {
    constexpr int kStart = Slots::group_start(kSlot);
    constexpr int kFirst = Slots::kBits == 2 ? 0 : kStart;  // what a field counts from
    const uint8_t* at = values + kSlot * Source::kValueBytes;
    const __m512i value = Source::template values<kTurn>(at);
    if (kTurn == 0) prefetch(at + early);
    const __m512i field = Source::template field<Slots::kBits, kSlot % kFields * Slots::kBits>(words[kSlot / kFields]);
    ((columns[kStart + kPlace] = Source::template take<kFirst + kPlace>(columns[kStart + kPlace], field, value)), ...);
  }
};

// The same for any number of slots, known only at run time; fields of 4 bits.
template <class Source>
struct AnyDensePanel {
  static constexpr int kFields = 32 / Source::kHalves / 4;

  static void run(const DenseRows& d) {
    const uint8_t* values = static_cast<const uint8_t*>(d.values);
    const int slots = d.layout->slots, window = d.layout->window;
    float* rows = static_cast<float*>(d.rows);
    int64_t position = d.first_step * slots;
    for (int64_t step = 0; step < d.steps; ++step) {
      turns(std::make_integer_sequence<int, Source::kTurns>{}, d, position, slots, window, values, rows);
      position += slots;
      values += slots * Source::kValueBytes;
      rows += Source::kHalves * window;
    }
  }

 private:
  template <int... kTurn>
  static NMS_INLINE void turns(std::integer_sequence<int, kTurn...>, const DenseRows& d, int64_t position, int slots,
                               int window, const uint8_t* values, float* rows) {
    (turn<kTurn>(std::make_integer_sequence<int, kColumns>{}, d, position, slots, window, values,
                 rows + kTurn * window),
     ...);
  }
  template <int kTurn, int... kPlace>
  static NMS_INLINE void turn(std::integer_sequence<int, kPlace...>, const DenseRows& d, int64_t position, int slots,
                              int window, const uint8_t* values, float* rows) {
    __m512i columns[kColumns];
    NMS_UNROLL
    for (int i = 0; i < kColumns; ++i) columns[i] = _mm512_setzero_si512();
    for (int slot = 0; slot < slots; ++slot, ++position) {
      const uint32_t* words = d.indices + position / kFields * kPanelRows;
      prefetch(words + d.early_words);
      const int shift = static_cast<int>(position % kFields) * 4;
      const __m512i field = Source::template field<4, 0>(Source::shifted(Source::template words<kTurn>(words), shift));
      const uint8_t* at = values + slot * Source::kValueBytes;
      const __m512i value = Source::template values<kTurn>(at);
      if (kTurn == 0) prefetch(at + d.early_values);
      ((columns[kPlace] = Source::template take<kPlace>(columns[kPlace], field, value)), ...);
    }
    transpose(columns);
    Source::store_rows(columns, window, rows);
  }
};

template <class Source>
DenseRowsFn dense_rows_of(const PanelLayout& layout) {
  if (layout.index_bits == 2) {
    if (layout.m == 2) return &DensePanel<Source, GroupFields<1, 2>>::run;
    if (layout.n == 2) return &DensePanel<Source, GroupFields<2, 4>>::run;
    return &DensePanel<Source, GroupFields<1, 4>>::run;
  }
  if (layout.m == 8) {
    if (layout.n == 1) return &DensePanel<Source, WindowFields<2, 8>>::run;
    if (layout.n == 2) return &DensePanel<Source, WindowFields<4, 8>>::run;
    if (layout.n == 4) return &DensePanel<Source, WindowFields<8, 8>>::run;
  }
  if (layout.m == 16) {
    if (layout.n == 1) return &DensePanel<Source, WindowFields<1, 16>>::run;
    if (layout.n == 2) return &DensePanel<Source, WindowFields<2, 16>>::run;
    if (layout.n == 4) return &DensePanel<Source, WindowFields<4, 16>>::run;
  }
  return &AnyDensePanel<Source>::run;
}
