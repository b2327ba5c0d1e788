// The dense weight from panels, on any processor. linear_unpack_avx512.cpp has what AVX-512 does faster.
#include <algorithm>
#include <cstring>

#include "linear_pack.h"

namespace nms {
namespace {

// Steps that are done for one row before the next row has its turn: rows are whole cache lines, and a panel's stretch
// stays in the first cache.
constexpr int kStretch = 16;

// Where the fields of a stretch of steps are, alike for all lanes. Worked out once a stretch: there are divisions in
// it.
struct FieldPlaces {
  int32_t word[kStretch][kWindowInputs];  // from the stretch's first word
  uint8_t shift[kStretch][kWindowInputs];

  FieldPlaces(const PanelLayout& layout, int64_t first_step, int64_t last_step) {
    const int64_t first_word = layout.word_of(first_step * layout.slots);
    for (int64_t step = first_step; step < last_step; ++step) {
      for (int slot = 0; slot < layout.slots; ++slot) {
        const int64_t position = step * layout.slots + slot;
        word[step - first_step][slot] = static_cast<int32_t>((layout.word_of(position) - first_word) * kPanelRows);
        shift[step - first_step][slot] = static_cast<uint8_t>(layout.shift_of(position, 0));
      }
    }
  }
};

// kSlots: slots of a window, or 0 for any number.
template <class Element, int kHalves, int kSlots>
void unpack_panel(const PanelForm& form, Element* dense, int64_t panel) {
  const PanelLayout& layout = form.layout;
  const int slots = kSlots > 0 ? kSlots : layout.slots;
  constexpr int kSlotStride = kPanelRows * kHalves;
  const int64_t first_row = panel * kPanelRows;
  const int lanes = static_cast<int>(std::min<int64_t>(kPanelRows, form.rows - first_row));
  const Element* panel_values = static_cast<const Element*>(form.values) + panel * layout.panel_values();
  const uint32_t* panel_words = form.indices + panel * layout.panel_words();
  const uint32_t mask = (1u << layout.index_bits) - 1;
  uint32_t starts[kWindowInputs];  // what a slot's field counts from
  for (int slot = 0; slot < slots; ++slot) starts[slot] = static_cast<uint32_t>(layout.place_of(0, slot));

  // Windows that are written in full begin here at the latest. One of fewer than 16 inputs is written 16 wide, too:
  // the next one comes over it.
  const int64_t last_whole = form.k - kWindowInputs;
  for (int64_t first = 0; first < layout.steps; first += kStretch) {
    const int64_t last = std::min(first + kStretch, layout.steps);
    const FieldPlaces fields(layout, first, last);
    const uint32_t* stretch_words = panel_words + layout.word_of(first * slots) * kPanelRows;
    for (int lane = 0; lane < lanes; ++lane) {
      Element* row = dense + (first_row + lane) * form.k;
      const uint32_t* words = stretch_words + lane;
      for (int64_t step = first; step < last; ++step) {
        const int32_t* word = fields.word[step - first];
        const uint8_t* shift = fields.shift[step - first];
        for (int half = 0; half < kHalves; ++half) {
          const int64_t start = (step * kHalves + half) * layout.window;
          if (start >= form.k) break;
          const Element* values = panel_values + step * slots * kSlotStride + lane * kHalves + half;
          const int half_shift = half * (32 / kHalves);
          const auto fill = [&](Element* window) {
            std::memset(window, 0, kWindowInputs * sizeof(Element));
            for (int slot = 0; slot < slots; ++slot) {
              const uint32_t field = words[word[slot]] >> (shift[slot] + half_shift) & mask;
              window[(field + starts[slot]) % kWindowInputs] = values[slot * kSlotStride];
            }
          };
          if (start <= last_whole) {
            fill(row + start);
          } else {
            Element window[kWindowInputs];
            fill(window);
            const int64_t count = std::min<int64_t>(layout.window, form.k - start);
            std::memcpy(row + start, window, static_cast<size_t>(count) * sizeof(Element));
          }
        }
      }
    }
  }
}

template <class Element, int kHalves>
void unpack_all(const PanelForm& form, void* dense, int64_t first, int64_t last) {
  auto* unpack = unpack_panel<Element, kHalves, 0>;
  switch (form.layout.slots) {
    case 1:
      unpack = unpack_panel<Element, kHalves, 1>;
      break;
    case 2:
      unpack = unpack_panel<Element, kHalves, 2>;
      break;
    case 4:
      unpack = unpack_panel<Element, kHalves, 4>;
      break;
    case 8:
      unpack = unpack_panel<Element, kHalves, 8>;
      break;
    default:
      break;
  }
  for (int64_t panel = first; panel < last; ++panel) unpack(form, static_cast<Element*>(dense), panel);
}

}  // namespace

void unpack_panels(const PanelForm& form, void* dense, int64_t first, int64_t last) {
  switch (form.element_size) {
    case 1:
      return unpack_all<uint8_t, 4>(form, dense, first, last);
    case 2:
      return form.layout.halves == 2 ? unpack_all<uint16_t, 2>(form, dense, first, last)
                                     : unpack_all<uint16_t, 1>(form, dense, first, last);
    case 4:
      return unpack_all<uint32_t, 1>(form, dense, first, last);
    default:
      return unpack_all<uint64_t, 1>(form, dense, first, last);
  }
}

}  // namespace nms
