// Rows of x that lie anywhere, packed one after the other; see PackRows.
//
// Note    Included after linear_rows.h, inside the same target region.
#pragma once

template <DType D, class Packed>
void pack_rows(const PackRows& p) {
  using Bits = typename Element<D>::Bits;
  constexpr bool kCopies = std::is_same_v<Packed, Bits> || D == DType::kFloat32 || D == DType::kFloat64;
  const int window = p.layout->window, halves = p.layout->halves;
  const int64_t first = p.first_step * halves, last = p.last_step * halves;  // windows
  // Up to here windows are full vectors, which lie side by side as they will when packed.
  const int64_t whole = kCopies && window == kWindowInputs ? std::clamp(p.k / kWindowInputs, first, last) : first;
  for (int64_t row = 0; row < p.count; ++row) {
    Packed* packed = reinterpret_cast<Packed*>(static_cast<uint8_t*>(p.packed) + row * p.packed_row);
    const Bits* x = static_cast<const Bits*>(p.rows[row]);
    if (x == nullptr) {
      std::memset(packed, 0, static_cast<size_t>((last - first) * kWindowInputs) * sizeof(Packed));
      continue;
    }
    for (int64_t i = first; i < whole; ++i, packed += kWindowInputs)
      std::memcpy(packed, x + i * kWindowInputs, kWindowInputs * sizeof(Packed));
    for (int64_t i = whole; i < last; ++i, packed += kWindowInputs) {
      const int64_t begin = i * window, left = p.k - begin;
      const int count = static_cast<int>(left < 0 ? 0 : left < window ? left : window);
      pack_window<D, Packed>(count > 0 ? x + begin : x, 1, count, packed);
    }
  }
}
