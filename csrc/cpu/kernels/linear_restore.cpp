// Making the packed form from panels again. Not on any hot path: for saving, copying and views, once each.
#include <algorithm>

#include "../../core/bits.h"
#include "../../core/packed.h"
#include "linear_pack.h"

namespace nms {
namespace {

template <class Element>
void restore_row(const PanelForm& form, int64_t row, Element* values /* [groups * n] */, uint8_t* indices) {
  const PanelLayout& layout = form.layout;
  const int64_t panel = row / kPanelRows, lane = row % kPanelRows;
  const Element* panel_values = static_cast<const Element*>(form.values) + panel * layout.panel_values();
  const uint32_t* words = form.indices + panel * layout.panel_words() + lane;
  const PackedFormat format = packed_format(layout.n, layout.m);
  const int64_t groups = (form.k + layout.m - 1) / layout.m, window_groups = layout.window / layout.m;
  const uint32_t field_mask = (1u << layout.index_bits) - 1;
  BitWriter codes(indices);
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t window = group / window_groups, step = window / layout.halves;
    const int half = static_cast<int>(window % layout.halves);
    const int first = static_cast<int>(group % window_groups) * layout.n;
    uint64_t kept = 0;
    for (int slot = first; slot < first + layout.n; ++slot) {
      const int64_t position = step * layout.slots + slot;
      const uint32_t word = words[layout.word_of(position) * kPanelRows];
      const int place = layout.place_of(word >> layout.shift_of(position, half) & field_mask, slot);
      kept |= uint64_t{1} << ((place - layout.group_start(slot)) & (kWindowInputs - 1));
      *values++ = panel_values[position * layout.slot_values() + lane * layout.halves + half];
    }
    codes.put(encode_group(kept, format) & low_bits(format.group_bits), format.group_bits);
  }
  codes.finish();
}

template <class Element>
void restore_rows(const PanelForm& form, void* values, uint8_t* indices, int64_t first, int64_t last) {
  const int64_t groups = (form.k + form.layout.m - 1) / form.layout.m;
  const int64_t row_bytes = index_row_bytes(packed_format(form.layout.n, form.layout.m), groups);
  for (int64_t row = first; row < last; ++row)
    restore_row(form, row, static_cast<Element*>(values) + row * groups * form.layout.n, indices + row * row_bytes);
}

}  // namespace

void restore_panels(const PanelForm& form, void* values, uint8_t* indices, int64_t first, int64_t last) {
  const int64_t first_row = first * kPanelRows, last_row = std::min(last * kPanelRows, form.rows);
  switch (form.element_size) {
    case 1:
      return restore_rows<uint8_t>(form, values, indices, first_row, last_row);
    case 2:
      return restore_rows<uint16_t>(form, values, indices, first_row, last_row);
    case 4:
      return restore_rows<uint32_t>(form, values, indices, first_row, last_row);
    default:
      return restore_rows<uint64_t>(form, values, indices, first_row, last_row);
  }
}

}  // namespace nms
