// The inner loop of the packed product, for any vector type.
//
// What    sums[panel][row] += value of the slot * x[row] at the lane's place, for all slots of all steps.
// Layout  core/panel_layout.h; x is packed [steps, rows, inputs of a step]. With kPlaced, the rows of a step lie
//         wherever t.x_steps says, t.x_row apart.
// Launch  Tile<Format, Slots, kRows, kPanels>::run. A Format says how values, indices and x become vectors; Slots says
//         which pattern. Per group of slots, values and indices wait in registers while all rows of x pass by; sums
//         stay in registers for the whole call.
// Note    Included inside a target region, after a header with Formats.
#pragma once

// Fields of 4 bits: the place in the window. kM only matters to vectors shorter than a window (see Format::index);
// m = 16 stands for any m that has no entry of its own.
template <int kSlotCount, int kGroupSize>
struct WindowFields {
  static constexpr int kSlots = kSlotCount;
  static constexpr int kM = kGroupSize;
  static constexpr int kBits = 4;
  static constexpr int group_start(int slot) { return slot / (kSlots * kM / kWindowInputs) * kM; }
};

// Fields of 2 bits: the place in the group.
template <int kN, int kGroupSize>
struct GroupFields {
  static constexpr int kSlots = kWindowInputs / kGroupSize * kN;
  static constexpr int kM = kGroupSize;
  static constexpr int kBits = 2;
  static constexpr int group_start(int slot) { return slot / kN * kM; }
};

template <class Format, class Slots, int kRows, int kPanels, bool kPlaced = false>
struct Tile {
  static constexpr int kSlots = Slots::kSlots;
  static constexpr int kFields = 32 / Format::kHalves / Slots::kBits;
  static constexpr int kSteps = kFields >= kSlots ? kFields / kSlots : 1;  // per turn of the loop
  static constexpr int kWords = kFields >= kSlots ? 1 : kSlots / kFields;
  static_assert(kFields % kSlots == 0 || kSlots % kFields == 0);

  // Slots whose values and indices are held at once: x is read once for all of them.
  static constexpr int kGroup = kSlots < Format::kSlotGroup ? kSlots : Format::kSlotGroup;
  // A sum must wait for its previous addition; few rows need several sums each to keep the multipliers busy. Their
  // number must not depend on kPanels: which panels go together follows from the number of threads, the results may
  // not. And placed steps are for tiles of several sizes, where an output must not depend on which it belongs to.
  static constexpr int kChains = kPlaced || kRows >= Format::kBusySums ? 1 : Format::kBusySums / kRows;
  static constexpr int kStepValueBytes = kSlots * Format::kValueBytes;
  // A single row waits for nothing but the value stream; bytes, of which a line holds most, come fast enough to.
  static constexpr bool kPrefetches = kRows > 1 || Format::kHalves == 4;

  using Vec = typename Format::Vec;

  static void run(const LinearTile& t) {
    Vec sums[kPanels][kRows][kChains];
    NMS_UNROLL
    for (int p = 0; p < kPanels; ++p) {
      NMS_UNROLL
      for (int r = 0; r < kRows; ++r) {
        sums[p][r][0] = t.from_zero ? Format::zero() : Format::load_sums(t.sums, p * kRows + r);
        NMS_UNROLL
        for (int c = 1; c < kChains; ++c) sums[p][r][c] = Format::zero();
      }
    }

    Place at{static_cast<const uint8_t*>(t.values),   t.values_panel, static_cast<const uint8_t*>(t.x),
             kPlaced ? t.x_row : Format::kInputBytes, t.x_steps,      static_cast<const uint8_t*>(t.early)};
    const uint32_t* indices = t.indices;
    for (int64_t step = 0; step < t.steps; step += kSteps) {
      typename Format::Words words[kPanels][kWords];
      NMS_UNROLL
      for (int p = 0; p < kPanels; ++p) {
        NMS_UNROLL
        for (int i = 0; i < kWords; ++i) words[p][i] = Format::words(indices + p * t.indices_panel + i * kPanelRows);
      }
      steps_of_words(std::make_integer_sequence<int, kSteps * kSlots / kGroup>{}, words, at, sums);
      indices += kWords * kPanelRows;
      at.values += kSteps * kStepValueBytes;
      at.early += kSteps * kStepValueBytes;
      if constexpr (kPlaced)
        at.x_steps += kSteps;
      else
        at.x += kSteps * kRows * Format::kInputBytes;
    }

    NMS_UNROLL
    for (int p = 0; p < kPanels; ++p) {
      NMS_UNROLL
      for (int r = 0; r < kRows; ++r) {
        NMS_UNROLL
        for (int c = 1; c < kChains; ++c) sums[p][r][0] = Format::add(sums[p][r][0], sums[p][r][c]);
        Format::store_sums(t.sums, p * kRows + r, sums[p][r][0]);
      }
    }
  }

 private:
  struct Place {
    const uint8_t* values;
    int64_t values_panel;
    const uint8_t* x;
    int64_t x_row;
    const int32_t* x_steps;
    const uint8_t* early;  // values to be fetched
  };
  using Sums = Vec[kPanels][kRows][kChains];
  using WordTable = typename Format::Words[kPanels][kWords];

  // One after the other, every group of slots with its number as a constant: shifts must be immediates.
  template <int... kGroups>
  static NMS_INLINE void steps_of_words(std::integer_sequence<int, kGroups...>, const WordTable& words, Place& at,
                                        Sums& sums) {
    (slot_group<kGroups * kGroup>(std::make_integer_sequence<int, kGroup>{}, words, at, sums), ...);
  }

  // Slots kFirst, ..., kFirst + kGroup - 1, counted from the start of the words; all in one step.
  template <int kFirst, int... kOffsets>
  static NMS_INLINE void slot_group(std::integer_sequence<int, kOffsets...>, const WordTable& words, Place& at,
                                    Sums& sums) {
    typename Format::Value value[kPanels][kGroup];
    typename Format::Index index[kPanels][kGroup];
    NMS_UNROLL
    for (int p = 0; p < kPanels; ++p) {
      ((value[p][kOffsets] = Format::value(at.values + p * at.values_panel + (kFirst + kOffsets) * Format::kValueBytes),
        index[p][kOffsets] = index_of<kFirst + kOffsets>(words[p])),
       ...);
    }
    constexpr int kStep = kFirst / kSlots;
    const uint8_t* window = at.x + (kPlaced ? at.x_steps[kStep] : kStep * kRows * Format::kInputBytes);
    const int64_t row = kPlaced ? at.x_row : Format::kInputBytes;
    NMS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const typename Format::Input input = Format::input(window + r * row);
      if (kPrefetches) {
        NMS_UNROLL
        for (int line = r; line < kGroup * kPanels; line += kRows)
          prefetch(at.early + line % kPanels * at.values_panel + (kFirst + line / kPanels) * Format::kValueBytes);
      }
      NMS_UNROLL
      for (int p = 0; p < kPanels; ++p)
        (add_product<kFirst + kOffsets>(value[p][kOffsets], index[p][kOffsets], input,
                                        sums[p][r][(kFirst + kOffsets) % kChains]),
         ...);
      // One row after the other: compilers load all rows first otherwise, and run out of registers.
      Format::then(sums[kPanels - 1][r][(kFirst + kGroup - 1) % kChains], window, at.values);
    }
  }

  template <int kSlot>
  static NMS_INLINE typename Format::Index index_of(const typename Format::Words (&words)[kWords]) {
    return Format::template index<Slots, kSlot % kSlots, kSlot % kFields * Slots::kBits>(words[kSlot / kFields]);
  }

  template <int kSlot>
  static NMS_INLINE void add_product(const typename Format::Value& value, const typename Format::Index& index,
                                     const typename Format::Input& input, Vec& sum) {
    sum = Format::template multiply_add<Slots, kSlot % kSlots>(value, index, input, sum);
  }
};

// The same for any number of slots, known only at run time; fields of 4 bits.
template <class Format, int kRows, bool kPlaced = false>
struct AnyTile {
  using Slots = WindowFields<0, kWindowInputs>;
  static constexpr int kFields = 32 / Format::kHalves / Slots::kBits;
  using Vec = typename Format::Vec;

  static void run(const LinearTile& t) {
    Vec sums[kRows];
    NMS_UNROLL
    for (int r = 0; r < kRows; ++r) sums[r] = t.from_zero ? Format::zero() : Format::load_sums(t.sums, r);
    const uint8_t* values = static_cast<const uint8_t*>(t.values);
    const uint8_t* x = static_cast<const uint8_t*>(t.x);
    const int64_t row = kPlaced ? t.x_row : Format::kInputBytes;
    const int slots = t.layout->slots;
    // Blocks begin at any step, and words need not end with one: t.indices is the word of the first slot, and
    // t.first_field that slot's place in it.
    const uint32_t* indices = t.indices;
    int field = t.first_field;
    for (int64_t step = 0; step < t.steps; ++step) {
      if constexpr (kPlaced) x = static_cast<const uint8_t*>(t.x) + t.x_steps[step];
      for (int slot = 0; slot < slots; ++slot) {
        const typename Format::Index index = Format::any_index(Format::words(indices), field * Slots::kBits);
        const typename Format::Value value = Format::value(values);
        NMS_UNROLL
        for (int r = 0; r < kRows; ++r)
          sums[r] = Format::template multiply_add<Slots, 0>(value, index, Format::input(x + r * row), sums[r]);
        values += Format::kValueBytes;
        if (++field == kFields) {
          field = 0;
          indices += kPanelRows;
        }
      }
      x += kRows * Format::kInputBytes;
    }
    NMS_UNROLL
    for (int r = 0; r < kRows; ++r) Format::store_sums(t.sums, r, sums[r]);
  }
};
