// From a window's codes in the packed form (core/packed.h) to its fields in the panel form (core/panel_layout.h).
//
// Note    Included inside a target region (or none), within a namespace of its own.
#pragma once

// Positions of the set bits of every byte, as fields of 4 bits.
struct BitPositions {
  uint32_t of[256] = {};
  constexpr BitPositions() {
    for (int byte = 0; byte < 256; ++byte)
      for (int bit = 0, count = 0; bit < 8; ++bit)
        if (byte >> bit & 1) of[byte] |= static_cast<uint32_t>(bit) << 4 * count++;
  }
};
constexpr BitPositions kBitPositions;
constexpr uint64_t kEveryFieldPlus8 = 0x8888888888888888u;

// The fields of a whole window, in slot order, from the window's codes in the packed form: at most 16 bits, because no
// group's code is wider than its m.
class WindowCodes {
 public:
  explicit WindowCodes(const PanelLayout& layout)
      : format_(packed_format(layout.n, layout.m)),
        groups_(layout.window / layout.m),
        field_bits_(layout.index_bits),
        all_fields_(low_bits(layout.slots * layout.index_bits)) {
    for (int slot = 0; slot < layout.slots; ++slot)
      starts_ |= uint64_t{layout.field_of(layout.group_start(slot), slot)} << (slot * layout.index_bits);
  }

  int groups() const { return groups_; }
  bool are_bitmasks() const { return format_.index_bits == 0; }

  // What a window without weights gets: every slot points at the start of its group.
  uint64_t no_fields() const { return starts_; }

  // Of `groups` groups from group `first` of a row on; `end` is the end of all rows' codes.
  uint64_t fields(const uint8_t* row_codes, int64_t first, int groups, const uint8_t* end) const {
    const uint64_t codes = read(row_codes, first, groups, end);
    // Index codes already are fields, counted from the start of the group, but for 1:3 they are narrower.
    if (format_.index_bits == field_bits_) return codes + starts_;
    if (format_.index_bits != 0) {
      uint64_t wider = starts_;
      for (int slot = 0; slot < groups * format_.n; ++slot)
        wider += (codes >> slot * format_.index_bits & low_bits(format_.index_bits)) << slot * field_bits_;
      return wider;
    }
    const int low = static_cast<int>(codes & 0xff), high = static_cast<int>(codes >> 8);
    const int low_count = 4 * popcount64(low), count = low_count + 4 * popcount64(high);
    uint64_t fields = kBitPositions.of[low];
    if (high != 0) fields |= (kBitPositions.of[high] + kEveryFieldPlus8) << low_count & low_bits(count);
    return (fields | (starts_ & ~low_bits(count))) & all_fields_;
  }

  // The codes themselves.
  uint64_t read(const uint8_t* row_codes, int64_t first, int groups, const uint8_t* end) const {
    const int64_t offset = first * format_.group_bits;
    const int width = groups * format_.group_bits;
    const uint8_t* byte = row_codes + (offset >> 3);
    uint32_t word;
    if (end - byte < static_cast<int64_t>(sizeof(word))) return read_bits(row_codes, offset, width);
    std::memcpy(&word, byte, sizeof(word));  // the width is at most 16, 23 with what comes before
    return word >> (offset & 7) & low_bits(width);
  }

 private:
  PackedFormat format_;
  int groups_, field_bits_;
  uint64_t all_fields_;
  uint64_t starts_ = 0;
};
