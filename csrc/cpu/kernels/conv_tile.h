// The inner loop of the packed convolution, for Formats that look inputs up by vectors of indices.
//
// What    As linear_tile.h: sums[panel][row] += value of the slot * x[row] at the lane's place.
// Layout  Indices are not the words of the panel form but the vectors that they stand for, one per slot (decode below):
//         so many tiles share a panel that to cut the fields out of their words again for each would take longer than
//         to read the vectors. The rows of a step lie wherever t.x_steps says, t.x_row apart.
// Launch  DecodedTile<Format, Slots, kRows, kPanels>::run. Of kTogether rows, each product waits for the one of the
// slot
//         before; the others fill that time.
// Note    Included inside a target region, after linear_tile.h and a header with Formats.
#pragma once

template <class Format, class Slots, int kRows, int kPanels>
struct DecodedTile {
  static constexpr int kSlots = Slots::kSlots;
  static constexpr int kGroup = kSlots < 2 ? 1 : 2;  // slots whose values and indices are held at once
  static constexpr int kTogether = 4;
  static constexpr int kIndexWords = Format::kIndexBytes / 4;
  static_assert(kSlots % kGroup == 0);

  using Vec = typename Format::Vec;
  using Sums = Vec[kPanels][kRows];

  static void run(const LinearTile& t) {
    Sums sums;
    NMS_UNROLL
    for (int p = 0; p < kPanels; ++p) {
      NMS_UNROLL
      for (int r = 0; r < kRows; ++r)
        sums[p][r] = t.from_zero ? Format::zero() : Format::load_sums(t.sums, p * kRows + r);
    }
    const uint8_t* values = static_cast<const uint8_t*>(t.values);
    const uint32_t* indices = t.indices;
    const uint8_t* early = static_cast<const uint8_t*>(t.early);
    for (int64_t step = 0; step < t.steps; ++step) {
      const uint8_t* window = static_cast<const uint8_t*>(t.x) + t.x_steps[step];
      NMS_UNROLL
      for (int slot = 0; slot < kSlots; slot += kGroup) {
        NMS_UNROLL
        for (int i = 0; i < kGroup * kPanels; ++i) {
          prefetch(early + i % kPanels * t.early_panel + (slot + i / kPanels) * Format::kValueBytes);
        }
        group(t, values, indices, window, sums);
        values += kGroup * Format::kValueBytes;
        indices += kGroup * kIndexWords;
      }
      early += t.early_step;
    }
    if (t.outputs != nullptr) return store(*t.outputs, sums);
    NMS_UNROLL
    for (int p = 0; p < kPanels; ++p) {
      NMS_UNROLL
      for (int r = 0; r < kRows; ++r) Format::store_sums(t.sums, p * kRows + r, sums[p][r]);
    }
  }

 private:
  // As store_rows (linear_rows.h), but from registers; see LinearTile::outputs.
  static NMS_INLINE void store(const StoreSums& s, Sums& sums) {
    const uint8_t* bias = static_cast<const uint8_t*>(s.bias);
    const float least = s.activation == Activation::kRelu ? 0.0f : -std::numeric_limits<float>::infinity();
    const int64_t row = s.y_row * (Format::kOutputBytes / kPanelRows);
    NMS_UNROLL
    for (int p = 0; p < kPanels; ++p) {
      const Vec more = bias == nullptr ? Format::zero() : Format::outputs(bias + p * Format::kOutputBytes);
      uint8_t* y = static_cast<uint8_t*>(s.y) + p * Format::kOutputBytes;
      NMS_UNROLL
      for (int r = 0; r < kRows; ++r) {
        Format::write_outputs(y + r * row, Format::at_least(least, Format::add(sums[p][r], more)));
      }
    }
  }
  static NMS_INLINE void group(const LinearTile& t, const uint8_t*& values, const uint32_t* indices,
                               const uint8_t*& window, Sums& sums) {
    typename Format::Value value[kPanels][kGroup];
    typename Format::Index index[kPanels][kGroup];
    NMS_UNROLL
    for (int p = 0; p < kPanels; ++p) {
      NMS_UNROLL
      for (int i = 0; i < kGroup; ++i) {
        value[p][i] = Format::value(values + p * t.values_panel + i * Format::kValueBytes);
        index[p][i] = Format::load_index(indices + p * t.indices_panel + i * kIndexWords);
      }
    }
    NMS_UNROLL
    for (int first = 0; first < kRows; first += kTogether) {
      constexpr int kFew = kRows < kTogether ? kRows : kTogether;
      typename Format::Input input[kFew];
      NMS_UNROLL
      for (int r = 0; r < kFew; ++r)
        if (first + r < kRows) input[r] = Format::input(window + (first + r) * t.x_row);
      NMS_UNROLL
      for (int i = 0; i < kGroup; ++i) {
        NMS_UNROLL
        for (int p = 0; p < kPanels; ++p) {
          NMS_UNROLL
          for (int r = 0; r < kFew; ++r) {
            if (first + r >= kRows) continue;
            Vec& sum = sums[p][first + r];
            sum = Format::template multiply_add<Slots, 0>(value[p][i], index[p][i], input[r], sum);
            // In this order: compilers look up all inputs first otherwise, and run out of registers.
            Format::then(sum, window, values);
          }
        }
      }
    }
  }
};

// The vectors of indices of some slots, from the words that begin with the first one. They end with a word.
template <class Format, class Slots>
struct Decode {
  static constexpr int kFields = 32 / Format::kHalves / Slots::kBits;

  static void run(const uint32_t* words, int64_t slots, void* decoded) {
    uint8_t* out = static_cast<uint8_t*>(decoded);
    for (int64_t slot = 0; slot < slots; slot += kFields) {
      fields(std::make_integer_sequence<int, kFields>{}, Format::words(words), out);
      words += kPanelRows;
      out += kFields * Format::kIndexBytes;
    }
  }

 private:
  // Steps of 2-bit fields begin with a word or divide it, so a field's number says which group it speaks of.
  template <int... kField>
  static NMS_INLINE void fields(std::integer_sequence<int, kField...>, const typename Format::Words& words,
                                uint8_t* out) {
    (Format::store_index(out + kField * Format::kIndexBytes,
                         Format::template index<Slots, kField % Slots::kSlots, kField * Slots::kBits>(words)),
     ...);
  }
};
