// The inner loop without vector instructions: the layout of core/panel_layout.h, read literally. See linear_tile.h.
#pragma once

// Any number of rows up to 16, any pattern. Input is the type of packed x, Sum that of sums.
template <DType D, int kRows, bool kPlaced = false, class Input = typename Arithmetic<D>::Type, class Sum = Input>
void scalar_tile(const LinearTile& t) {
  using Bits = typename Element<D>::Bits;
  const PanelLayout& layout = *t.layout;
  const Bits* values = static_cast<const Bits*>(t.values);
  const Input* x = static_cast<const Input*>(t.x);
  Sum* sums = static_cast<Sum*>(t.sums);
  const int64_t x_row = kPlaced ? t.x_row / static_cast<int64_t>(sizeof(Input)) : layout.halves * kWindowInputs;
  if (t.from_zero) std::memset(sums, 0, sizeof(Sum) * kRows * kPanelRows);
  const uint32_t mask = (1u << layout.index_bits) - 1;
  for (int64_t step = 0; step < t.steps; ++step) {
    if constexpr (kPlaced) x = reinterpret_cast<const Input*>(static_cast<const uint8_t*>(t.x) + t.x_steps[step]);
    for (int slot = 0; slot < layout.slots; ++slot) {
      const int64_t position = t.first_field + step * layout.slots + slot;
      const uint32_t* words = t.indices + layout.word_of(position) * kPanelRows;
      for (int half = 0; half < layout.halves; ++half) {
        const int shift = layout.shift_of(position, half);
        for (int lane = 0; lane < kPanelRows; ++lane) {
          const int place = layout.place_of(words[lane] >> shift & mask, slot);
          const Sum value = static_cast<Sum>(to_arithmetic<D>(values[lane * layout.halves + half]));
          for (int row = 0; row < kRows; ++row)
            sums[row * kPanelRows + lane] += value * x[row * x_row + half * kWindowInputs + place];
        }
      }
      values += layout.slot_values();
    }
    x += kRows * layout.halves * kWindowInputs;
  }
}
