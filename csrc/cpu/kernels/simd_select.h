// Panels: selection, masked copies and mask differences, over any strides.
//
// Note    Included inside a target region, after simd_rows.h.
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

// What    The same where rows are interleaved (src_row == dst_row == 1), without transposing: lanes are rows.
// Layout  A strip is up to kLanes rows. A narrow one (a 3x3 convolution has 9) would leave lanes empty, so its lanes
//         hold several segments of k: lane s * rows + r is row r in segment s, kLaneKeys elements further on.
template <DType D, class Full>
void select_strip(const SelectPanel& p, const Chooser<typename Keys<D>::L>& chooser, Full, int64_t row, int rows,
                  int64_t begin, int64_t end) {
  using K = Keys<D>;
  using E = typename K::E;
  using L = typename K::L;
  constexpr int kSize = sizeof(BitsOf<D>);
  constexpr bool kFull = Full::value;
  const int segments = L::kLanes / rows;
  const char* src = static_cast<const char*>(p.src) + row * kSize;
  char* dst = static_cast<char*>(p.dst) + (p.dst ? row * kSize : 0);
  const bool past_cache = p.stream && kFull && can_stream_across<kSize>(dst, p.dst_k);
  alignas(64) typename L::Key keys[(kLaneKeys + 1) * L::kLanes];  // a narrow strip's stores reach past its lanes
  LaneBits<L> bits;

  for (int64_t first = begin; first < end; first += segments * kLaneKeys) {
    const int64_t most = end - first < kLaneKeys ? end - first : kLaneKeys;
    const int groups = static_cast<int>((most + p.m - 1) / p.m);
    for (int i = 0; i < groups * p.m; ++i) {
      const Vec countdown = K::countdown_across(i);
      for (int s = 0; s < segments; ++s) {  // in this order, each store overwrites what the one before put too far
        const int64_t k = first + s * kLaneKeys + i;
        Vec key = zero();
        if (k < end) {
          const char* at = src + k * p.src_k * kSize;
          key = K::from(kFull ? E::raw(at) : E::raw_first(at, rows), countdown);
        }
        store(keys + i * L::kLanes + s * rows, key);
      }
    }
    chooser.in_lanes(keys, groups, p.n, low_bits(segments * rows), bits.strings);

    for (int s = 0; s < segments; ++s) {
      const int64_t k = first + s * kLaneKeys;
      if (k >= end) break;
      const int count = static_cast<int>(end - k < kLaneKeys ? end - k : kLaneKeys);
      if (p.bits) {
        const uint32_t valid = static_cast<uint32_t>(low_bits(count));
        for (int r = 0; r < rows; ++r) {
          const uint32_t row_bits = bits.get(s * rows + r) & valid;
          std::memcpy(p.bits + (row + r) * p.bits_row + k / 8, &row_bits, static_cast<size_t>((count + 7) / 8));
        }
      }
      if (p.dst)
        copy_kept_across<kSize, kFull>(src + k * p.src_k * kSize, p.src_k, dst + k * p.dst_k * kSize, p.dst_k, bits,
                                       s * rows, rows, count, past_cache);
    }
  }
}

template <DType D>
void select(const SelectPanel& p) {
  if (!has_chooser(p.m)) return scalar_kernels().select[static_cast<int>(D)](p);
  using L = typename Keys<D>::L;
  const bool interleaved = p.src_row == 1 && p.src_k != 1 && (!p.dst || p.dst_row == 1) && p.rows > 1;
  if (interleaved) {
    const Chooser<L> chooser = find_chooser<L>(p.n, p.m);
    for_each_strip<L>(p.rows, p.k, [&](auto full, int64_t row, int rows, int64_t begin, int64_t end) {
      select_strip<D>(p, chooser, full, row, rows, begin, end);
    });
  } else {
    select_rows<D>(p);
  }
  if (p.stream) _mm_sfence();  // non-temporal stores are not ordered with the stores that tell another thread
}

// What    dst = where(bit, src, 0).
template <int kSize>
void apply_bits(const ApplyPanel& p) {
  using L = typename Elements<kSize>::Lanes;
  const char* src = static_cast<const char*>(p.src);
  char* dst = static_cast<char*>(p.dst);
  if (p.src_k == 1 && p.dst_k == 1) {
    for (int64_t r = 0; r < p.rows; ++r)
      copy_kept<kSize, false>(src + r * p.src_row * kSize, dst + r * p.dst_row * kSize, p.bits + r * p.bits_row, p.k);
  } else if (p.src_row == 1 && p.dst_row == 1 && p.rows > 1) {
    LaneBits<L> bits = {};
    for_each_strip<L>(p.rows, p.k, [&](auto full, int64_t row, int rows, int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; k += kLaneKeys) {
        const int count = static_cast<int>(end - k < kLaneKeys ? end - k : kLaneKeys);
        for (int r = 0; r < rows; ++r) {
          uint32_t row_bits = 0;
          std::memcpy(&row_bits, p.bits + (row + r) * p.bits_row + k / 8, static_cast<size_t>((count + 7) / 8));
          bits.set(r, row_bits);
        }
        copy_kept_across<kSize, decltype(full)::value>(src + (row + k * p.src_k) * kSize, p.src_k,
                                                       dst + (row + k * p.dst_k) * kSize, p.dst_k, bits, 0, rows,
                                                       count, false);
      }
    });
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
