// The dense weight from panels with AVX-512.
//
// What    Column by column, as in matmul_dense_avx512.h: where a slot's field names the column, its values are taken,
//         all lanes at once. Sixteen columns are then transposed to rows. Bits are only moved.
// Layout  A Source says how values and words become vectors: a window in lanes of 32 bits; or, of 16-bit elements, two
//         windows side by side in lanes of 16, sixteen rows of the first and then of the second. Either way a row gets
//         64 bytes at a time.
// Launch  As unpack_panels (linear_pack.h); elements of 1 and 8 bytes are left to it.
#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#include "../../core/bits.h"
#include "kernels.h"
#include "linear_pack.h"
#include "target_region.h"

// GCC 12's own intrinsics leave don't-care operands uninitialised, and warn about it (GCC bug 105593).
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

NMS_TARGET_REGION(NMS_AVX512)

namespace nms {
namespace {

#include "transpose_avx512.h"

constexpr int64_t kDenseStreamBytes = int64_t{16} << 20;  // weights of at least this size are written past the cache

// Dense rows of a panel.
struct Rows {
  uint8_t* first;
  int64_t stride;  // bytes
  int count;
  int64_t k;
  bool stream;  // past the cache; then rows are whole cache lines
};

// A panel's values and words, and where in the words a field stands.
struct Slots {
  Slots(const PanelForm& form, int64_t panel)
      : layout(form.layout),
        values(static_cast<const uint8_t*>(form.values) + panel * layout.panel_values() * form.element_size),
        words(form.indices + panel * layout.panel_words()),
        fields_log2(__builtin_ctz(static_cast<unsigned>(layout.fields))) {}

  const uint32_t* word(int64_t position) const { return words + (position >> fields_log2) * kPanelRows; }
  __m128i shift(int64_t position) const {
    return _mm_cvtsi64_si128((position & (layout.fields - 1)) * layout.index_bits);
  }

  const PanelLayout& layout;
  const uint8_t* values;
  const uint32_t* words;
  int fields_log2;  // fields are a power of two
};

struct Lanes32 {
  static NMS_INLINE __m512i take(__m512i column, __m512i field, int place, __m512i values) {
    return _mm512_mask_mov_epi32(column, _mm512_cmpeq_epi32_mask(field, _mm512_set1_epi32(place)), values);
  }

  static NMS_INLINE void store(const __m512i (&v)[kColumns], const PanelLayout& layout, int64_t step,
                               const Rows& rows) {
    const int64_t start = step * layout.window, count = std::min<int64_t>(rows.k - start, kColumns);
    uint8_t* out = rows.first + start * 4;
    if (rows.stream) {
      NMS_UNROLL
      for (int i = 0; i < kPanelRows; ++i)
        if (i < rows.count) _mm512_stream_si512(reinterpret_cast<__m512i*>(out + i * rows.stride), v[i]);
    } else {
      const __mmask16 some = static_cast<__mmask16>(low_bits(static_cast<int>(count)));
      NMS_UNROLL
      for (int i = 0; i < kPanelRows; ++i)
        if (i < rows.count) _mm512_mask_storeu_epi32(out + i * rows.stride, some, v[i]);
    }
  }
};

struct Lanes16 {
  static NMS_INLINE __m512i take(__m512i column, __m512i field, int place, __m512i values) {
    return _mm512_mask_mov_epi16(column, _mm512_cmpeq_epi16_mask(field, _mm512_set1_epi16(static_cast<int16_t>(place))),
                                 values);
  }

  // `window`: the first of the two.
  static NMS_INLINE void store_windows(const __m512i (&v)[kColumns], const PanelLayout& layout, int64_t window,
                                       const Rows& rows) {
    // 32 bits are two rows side by side: those of the first window come first.
    const __m512i evens = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26,
                                           24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odds = _mm512_add_epi16(evens, _mm512_set1_epi16(1));
    NMS_UNROLL
    for (int i = 0; i < kPanelRows / 2; ++i) {
      if (2 * i < rows.count) store_row(_mm512_permutex2var_epi16(v[i], evens, v[i + 8]), layout, window, 2 * i, rows);
      if (2 * i + 1 < rows.count)
        store_row(_mm512_permutex2var_epi16(v[i], odds, v[i + 8]), layout, window, 2 * i + 1, rows);
    }
  }

 private:
  static NMS_INLINE void store_row(__m512i both, const PanelLayout& layout, int64_t window, int row, const Rows& rows) {
    const int64_t start = window * layout.window, left = rows.k - start;
    uint8_t* out = rows.first + row * rows.stride + start * 2;
    if (rows.stream) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(out), both);
    } else if (layout.window == kWindowInputs) {
      _mm512_mask_storeu_epi16(out, static_cast<__mmask32>(first_lanes(left, 32)), both);
    } else {
      const __mmask16 low = static_cast<__mmask16>(first_lanes(left, 16));
      const __mmask16 high = static_cast<__mmask16>(first_lanes(left - layout.window, 16));
      _mm256_mask_storeu_epi16(out, low, _mm512_castsi512_si256(both));
      _mm256_mask_storeu_epi16(out + layout.window * 2, high, _mm512_extracti64x4_epi64(both, 1));
    }
  }
  static NMS_INLINE uint64_t first_lanes(int64_t count, int most) {
    return low_bits(static_cast<int>(std::clamp<int64_t>(count, 0, most)));
  }
};

struct Float32Windows : Lanes32 {
  static constexpr int kSteps = 1;
  static NMS_INLINE __m512i field(const Slots& s, int64_t step, int slot, int mask) {
    const int64_t position = step * s.layout.slots + slot;
    return _mm512_and_si512(_mm512_srl_epi32(_mm512_loadu_si512(s.word(position)), s.shift(position)),
                            _mm512_set1_epi32(mask));
  }
  static NMS_INLINE __m512i values(const Slots& s, int64_t step, int slot) {
    return _mm512_loadu_si512(s.values + (step * s.layout.slots + slot) * 64);
  }
  static NMS_INLINE void store_rows(const __m512i (&v)[kColumns], const Slots& s, int64_t step, const Rows& rows) {
    store(v, s.layout, step, rows);
  }
};

// The two windows of a step, whose lanes alternate in values and words.
struct BFloat16Windows : Lanes16 {
  static constexpr int kSteps = 1;
  static NMS_INLINE __m512i window_by_window(__m512i v) {
    const __m512i order = _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1, 30, 28, 26, 24,
                                           22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    return _mm512_permutexvar_epi16(order, v);
  }
  static NMS_INLINE __m512i field(const Slots& s, int64_t step, int slot, int mask) {
    const int64_t position = step * s.layout.slots + slot;
    const __m512i words = _mm512_srl_epi16(_mm512_loadu_si512(s.word(position)), s.shift(position));
    return window_by_window(_mm512_and_si512(words, _mm512_set1_epi16(static_cast<int16_t>(mask))));
  }
  static NMS_INLINE __m512i values(const Slots& s, int64_t step, int slot) {
    return window_by_window(_mm512_loadu_si512(s.values + (step * s.layout.slots + slot) * 64));
  }
  static NMS_INLINE void store_rows(const __m512i (&v)[kColumns], const Slots& s, int64_t step, const Rows& rows) {
    store_windows(v, s.layout, step * 2, rows);
  }
};

// The windows of two steps. Behind the last step it is taken once more; nothing of that is stored.
struct Float16Windows : Lanes16 {
  static constexpr int kSteps = 2;
  static NMS_INLINE __m512i side_by_side(__m256i a, __m256i b) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
  }
  static NMS_INLINE int64_t second(const Slots& s, int64_t step) { return std::min(step + 1, s.layout.steps - 1); }
  static NMS_INLINE __m256i narrow_field(const Slots& s, int64_t position) {
    return _mm512_cvtepi32_epi16(_mm512_srl_epi32(_mm512_loadu_si512(s.word(position)), s.shift(position)));
  }
  static NMS_INLINE __m256i window_values(const Slots& s, int64_t position) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(s.values + position * 32));
  }
  static NMS_INLINE __m512i field(const Slots& s, int64_t step, int slot, int mask) {
    const __m256i first = narrow_field(s, step * s.layout.slots + slot);
    return _mm512_and_si512(side_by_side(first, narrow_field(s, second(s, step) * s.layout.slots + slot)),
                            _mm512_set1_epi16(static_cast<int16_t>(mask)));
  }
  static NMS_INLINE __m512i values(const Slots& s, int64_t step, int slot) {
    const __m256i first = window_values(s, step * s.layout.slots + slot);
    return side_by_side(first, window_values(s, second(s, step) * s.layout.slots + slot));
  }
  static NMS_INLINE void store_rows(const __m512i (&v)[kColumns], const Slots& s, int64_t step, const Rows& rows) {
    store_windows(v, s.layout, step, rows);
  }
};

// What kinds of fields there are: the place in a group, whose slots and columns are known, or that in the window.
template <int kN, int kM>
struct InGroup {
  template <class Source>
  static NMS_INLINE void fill(const Slots& s, int64_t step, __m512i (&columns)[kColumns]) {
    slots<Source>(std::make_integer_sequence<int, kWindowInputs / kM * kN>{}, s, step, columns);
  }

 private:
  template <class Source, int... kSlot>
  static NMS_INLINE void slots(std::integer_sequence<int, kSlot...>, const Slots& s, int64_t step,
                               __m512i (&columns)[kColumns]) {
    (slot<Source, kSlot>(s, step, columns), ...);
  }
  template <class Source, int kSlot>
  static NMS_INLINE void slot(const Slots& s, int64_t step, __m512i (&columns)[kColumns]) {
    const __m512i field = Source::field(s, step, kSlot, 3);
    const __m512i values = Source::values(s, step, kSlot);
    NMS_UNROLL
    for (int place = 0; place < 4; ++place) {  // damaged fields of 1:2 go where PanelLayout::place_of says
      __m512i& column = columns[(kSlot / kN * kM + place) % kWindowInputs];
      column = Source::take(column, field, place, values);
    }
  }
};

struct InWindow {
  template <class Source>
  static NMS_INLINE void fill(const Slots& s, int64_t step, __m512i (&columns)[kColumns]) {
    const int slots = s.layout.slots;
    for (int slot = 0; slot < slots; ++slot) {
      const __m512i field = Source::field(s, step, slot, 15);
      const __m512i values = Source::values(s, step, slot);
      NMS_UNROLL
      for (int place = 0; place < kColumns; ++place)
        columns[place] = Source::take(columns[place], field, place, values);
    }
  }
};

template <class Source, class Fields>
void unpack_panel(const Slots& s, const Rows& rows) {
  for (int64_t step = 0; step < s.layout.steps; step += Source::kSteps) {
    if (step * s.layout.step_inputs() >= rows.k) break;  // steps that only fill up a word
    __m512i columns[kColumns];
    NMS_UNROLL
    for (int i = 0; i < kColumns; ++i) columns[i] = _mm512_setzero_si512();
    Fields::template fill<Source>(s, step, columns);
    transpose(columns);
    Source::store_rows(columns, s, step, rows);
  }
}

using UnpackPanelFn = void (*)(const Slots&, const Rows&);

template <class Source>
UnpackPanelFn unpack_of(const PanelLayout& layout) {
  if (layout.index_bits == 4) return &unpack_panel<Source, InWindow>;
  if (layout.m == 2) return &unpack_panel<Source, InGroup<1, 2>>;
  return layout.n == 2 ? &unpack_panel<Source, InGroup<2, 4>> : &unpack_panel<Source, InGroup<1, 4>>;
}

}  // namespace

void unpack_panels_avx512(const PanelForm& form, void* dense, int64_t first, int64_t last) {
  if (form.element_size != 2 && form.element_size != 4) return unpack_panels(form, dense, first, last);
  const PanelLayout& layout = form.layout;
  const UnpackPanelFn unpack = form.element_size == 4 ? unpack_of<Float32Windows>(layout)
                               : layout.halves == 2   ? unpack_of<BFloat16Windows>(layout)
                                                      : unpack_of<Float16Windows>(layout);
  Rows rows;
  rows.stride = form.k * form.element_size;
  rows.k = form.k;
  rows.stream = form.rows * rows.stride >= kDenseStreamBytes && layout.window == kWindowInputs &&
                rows.stride % 64 == 0 && reinterpret_cast<uintptr_t>(dense) % 64 == 0;
  for (int64_t panel = first; panel < last; ++panel) {
    const int64_t row = panel * kPanelRows;
    rows.first = static_cast<uint8_t*>(dense) + row * rows.stride;
    rows.count = static_cast<int>(std::min<int64_t>(kPanelRows, form.rows - row));
    unpack(Slots(form, panel), rows);
  }
  if (rows.stream) _mm_sfence();
}

}  // namespace nms

NMS_TARGET_REGION_END

#endif
