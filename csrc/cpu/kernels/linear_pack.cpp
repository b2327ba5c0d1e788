// Making panels from the packed form, and the dense weight from panels.
#include "linear_pack.h"

#include <algorithm>
#include <cstring>

#include "../../core/bits.h"
#include "../../core/packed.h"

namespace nms {
namespace {

// The fields of a whole window, in slot order, from the window's codes in the packed form: at most 16 bits, because no
// group's code is wider than its m.
class WindowCodes {
 public:
  explicit WindowCodes(const PanelLayout& layout)
      : format_(packed_format(layout.n, layout.m)),
        slots_(layout.slots),
        field_bits_(layout.index_bits),
        groups_(layout.window / layout.m) {
    for (int slot = 0; slot < slots_; ++slot)
      starts_ |= uint64_t{layout.field_of(layout.group_start(slot), slot)} << (slot * field_bits_);
  }

  int groups() const { return groups_; }
  int code_bits() const { return format_.group_bits; }

  // What a window without weights gets: every slot points at the start of its group.
  uint64_t no_fields() const { return starts_; }

  uint64_t fields(uint64_t codes) const {
    // Index codes already are such fields, counted from the start of the group.
    if (format_.index_bits != 0) return codes + starts_;
    uint64_t fields = 0;
    int slot = 0;
    for (; codes != 0 && slot < slots_; codes &= codes - 1, ++slot)
      fields |= static_cast<uint64_t>(lowest_bit(codes)) << (slot * field_bits_);
    return fields | (slot < slots_ ? starts_ >> (slot * field_bits_) << (slot * field_bits_) : 0);
  }

 private:
  PackedFormat format_;
  int slots_, field_bits_, groups_;
  uint64_t starts_ = 0;
};

// Writes a window's fields into one lane's words, from slot `slot` of the panel on.
void put_fields(const PanelLayout& layout, uint64_t fields, int64_t slot, int half, uint32_t* words /* of the lane */) {
  const uint64_t mask = low_bits(layout.index_bits);
  if (layout.fields % layout.slots == 0) {  // the window's fields are in one word
    words[layout.word_of(slot) * kPanelRows] |= static_cast<uint32_t>(fields) << layout.shift_of(slot, half);
    return;
  }
  for (int i = 0; i < layout.slots; ++i, fields >>= layout.index_bits)
    words[layout.word_of(slot + i) * kPanelRows] |= static_cast<uint32_t>(fields & mask)
                                                    << layout.shift_of(slot + i, half);
}

template <class Element>
void pack_panel(const PanelForm& form, const Element* values, const uint8_t* indices, int64_t panel) {
  const PanelLayout& layout = form.layout;
  const WindowCodes codes(layout);
  const int64_t groups = (form.k + layout.m - 1) / layout.m;
  const int64_t row_values = groups * layout.n;
  const int64_t row_bytes = index_row_bytes(packed_format(layout.n, layout.m), groups);
  const int64_t first_row = panel * kPanelRows;
  const int lanes = static_cast<int>(std::min<int64_t>(kPanelRows, form.rows - first_row));
  Element* panel_values = static_cast<Element*>(form.values) + panel * layout.panel_values();
  uint32_t* panel_words = form.indices + panel * layout.panel_words();
  std::fill_n(panel_words, layout.panel_words(), 0u);

  const int64_t lane_stride = layout.halves, slot_stride = layout.slot_values();
  for (int64_t step = 0; step < layout.steps; ++step) {
    Element* step_values = panel_values + step * layout.slots * slot_stride;
    for (int half = 0; half < layout.halves; ++half) {
      const int64_t first_group = (step * layout.halves + half) * codes.groups();
      const int here = static_cast<int>(std::clamp<int64_t>(groups - first_group, 0, codes.groups()));
      const int kept = here * layout.n;
      for (int lane = 0; lane < kPanelRows; ++lane) {
        Element* out = step_values + lane * lane_stride + half;
        if (lane >= lanes || kept == 0) {
          for (int slot = 0; slot < layout.slots; ++slot) out[slot * slot_stride] = 0;
          if (lane < lanes) put_fields(layout, codes.no_fields(), step * layout.slots, half, panel_words + lane);
          continue;
        }
        const int64_t row = first_row + lane;
        const Element* in = values + row * row_values + first_group * layout.n;
        for (int slot = 0; slot < kept; ++slot) out[slot * slot_stride] = in[slot];
        for (int slot = kept; slot < layout.slots; ++slot) out[slot * slot_stride] = 0;
        const uint64_t code =
            read_bits(indices + row * row_bytes, first_group * codes.code_bits(), here * codes.code_bits());
        put_fields(layout, codes.fields(code), step * layout.slots, half, panel_words + lane);
      }
    }
  }
}

template <class Element>
void unpack_panel(const PanelForm& form, Element* dense, int64_t panel) {
  const PanelLayout& layout = form.layout;
  const int64_t first_row = panel * kPanelRows;
  const int lanes = static_cast<int>(std::min<int64_t>(kPanelRows, form.rows - first_row));
  const Element* values = static_cast<const Element*>(form.values) + panel * layout.panel_values();
  const uint32_t* words = form.indices + panel * layout.panel_words();
  const uint32_t mask = (1u << layout.index_bits) - 1;
  std::fill_n(dense + first_row * form.k, lanes * form.k, Element{0});
  for (int64_t step = 0; step < layout.steps; ++step) {
    for (int slot = 0; slot < layout.slots; ++slot) {
      const int64_t position = step * layout.slots + slot;
      const uint32_t* word = words + layout.word_of(position) * kPanelRows;
      for (int half = 0; half < layout.halves; ++half) {
        const int64_t start = (step * layout.halves + half) * layout.window;
        const int shift = layout.shift_of(position, half);
        for (int lane = 0; lane < lanes; ++lane) {
          const int place = layout.place_of(word[lane] >> shift & mask, slot);
          const int64_t i = start + place;
          if (place < layout.window && i < form.k)
            dense[(first_row + lane) * form.k + i] = values[lane * layout.halves + half];
        }
      }
      values += layout.slot_values();
    }
  }
}

template <class Fn>
void switch_element(int size, Fn fn) {
  switch (size) {
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
    for (int64_t panel = first; panel < last; ++panel)
      pack_panel(form, static_cast<const Element*>(values), indices, panel);
  });
}

void unpack_panels(const PanelForm& form, void* dense, int64_t first, int64_t last) {
  switch_element(form.element_size, [&](auto element) {
    using Element = decltype(element);
    for (int64_t panel = first; panel < last; ++panel) unpack_panel(form, static_cast<Element*>(dense), panel);
  });
}

}  // namespace nms
