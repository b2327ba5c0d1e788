// The panel form: a packed weight [rows, k] laid out so that sixteen outputs are summed at once, one per vector lane.
//
// Layout  A panel is 16 rows, one per lane. Along k the weight is cut into windows of as many whole groups as fit into
//         16 inputs (16 of them wherever m divides 16). A window holds, per lane, `slots` kept weights; slot s of every
//         lane stands side by side in one vector, so one multiply-add does slot s of 16 rows. Which of the window's
//         inputs a lane wants is a field of 2 or 4 bits: a vector permutation of the window looks all 16 up at once.
//         A step is what one index vector speaks of: one window, or as many as a lane takes products at once: two of
//         bfloat16, four of int8.
//
//           values   [panels, steps, slots, 16]      bfloat16: [panels, steps, slots, 16, 2], the last is the window
//                                                    int8:     [panels, steps, slots, 16, 4]
//           indices  uint32 [panels, words, 16]      a lane's fields in slot order, low bits first
//
//         Fields of 2 bits (1:2, 2:4, 1:4) count within the group, whose place in the window follows from the slot;
//         fields of 4 bits count within the window. A word is cut into as many equal parts as a step has windows, low
//         bits first. Slot s of an int8 step, with 4-bit fields, one lane:
//
//           inputs of the step      |    window 0    |    window 1    |    window 2    |    window 3    |   64 bytes
//                                          ^ place           ^ place        ^ place         ^ place
//           values of the lane             w0                w1             w2              w3              4 bytes
//           word of the lane        [field s % 2 of two] in byte 0, 1, 2 and 3                             32 bits
//
//         What is missing (rows of the last panel, groups behind k, steps that fill up the last word) has value 0 and
//         field 0.
//
// The form is the same for every instruction set, and inputs are packed to match it: [steps, batch, 16 per window].
#pragma once

#include <cstdint>

#include "dtype.h"
#include "hd.h"

namespace nms {

constexpr int kPanelRows = 16;
constexpr int kWindowInputs = 16;  // room of a window; `window` of them are used
constexpr int kMaxPanelM = 16;     // larger groups do not fit into a window

struct PanelLayout {
  int n, m;
  int halves;      // windows in a step: halves of a word, or quarters for int8
  int window;      // inputs that a window covers: whole groups
  int slots;       // kept weights of one row in a window
  int index_bits;  // 2: place in the group, 4: place in the window
  int fields;      // fields per word and half
  int unroll;      // `steps` is a multiple of it, so that steps end with a word wherever slots divides fields
  int64_t steps;   // per panel
  int64_t words;   // per panel and lane

  NMS_HD int step_inputs() const { return halves * window; }
  NMS_HD int64_t slot_values() const { return int64_t{kPanelRows} * halves; }    // values of one slot of a step
  NMS_HD int64_t panel_values() const { return steps * slots * slot_values(); }  // values of a panel
  NMS_HD int64_t panel_words() const { return words * kPanelRows; }              // index words of a panel

  // First input, counted within its window, of the group that slot `slot` belongs to.
  NMS_HD int group_start(int slot) const { return slot / n * m; }

  // Bit of its word at which the field of a slot starts; slots are counted through the panel.
  NMS_HD int64_t word_of(int64_t slot) const { return slot / fields; }
  NMS_HD int shift_of(int64_t slot, int half) const {
    return half * (32 / halves) + static_cast<int>(slot % fields) * index_bits;
  }

  // From a lane's place in its window to the field that is stored, and back.
  NMS_HD uint32_t field_of(int place, int slot) const {
    return static_cast<uint32_t>(index_bits == 2 ? place - group_start(slot) : place);
  }
  // In damaged indices a field of 2 bits can name a place behind its window.
  NMS_HD int place_of(uint32_t field, int slot) const {
    return static_cast<int>(index_bits == 2 ? (field + group_start(slot)) % kWindowInputs : field);
  }
};

NMS_HD int64_t panel_count(int64_t rows) { return (rows + kPanelRows - 1) / kPanelRows; }

NMS_HD int windows_of_step(DType dtype) { return dtype == DType::kInt8 ? 4 : dtype == DType::kBFloat16 ? 2 : 1; }

// 1 <= n <= m <= kMaxPanelM.
NMS_HD PanelLayout panel_layout(int n, int m, int64_t k, DType dtype /* of the values */) {
  PanelLayout layout;
  layout.n = n;
  layout.m = m;
  layout.halves = windows_of_step(dtype);
  layout.window = kWindowInputs / m * m;
  layout.slots = layout.window / m * n;
  layout.index_bits = m <= 4 && m != 3 && 2 * n <= m ? 2 : 4;
  layout.fields = 32 / layout.halves / layout.index_bits;
  layout.unroll = layout.fields % layout.slots == 0 ? layout.fields / layout.slots : 1;
  const int64_t steps = (k + layout.step_inputs() - 1) / layout.step_inputs();
  layout.steps = (steps + layout.unroll - 1) / layout.unroll * layout.unroll;
  layout.words = (layout.steps * layout.slots + layout.fields - 1) / layout.fields;
  return layout;
}

}  // namespace nms
