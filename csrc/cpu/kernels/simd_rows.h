// From elements to keys, and from masks back to elements, along rows.
//
// Note    Included inside a target region, after simd_choose.h.
#pragma once

template <DType D>
using BitsOf = typename Element<D>::Bits;

// Keys of kLanes elements, from their raw bits.
//
// 8-bit elements tie all the time, and their lanes have room to spare: the place in the group, counted down, goes below
// the magnitude, so that no two keys of a group are equal. `place` is the element's place in its row, modulo 32.
template <DType D>
struct Keys {
  using E = Elements<sizeof(BitsOf<D>)>;
  using L = typename E::Lanes;
  static constexpr bool kWidened = false;                    // elements are as wide as keys
  static constexpr typename L::Key kNaN = Element<D>::kNaN;  // what a chooser needs to read them

  static NMS_INLINE Vec from(Vec raw, Vec /* countdown */) {
    const Vec magnitude = bit_and(raw, L::broadcast(static_cast<typename L::Key>(Element<D>::kMagnitude)));
    return L::min(magnitude, L::broadcast(kNaN));
  }
  static NMS_INLINE Vec countdown_across(int64_t /* place */) { return zero(); }
};

struct Countdown {
  int16_t from31[32] = {};
  constexpr Countdown() {
    for (int i = 0; i < 32; ++i) from31[i] = static_cast<int16_t>(31 - i);
  }
};

struct ByteKeys {
  using E = Elements<1>;
  using L = Lanes16;
  static constexpr bool kWidened = true;
  static constexpr int16_t kNaN = 0x7fff;  // the keys are ready

  // The lanes stand at `place` (a multiple of kLanes), place + 1, ...
  static NMS_INLINE Vec countdown_along(int64_t place) {
    static constexpr Countdown kCountdown;
    return load(kCountdown.from31 + place % 32);
  }
  // All lanes stand at `place`.
  static NMS_INLINE Vec countdown_across(int64_t place) { return L::broadcast(static_cast<int16_t>(31 - place % 32)); }
};

template <>
struct Keys<DType::kInt8> : ByteKeys {
  static NMS_INLINE Vec from(Vec raw, Vec countdown) { return L::add(shift_left16<5>(absolute16(raw)), countdown); }
};

template <>
struct Keys<DType::kFloat8E4M3> : ByteKeys {  // all magnitudes above 0x7e are 0x7f, the one NaN
  static NMS_INLINE Vec from(Vec raw, Vec countdown) {
    return L::add(shift_left16<5>(bit_and(raw, L::broadcast(0x7f))), countdown);
  }
};

constexpr int64_t round_up(int64_t a, int64_t unit) { return (a + unit - 1) / unit * unit; }

inline bool is_aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// dst[0..count) = src where the mask has a bit, else 0. dst may be src.
template <int kSize, bool kStream>
void copy_kept(const char* src, char* dst, const uint8_t* mask, int64_t count) {
  using E = Elements<kSize>;
  using StepBits = typename E::StepBits;
  constexpr int kStep = E::kStep;
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    StepBits bits;
    std::memcpy(&bits, mask + i / 8, sizeof(bits));
    const Vec kept = E::kept(src + i * kSize, bits);
    if constexpr (kStream)
      stream(dst + i * kSize, kept);
    else
      store(dst + i * kSize, kept);
  }
  if (i < count) {
    const int rest = static_cast<int>(count - i);
    StepBits bits = 0;
    std::memcpy(&bits, mask + i / 8, static_cast<size_t>((rest + 7) / 8));
    E::store_first(dst + i * kSize, E::kept_first(src + i * kSize, bits, rest), rest);
  }
}

template <int kSize>
void copy_kept(const char* src, char* dst, const uint8_t* mask, int64_t count, bool past_cache) {
  if (past_cache && is_aligned(dst, kVectorBytes))
    copy_kept<kSize, true>(src, dst, mask, count);
  else
    copy_kept<kSize, false>(src, dst, mask, count);
}

// The first `count` bits of the mask, and zeros up to the end of the last byte.
inline void copy_bits(const uint8_t* mask, int64_t count, uint8_t* bits) {
  const int64_t whole = count / 8;
  std::memcpy(bits, mask, static_cast<size_t>(whole));
  if (count % 8 != 0) bits[whole] = static_cast<uint8_t>(mask[whole] & low_bits(static_cast<int>(count % 8)));
}

template <class Bits>
void gather(const Bits* src, int64_t stride, int64_t count, Bits* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = src[i * stride];
}

template <class Bits>
void scatter(const Bits* in, int64_t count, Bits* dst, int64_t stride) {
  for (int64_t i = 0; i < count; ++i) dst[i * stride] = in[i];
}

// A chunk of contiguous elements is short enough for the copy that follows to wait in the store buffer while the next
// one is chosen, and long enough for every chooser's block.
template <class L>
constexpr int64_t kChunk = 2048 / sizeof(typename L::Key);

constexpr int64_t kSlack = 64;

// keys[0..count) of 8-bit elements; count is a multiple of kLanes.
template <DType D>
void widen_keys(const uint8_t* elements, int64_t count, int16_t* keys) {
  using K = Keys<D>;
  for (int64_t i = 0; i < count; i += K::L::kLanes)
    store(keys + i, K::from(K::E::raw(elements + i), K::countdown_along(i)));
}

// What    Chooses along rows and hands on what was chosen: emit(row, first, count, elements, mask), where `elements`
// are
//         `count` contiguous elements of the row from `first` on, and `mask` is theirs.
// Layout  Whole blocks of contiguous rows are read in place. Everything else is copied first: strided rows, the rest of
//         a row behind its last whole block, short rows (several to a chunk). Copies are padded with zeros to whole
//         groups and whole mask bytes; zeros are what a short last group's virtual weights are. Behind copies and
//         their masks kSlack more elements may be read.
// Note    With `bits`, packed masks [rows, bits_row] are written too, in place for whole blocks.
template <DType D, class Emit>
void choose_rows(const void* src, int64_t src_row, int64_t src_k, int64_t rows, int64_t k, int n, int m, uint8_t* bits,
                 int64_t bits_row, Emit emit) {
  using Bits = BitsOf<D>;
  using K = Keys<D>;
  using L = typename K::L;
  using Key = typename L::Key;
  if (k == 0) return;
  const Chooser<L> chooser = find_chooser<L>(n, m);
  alignas(64) Bits copies[kChunk<L> + kSlack] = {};
  alignas(64) Key widened[K::kWidened ? kChunk<L> : 1];
  alignas(64) uint8_t local_mask[kChunk<L> / 8 + kSlack / 8] = {};

  const auto at = [&](int64_t row, int64_t first) {
    return static_cast<const Bits*>(src) + row * src_row + first * src_k;
  };
  const auto bits_at = [&](int64_t row, int64_t first) { return bits + row * bits_row + first / 8; };
  const auto choose = [&](const Bits* elements, int64_t count, uint8_t* mask) {
    if constexpr (K::kWidened) {
      widen_keys<D>(elements, count, widened);
      chooser.in_rows(widened, count, n, K::kNaN, mask);
    } else {
      chooser.in_rows(reinterpret_cast<const Key*>(elements), count, n, K::kNaN, mask);
    }
  };

  const int64_t in_place = src_k == 1 ? k / chooser.block * chooser.block : 0;
  const int64_t unit = m > 8 ? m : 8;
  const int64_t padded_rest = round_up(k - in_place, unit);
  const int64_t together = padded_rest > 0 && padded_rest < kChunk<L> ? kChunk<L> / padded_rest : 1;
  for (int64_t row = 0; row < rows; row += together) {
    const int64_t chunk_rows = rows - row < together ? rows - row : together;
    for (int64_t r = row; r < row + chunk_rows; ++r) {
      for (int64_t first = 0; first < in_place; first += kChunk<L>) {
        const int64_t count = in_place - first < kChunk<L> ? in_place - first : kChunk<L>;
        uint8_t* mask = bits ? bits_at(r, first) : local_mask;
        choose(at(r, first), count, mask);
        emit(r, first, count, at(r, first), mask);
      }
    }
    for (int64_t first = in_place; first < k; first += kChunk<L>) {
      const int64_t count = k - first < kChunk<L> ? k - first : kChunk<L>;
      const int64_t padded = round_up(count, unit);
      for (int64_t r = 0; r < chunk_rows; ++r) {
        Bits* copy = copies + r * padded;
        if (src_k == 1)
          std::memcpy(copy, at(row + r, first), static_cast<size_t>(count) * sizeof(Bits));
        else
          gather(at(row + r, first), src_k, count, copy);
        for (int64_t i = count; i < padded; ++i) copy[i] = 0;
      }
      choose(copies, round_up(chunk_rows * padded, chooser.block), local_mask);
      for (int64_t r = 0; r < chunk_rows; ++r) {
        const uint8_t* mask = local_mask + r * padded / 8;
        if (bits) copy_bits(mask, count, bits_at(row + r, first));
        emit(row + r, first, count, copies + r * padded, mask);
      }
    }
  }
}
