// Rows of x that lie anywhere, to packed tiles; see PackRows.
//
// Note    Included after linear_rows.h, inside the same target region.
#pragma once

template <DType D, class Packed>
void pack_rows(const PackRows& p) {
  using Bits = typename Element<D>::Bits;
  constexpr bool kCopies = std::is_same_v<Packed, Bits> || D == DType::kFloat32 || D == DType::kFloat64;
  const int window = p.layout->window, halves = p.layout->halves;
  const int64_t inputs = int64_t{halves} * window, room = int64_t{halves} * kWindowInputs;
  const int64_t steps = p.last_step - p.first_step;
  for (int row = 0; row < p.tile_rows; ++row) {
    Packed* packed = static_cast<Packed*>(p.packed) + row * room;
    const int64_t stride = p.tile_rows * room;
    const Bits* x = static_cast<const Bits*>(p.rows[row]);
    if (x == nullptr) {
      for (int64_t step = 0; step < steps; ++step, packed += stride)
        std::memset(packed, 0, static_cast<size_t>(room) * sizeof(Packed));
      continue;
    }
    for (int64_t step = p.first_step; step < p.last_step; ++step, packed += stride) {
      const int64_t first = step * inputs;
      if (kCopies && window == kWindowInputs && first + inputs <= p.k) {
        for (int half = 0; half < halves; ++half)
          std::memcpy(packed + half * kWindowInputs, x + first + half * kWindowInputs, kWindowInputs * sizeof(Packed));
        continue;
      }
      for (int half = 0; half < halves; ++half) {
        const int64_t begin = first + half * window;
        const int64_t left = p.k - begin;
        const int count = static_cast<int>(left < 0 ? 0 : left < window ? left : window);
        pack_window<D, Packed>(count > 0 ? x + begin : x, 1, count, packed + half * kWindowInputs);
      }
    }
  }
}
