// Panels: selection, masked copies and mask differences, over any strides.
//
// Note    Included inside a target region, after simd_interleaved.h.
#pragma once

// What    Chooses along rows and writes the masked copy, the packed mask, or both.
// Layout  Any strides; strided destinations are written through a buffer.
template <DType D>
void select_rows(const SelectPanel& p) {
  using Bits = BitsOf<D>;
  constexpr int kSize = sizeof(Bits);
  alignas(64) Bits strided[kChunk<typename Keys<D>::L>];
  choose_rows<D>(p.src, p.src_row, p.src_k, p.rows, p.k, p.n, p.m, p.bits, p.bits_row,
                 [&](int64_t row, int64_t first, int64_t count, const Bits* elements, const uint8_t* mask) {
                   if (!p.dst) return;
                   Bits* dst = static_cast<Bits*>(p.dst) + row * p.dst_row + first * p.dst_k;
                   Bits* out = p.dst_k == 1 ? dst : strided;
                   copy_kept<kSize>(reinterpret_cast<const char*>(elements), reinterpret_cast<char*>(out), mask, count,
                                    p.stream && p.dst_k == 1);
                   if (p.dst_k != 1) scatter(out, count, dst, p.dst_k);
                 });
}

template <DType D>
void select(const SelectPanel& p) {
  if (!has_chooser(p.m)) return scalar_kernels().select[static_cast<int>(D)](p);
  const bool interleaved = p.src_row == 1 && p.src_k != 1 && (!p.dst || p.dst_row == 1) && p.rows > 1;
  if (!interleaved)
    select_rows<D>(p);
  else if (is_narrow<typename Keys<D>::L>(p.rows, p.src_k, p.dst ? p.dst_k : p.src_k))
    select_narrow<D>(p);
  else
    select_wide<D>(p);
  if (p.stream) _mm_sfence();  // non-temporal stores are not ordered with the stores that tell another thread
}

// What    dst = where(bit, src, 0).
template <int kSize>
void apply_bits(const ApplyPanel& p) {
  if (p.src_k == 1 && p.dst_k == 1) {
    for (int64_t r = 0; r < p.rows; ++r)
      copy_kept<kSize, false>(static_cast<const char*>(p.src) + r * p.src_row * kSize,
                              static_cast<char*>(p.dst) + r * p.dst_row * kSize, p.bits + r * p.bits_row, p.k);
  } else if (p.src_row == 1 && p.dst_row == 1 && p.rows > 1) {
    if (is_narrow<typename Elements<kSize>::Lanes>(p.rows, p.src_k, p.dst_k))
      apply_narrow<kSize>(p);
    else
      apply_wide<kSize>(p);
  } else {
    scalar_kernels().apply_bits[kSize == 1 ? 0 : kSize == 2 ? 1 : 2](p);
  }
}

inline int64_t count_differing(const uint8_t* a, const uint8_t* b, int64_t bytes) {
  BitCounter even, odd;  // two chains of additions
  int64_t i = 0;
  for (; i + 2 * kVectorBytes <= bytes; i += 2 * kVectorBytes) {
    even.add(a + i, b + i);
    odd.add(a + i + kVectorBytes, b + i + kVectorBytes);
  }
  int64_t count = even.sum() + odd.sum();
  for (; i < bytes; ++i) count += popcount64(static_cast<uint64_t>(a[i] ^ b[i]));
  return count;
}
