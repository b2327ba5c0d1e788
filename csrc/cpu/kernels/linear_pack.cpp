// Making panels from the packed form.
#include "linear_pack.h"

#include <algorithm>
#include <cstring>

#include "../../core/bits.h"
#include "../../core/packed.h"
#include "target_region.h"

namespace nms {
namespace {

#include "window_codes.h"

// Writes a window's fields into one lane's words, from slot `slot` of the panel on.
template <int kHalves>
NMS_INLINE void put_fields(int slots, int index_bits, uint64_t fields, int64_t slot, int half,
                           uint32_t* words /* of the lane */) {
  constexpr int room = 32 / kHalves;  // bits of a word for this half
  const int64_t bit = slot * index_bits;
  uint32_t* word = words + bit / room * kPanelRows;
  const int shift = static_cast<int>(bit % room);
  const int left = slots * index_bits + shift;
  const uint64_t mask = low_bits(room);
  *word |= static_cast<uint32_t>(fields << shift & mask) << half * room;
  for (int done = room; done < left; done += room) {
    word += kPanelRows;
    *word |= static_cast<uint32_t>(fields >> (done - shift) & mask) << half * room;
  }
}

// Steps that are done for one row before the next row has its turn: rows are whole cache lines, and a panel's stretch
// stays in the first cache.
constexpr int64_t kStretch = 16;

// kSlots: slots of a window, or 0 for any number.
template <class Element, int kSlots, int kHalves>
void pack_panel(const PanelForm& form, const Element* values, const uint8_t* indices, int64_t panel) {
  const PanelLayout& layout = form.layout;
  const WindowCodes codes(layout);
  const int slots = kSlots > 0 ? kSlots : layout.slots;
  const int index_bits = kSlots > 8 ? 4 : layout.index_bits;  // fields of 2 bits mean at most half of the inputs
  const int64_t groups = (form.k + layout.m - 1) / layout.m;
  const int64_t row_values = groups * layout.n;
  const int64_t row_bytes = index_row_bytes(packed_format(layout.n, layout.m), groups);
  const int64_t first_row = panel * kPanelRows;
  const int lanes = static_cast<int>(std::min<int64_t>(kPanelRows, form.rows - first_row));
  Element* panel_values = static_cast<Element*>(form.values) + panel * layout.panel_values();
  uint32_t* panel_words = form.indices + panel * layout.panel_words();
  std::fill_n(panel_words, layout.panel_words(), 0u);

  const uint8_t* indices_end = indices + form.rows * row_bytes;
  constexpr int64_t kSlotStride = int64_t{kPanelRows} * kHalves;
  for (int64_t first = 0; first < layout.steps; first += kStretch) {
    const int64_t last = std::min(first + kStretch, layout.steps);
    for (int lane = 0; lane < kPanelRows; ++lane) {
      const Element* row = values + (first_row + lane) * row_values;
      const uint8_t* row_codes = indices + (first_row + lane) * row_bytes;
      for (int64_t step = first; step < last; ++step) {
        for (int half = 0; half < kHalves; ++half) {
          const int64_t group = (step * kHalves + half) * codes.groups();
          const int here = static_cast<int>(std::clamp<int64_t>(groups - group, 0, codes.groups()));
          const int kept = lane < lanes ? here * layout.n : 0;
          Element* out = panel_values + step * slots * kSlotStride + lane * kHalves + half;
          if (kept == slots) {
            for (int slot = 0; slot < slots; ++slot) out[slot * kSlotStride] = row[group * layout.n + slot];
          } else {
            for (int slot = 0; slot < kept; ++slot) out[slot * kSlotStride] = row[group * layout.n + slot];
            for (int slot = kept; slot < slots; ++slot) out[slot * kSlotStride] = 0;
          }
          if (lane >= lanes) continue;
          const uint64_t fields = kept == 0 ? codes.no_fields() : codes.fields(row_codes, group, here, indices_end);
          put_fields<kHalves>(slots, index_bits, fields, step * slots, half, panel_words + lane);
        }
      }
    }
  }
}

template <int kHalves, class Element>
void pack_panel_of(const PanelForm& form, const Element* values, const uint8_t* indices, int64_t panel) {
  switch (form.layout.slots) {
    case 1:
      return pack_panel<Element, 1, kHalves>(form, values, indices, panel);
    case 2:
      return pack_panel<Element, 2, kHalves>(form, values, indices, panel);
    case 4:
      return pack_panel<Element, 4, kHalves>(form, values, indices, panel);
    case 6:
      return pack_panel<Element, 6, kHalves>(form, values, indices, panel);
    case 8:
      return pack_panel<Element, 8, kHalves>(form, values, indices, panel);
    case 12:
      return pack_panel<Element, 12, kHalves>(form, values, indices, panel);
    default:
      return pack_panel<Element, 0, kHalves>(form, values, indices, panel);
  }
}

template <class Fn>
void switch_element(int size, Fn fn) {
  switch (size) {
    case 1:
      return fn(uint8_t{});
    case 2:
      return fn(uint16_t{});
    case 4:
      return fn(uint32_t{});
    default:
      return fn(uint64_t{});
  }
}

}  // namespace

void pack_panels(const PanelForm& form, const void* values, const uint8_t* indices, int64_t first, int64_t last) {
  switch_element(form.element_size, [&](auto element) {
    using Element = decltype(element);
    auto* pack = form.layout.halves == 1   ? pack_panel_of<1, Element>
                 : form.layout.halves == 2 ? pack_panel_of<2, Element>
                                           : pack_panel_of<4, Element>;
    for (int64_t panel = first; panel < last; ++panel) pack(form, static_cast<const Element*>(values), indices, panel);
  });
}

}  // namespace nms
