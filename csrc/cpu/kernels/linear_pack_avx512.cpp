// Making panels from the packed form with AVX-512 and BMI2.
//
// What    Per panel, the values of sixteen rows become columns of sixteen lanes: a transposition, sixteen by sixteen
//         numbers of 32 bits at a time. So do the index words, once each row's are made.
// Layout  A column is what 32 bits hold of one lane: a float32 slot, a bfloat16 slot of both windows of a step, or two
//         slots of float16. Index codes of most patterns are fields already: sixteen words of a row are copied whole.
//         The positions in bitmasks are cut out of 0xFEDC...10, a window at a time.
// Launch  As pack_panels (linear_pack.h); elements of 1 and 8 bytes are left to it.
#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../../core/bits.h"
#include "../../core/packed.h"
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

#include "window_codes.h"

constexpr int64_t kPanelStreamBytes = int64_t{16} << 20;  // forms of at least this size are written past the cache

template <bool kStream>
NMS_INLINE void store(void* out, __m512i v) {
  if (kStream)
    _mm512_stream_si512(static_cast<__m512i*>(out), v);
  else
    _mm512_storeu_si512(out, v);
}

// `columns` of v to out [columns, 64 bytes].
template <bool kStream>
NMS_INLINE void store_columns(const __m512i (&v)[kColumns], int64_t columns, uint8_t* out) {
  NMS_UNROLL
  for (int i = 0; i < kColumns; ++i)
    if (i < columns) store<kStream>(out + i * 64, v[i]);
}

// 64 bytes, of which only `bytes` are read; the others are 0.
NMS_INLINE __m512i load_bytes(const uint8_t* p, int64_t bytes) {
  if (bytes >= 64) return _mm512_loadu_si512(p);
  return _mm512_maskz_loadu_epi8(bytes <= 0 ? 0 : low_bits(static_cast<int>(bytes)), p);
}

// A panel's rows in the packed form.
struct PanelRows {
  const uint8_t* first;  // row of the panel
  int64_t stride;        // bytes between rows, all of which belong to the row
  int lanes;             // rows that there are

  const uint8_t* of(int lane) const { return first + lane * stride; }
  __m512i load(int lane, int64_t offset, int64_t most) const {
    if (lane >= lanes) return _mm512_setzero_si512();
    return load_bytes(of(lane) + offset, std::min(stride - offset, most));
  }
};

// ---- Values ----

// Where a block's 16-bit elements come from: the two windows of a step go side by side, slot by slot.
struct WindowPairs {
  __m512i order;
  explicit WindowPairs(int slots) {
    uint16_t from[32] = {};
    for (int i = 0; i < 32; ++i) {
      const int step = i / (2 * slots), slot = i / 2 % slots, half = i % 2;
      from[i] = static_cast<uint16_t>(std::min(31, (step * 2 + half) * slots + slot));
    }
    order = _mm512_loadu_si512(from);
  }
};

// float32 and bfloat16 (kHalves = 2).
template <int kHalves, bool kStream>
void pack_values(const PanelLayout& layout, const PanelRows& rows, uint8_t* out) {
  const int slots = layout.slots;
  const int64_t columns = kHalves == 1 ? kColumns : kColumns / slots * slots;  // of a block: whole steps
  const int64_t all = layout.steps * slots;
  const WindowPairs pairs(slots);
  for (int64_t column = 0; column < all; column += columns) {
    __m512i v[kColumns];
    NMS_UNROLL
    for (int lane = 0; lane < kPanelRows; ++lane) {
      v[lane] = rows.load(lane, column * 4, columns * 4);
      if (kHalves == 2) v[lane] = _mm512_permutexvar_epi16(pairs.order, v[lane]);
    }
    transpose(v);
    store_columns<kStream>(v, std::min(columns, all - column), out + column * 64);
  }
}

// float16: two slots a column, which then part.
template <bool kStream>
void pack_half_values(const PanelLayout& layout, const PanelRows& rows, uint8_t* out) {
  uint16_t from[32];
  for (int i = 0; i < 32; ++i) from[i] = static_cast<uint16_t>(i % 16 * 2 + i / 16);
  const __m512i order = _mm512_loadu_si512(from);
  const int64_t all = layout.steps * layout.slots;  // slots
  for (int64_t slot = 0; slot < all; slot += 2 * kColumns) {
    __m512i v[kColumns];
    NMS_UNROLL
    for (int lane = 0; lane < kPanelRows; ++lane) v[lane] = rows.load(lane, slot * 2, 64);
    transpose(v);
    NMS_UNROLL
    for (int i = 0; i < kColumns; ++i) v[i] = _mm512_permutexvar_epi16(order, v[i]);
    const int64_t left = all - slot;
    store_columns<kStream>(v, left / 2, out + slot * 32);
    if (left < 2 * kColumns && left % 2 == 1) {
      NMS_UNROLL
      for (int i = 0; i < kColumns; ++i)
        if (i == left / 2) std::memcpy(out + (slot + 2 * i) * 32, &v[i], 32);
    }
  }
}

// ---- Indices ----

// How a row's codes become its words, where 32 bits of the one are 32 bits of the other.
enum class Codes { kAsTheyAre, kBytes, kNibbles, kOneByOne };

Codes codes_of(const PanelLayout& layout) {
  if (packed_format(layout.n, layout.m).index_bits != layout.index_bits) return Codes::kOneByOne;
  const bool alike = layout.fields % layout.slots == 0;  // fields of every word start at the same groups
  if (layout.halves == 1) return alike || layout.window == layout.m ? Codes::kAsTheyAre : Codes::kOneByOne;
  switch (layout.slots * layout.index_bits) {
    case 16:
      return Codes::kAsTheyAre;
    case 8:
      return Codes::kBytes;
    case 4:
      return Codes::kNibbles;
    default:
      return Codes::kOneByOne;
  }
}

// Every other nibble of 32 bits as 16 bits.
NMS_INLINE __m512i every_other_nibble(__m512i v) {
  v = _mm512_and_si512(v, _mm512_set1_epi32(0x0f0f0f0f));
  v = _mm512_and_si512(_mm512_or_si512(v, _mm512_srli_epi32(v, 4)), _mm512_set1_epi32(0x00ff00ff));
  return _mm512_and_si512(_mm512_or_si512(v, _mm512_srli_epi32(v, 8)), _mm512_set1_epi32(0x0000ffff));
}

// Windows one after the other become windows in two halves of a word.
template <Codes kCodes>
NMS_INLINE __m512i in_halves(__m512i v) {
  if (kCodes == Codes::kBytes)
    return _mm512_shuffle_epi8(v, _mm512_set4_epi32(0x0f0d0e0c, 0x0b090a08, 0x07050604, 0x03010200));
  if (kCodes == Codes::kNibbles)
    return _mm512_or_si512(every_other_nibble(v), _mm512_slli_epi32(every_other_nibble(_mm512_srli_epi32(v, 4)), 16));
  return v;
}

template <Codes kCodes>
void copy_codes(const PanelLayout& layout, const PanelRows& rows, uint8_t* out) {
  uint32_t starts = 0;  // of the groups that a word's fields belong to
  for (int field = 0; field < layout.fields; ++field)
    for (int half = 0; half < layout.halves; ++half) {
      const int slot = field % layout.slots;
      starts |= layout.field_of(layout.group_start(slot), slot) << layout.shift_of(field, half);
    }
  for (int64_t word = 0; word < layout.words; word += kColumns) {
    __m512i v[kColumns];
    NMS_UNROLL
    for (int lane = 0; lane < kPanelRows; ++lane) {
      v[lane] = in_halves<kCodes>(rows.load(lane, word * 4, 64));
      if (lane < rows.lanes) v[lane] = _mm512_add_epi32(v[lane], _mm512_set1_epi32(static_cast<int>(starts)));
    }
    transpose(v);
    store_columns<false>(v, layout.words - word, out + word * 64);
  }
}

// Steps whose words are made row by row before they are transposed: whole words, whatever the pattern.
constexpr int kStretchSteps = 16;
constexpr int kStretchWords = kStretchSteps * kWindowInputs * 4 * 2 / 32;

// One row's words of a stretch, from windows in the order of the row.
template <int kHalves>
class RowWords {
 public:
  RowWords(int window_bits, uint32_t* words) : bits_(window_bits), bytes_(reinterpret_cast<uint8_t*>(words)) {}

  // Windows that end with a piece of a word, which is as long as a half has room in it.
  bool whole_pieces() const { return bits_ % (kHalves == 1 ? 8 : 16) == 0; }
  NMS_INLINE void put_whole(int step, int half, uint64_t fields) {
    if (kHalves == 1) {
      std::memcpy(bytes_ + step * bits_ / 8, &fields, sizeof(fields));  // what is behind it is written later
    } else {
      uint8_t* piece = bytes_ + step * bits_ / 4 + half * 2;
      for (int shift = 0; shift < bits_; shift += 16, piece += 4) {
        const uint16_t part = static_cast<uint16_t>(fields >> shift);
        std::memcpy(piece, &part, sizeof(part));
      }
    }
  }

  // Behind the last of them.
  NMS_INLINE void end_whole(int steps) {
    if (kHalves == 1) std::memset(bytes_ + steps * bits_ / 8, 0, sizeof(uint32_t));
  }

  // Any windows, into words that were 0.
  NMS_INLINE void put(int step, int half, uint64_t fields) {
    constexpr int kRoom = 32 / kHalves;
    int bit = step * bits_;
    for (int done = 0; done < bits_;) {
      const int shift = bit % kRoom, count = std::min(kRoom - shift, bits_ - done);
      uint32_t word;
      std::memcpy(&word, bytes_ + bit / kRoom * 4, sizeof(word));
      word |= static_cast<uint32_t>(fields >> done & low_bits(count)) << (half * kRoom + shift);
      std::memcpy(bytes_ + bit / kRoom * 4, &word, sizeof(word));
      done += count;
      bit += count;
    }
  }

 private:
  int bits_;
  uint8_t* bytes_;
};

// The places of a bitmask's bits, low ones first.
NMS_INLINE uint64_t set_places(uint64_t bitmask) {
  const uint64_t nibbles = _pdep_u64(bitmask, 0x1111111111111111u) * 15;
  return _pext_u64(0xFEDCBA9876543210u, nibbles);
}

// The same for a window that may lack groups: `none` fills the fields above.
NMS_INLINE uint64_t set_places(uint64_t bitmask, uint64_t none) {
  const int count = 4 * static_cast<int>(_mm_popcnt_u64(bitmask));
  return set_places(bitmask) | (none & ~_bzhi_u64(~uint64_t{0}, static_cast<unsigned>(count)));
}

template <int kHalves, bool kBitmask, bool kWhole>
NMS_INLINE void row_words(const PanelLayout& layout, const WindowCodes& codes, const uint8_t* row_codes,
                          const uint8_t* end, int64_t groups, int64_t first_step, int steps, uint32_t* words) {
  RowWords<kHalves> row(layout.slots * layout.index_bits, words);
  const uint64_t all_fields = low_bits(layout.slots * layout.index_bits);
  int step = 0;
  if (kBitmask && kWhole && layout.window == kWindowInputs) {  // whole windows, and their bitmasks are whole bytes
    const int64_t whole = groups / codes.groups() / kHalves - first_step;
    const uint8_t* bitmask = row_codes + first_step * kHalves * 2;
    for (; step < std::min<int64_t>(whole, steps); ++step) {
      for (int half = 0; half < kHalves; ++half, bitmask += 2) {
        uint16_t bits;
        std::memcpy(&bits, bitmask, sizeof(bits));
        // Groups that only fill up a window have no bits.
        const bool full = _mm_popcnt_u32(bits) == layout.slots;
        row.put_whole(step, half, full ? set_places(bits) : set_places(bits, codes.no_fields()) & all_fields);
      }
    }
  }
  for (; step < steps; ++step) {
    for (int half = 0; half < kHalves; ++half) {
      const int64_t group = ((first_step + step) * kHalves + half) * codes.groups();
      const int here = static_cast<int>(std::clamp<int64_t>(groups - group, 0, codes.groups()));
      uint64_t fields = codes.no_fields();
      if (kBitmask && here > 0)
        fields = set_places(codes.read(row_codes, group, here, end), codes.no_fields()) & all_fields;
      else if (here > 0)
        fields = codes.fields(row_codes, group, here, end);
      if (kWhole)
        row.put_whole(step, half, fields);
      else
        row.put(step, half, fields);
    }
  }
  if (kWhole) row.end_whole(steps);
}

template <int kHalves, bool kBitmask, bool kWhole>
void make_words(const PanelLayout& layout, const PanelRows& rows, const uint8_t* end, int64_t groups, uint8_t* out) {
  constexpr int kRowWords = kStretchWords + kColumns;  // sixteen are read at once, and some written behind the last
  alignas(64) uint32_t words[kPanelRows][kRowWords];
  const WindowCodes codes(layout);
  const int64_t stretch_words = int64_t{kStretchSteps} * layout.slots / layout.fields;
  for (int64_t step = 0; step < layout.steps; step += kStretchSteps) {
    const int steps = static_cast<int>(std::min<int64_t>(kStretchSteps, layout.steps - step));
    if (!kWhole || rows.lanes < kPanelRows) std::memset(words, 0, sizeof(words));
    for (int lane = 0; lane < rows.lanes; ++lane)
      row_words<kHalves, kBitmask, kWhole>(layout, codes, rows.of(lane), end, groups, step, steps, words[lane]);
    const int64_t first = step / kStretchSteps * stretch_words;
    const int64_t here = std::min(stretch_words, layout.words - first);
    for (int64_t word = 0; word < here; word += kColumns) {
      __m512i v[kColumns];
      NMS_UNROLL
      for (int lane = 0; lane < kPanelRows; ++lane) v[lane] = _mm512_loadu_si512(words[lane] + word);
      transpose(v);
      store_columns<false>(v, here - word, out + (first + word) * 64);
    }
  }
}

template <int kHalves>
void make_words_of(const PanelLayout& layout, const PanelRows& rows, const uint8_t* end, int64_t groups, uint8_t* out) {
  const bool bitmask = WindowCodes(layout).are_bitmasks();
  const bool whole = RowWords<kHalves>(layout.slots * layout.index_bits, nullptr).whole_pieces();
  if (bitmask && whole) return make_words<kHalves, true, true>(layout, rows, end, groups, out);
  if (bitmask) return make_words<kHalves, true, false>(layout, rows, end, groups, out);
  return make_words<kHalves, false, false>(layout, rows, end, groups, out);
}

void pack_indices(const PanelLayout& layout, const PanelRows& rows, const uint8_t* end, int64_t groups, uint8_t* out) {
  switch (codes_of(layout)) {
    case Codes::kAsTheyAre:
      return copy_codes<Codes::kAsTheyAre>(layout, rows, out);
    case Codes::kBytes:
      return copy_codes<Codes::kBytes>(layout, rows, out);
    case Codes::kNibbles:
      return copy_codes<Codes::kNibbles>(layout, rows, out);
    case Codes::kOneByOne:
      return layout.halves == 1 ? make_words_of<1>(layout, rows, end, groups, out)
                                : make_words_of<2>(layout, rows, end, groups, out);
  }
}

// ---- Panels ----

template <bool kStream>
void pack_panel_values(const PanelForm& form, const PanelRows& rows, uint8_t* out) {
  if (form.element_size == 4) return pack_values<1, kStream>(form.layout, rows, out);
  if (form.layout.halves == 2) return pack_values<2, kStream>(form.layout, rows, out);
  return pack_half_values<kStream>(form.layout, rows, out);
}

}  // namespace

void pack_panels_avx512(const PanelForm& form, const void* values, const uint8_t* indices, int64_t first,
                        int64_t last) {
  if (form.element_size != 2 && form.element_size != 4) return pack_panels(form, values, indices, first, last);
  const PanelLayout& layout = form.layout;
  const int64_t groups = (form.k + layout.m - 1) / layout.m;
  const int64_t value_bytes = groups * layout.n * form.element_size;
  const int64_t index_bytes = index_row_bytes(packed_format(layout.n, layout.m), groups);
  const int64_t panel_bytes = layout.panel_values() * form.element_size;
  const bool stream = panel_count(form.rows) * panel_bytes >= kPanelStreamBytes &&
                      reinterpret_cast<uintptr_t>(form.values) % 64 == 0 && panel_bytes % 64 == 0;
  for (int64_t panel = first; panel < last; ++panel) {
    const int64_t row = panel * kPanelRows;
    const int lanes = static_cast<int>(std::min<int64_t>(kPanelRows, form.rows - row));
    const PanelRows value_rows{static_cast<const uint8_t*>(values) + row * value_bytes, value_bytes, lanes};
    const PanelRows index_rows{indices + row * index_bytes, index_bytes, lanes};
    uint8_t* out = static_cast<uint8_t*>(form.values) + panel * panel_bytes;
    if (stream)
      pack_panel_values<true>(form, value_rows, out);
    else
      pack_panel_values<false>(form, value_rows, out);
    pack_indices(layout, index_rows, indices + form.rows * index_bytes, groups,
                 reinterpret_cast<uint8_t*>(form.indices + panel * layout.panel_words()));
  }
  if (stream) _mm_sfence();
}

}  // namespace nms

NMS_TARGET_REGION_END

#endif
