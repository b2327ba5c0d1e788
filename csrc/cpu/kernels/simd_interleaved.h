// Interleaved rows: neighbouring rows are neighbours in memory, the group dim is strided. Nothing is transposed: lanes
// are rows. Two shapes come in practice:
//
//   wide    [k][many rows], the rows of a matrix grouped along its first dim. Worked through in tiles of kTileRows by
//           kTileKeys, each read and written k after k: long runs are what memory and prefetchers like.
//   narrow  [k][a few rows] without gaps, a channel-grouped convolution weight (3x3: nine rows). A block of it is
//           contiguous, so keys and copies take whole vectors, and only the chooser sees the rows.
//
// Note    Included inside a target region, after simd_rows.h.
#pragma once

constexpr int kTileKeys = 32;  // a multiple of every m; a row's mask is a 32-bit word

template <class L>
constexpr int kTileRows = 1024 / sizeof(typename L::Key);  // one tile's keys are 32 KiB: a first-level cache

// Packed masks of `rows` rows from their words, `count` bits each.
inline void write_words(const uint32_t* words, int64_t rows, int count, uint8_t* bits, int64_t bits_row) {
  if (count == kTileKeys) {
    for (int64_t r = 0; r < rows; ++r) std::memcpy(bits + r * bits_row, words + r, sizeof(words[r]));
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      const uint32_t word = words[r] & static_cast<uint32_t>(low_bits(count));
      std::memcpy(bits + r * bits_row, &word, static_cast<size_t>((count + 7) / 8));
    }
  }
}

inline void read_words(const uint8_t* bits, int64_t bits_row, int64_t rows, int count, uint32_t* words) {
  for (int64_t r = 0; r < rows; ++r) {
    words[r] = 0;
    if (count == kTileKeys)
      std::memcpy(words + r, bits + r * bits_row, sizeof(words[r]));
    else
      std::memcpy(words + r, bits + r * bits_row, static_cast<size_t>((count + 7) / 8));
  }
}

// ---- Wide ----

// Calls tile(first_row, rows, first_k, count): the rows of one stretch of k lie side by side, so they come first.
template <class L, class TileFn>
NMS_INLINE void for_each_tile(int64_t rows, int64_t k, TileFn tile) {
  for (int64_t row = 0; row < rows; row += kTileRows<L>) {
    const int64_t tile_rows = rows - row < kTileRows<L> ? rows - row : kTileRows<L>;
    for (int64_t first = 0; first < k; first += kTileKeys)
      tile(row, tile_rows, first, static_cast<int>(k - first < kTileKeys ? k - first : kTileKeys));
  }
}

// A tile's masks, [kTileKeys][kTileRows] bits: what copy_kept wants for each k, and transposed what packed masks are.
template <class L>
struct TileMask {
  static constexpr int kStride = kTileRows<L> / 8;
  alignas(64) uint8_t bytes[kTileKeys * kStride];

  // Rows [first, first + kLanes) as words, and back.
  void get_words(int64_t first, uint32_t* words) const {
    alignas(64) uint8_t column[kTileKeys * L::kMaskBytes];
    for (int i = 0; i < kTileKeys; ++i)
      std::memcpy(column + i * L::kMaskBytes, bytes + i * kStride + first / 8, L::kMaskBytes);
    L::transpose_masks(column, words);
  }
  void set_words(int64_t first, const uint32_t* words) {
    alignas(64) uint8_t column[kTileKeys * L::kMaskBytes];
    L::transpose_words(words, column);
    for (int i = 0; i < kTileKeys; ++i)
      std::memcpy(bytes + i * kStride + first / 8, column + i * L::kMaskBytes, L::kMaskBytes);
  }
};

constexpr int kPrefetchKeys = 8;  // how many steps of k ahead a tile is asked for

// What    Chooses across the rows of a tile; writes the masked copy, the packed mask, or both.
template <DType D>
void select_wide(const SelectPanel& p) {
  using K = Keys<D>;
  using E = typename K::E;
  using L = typename K::L;
  constexpr int kSize = sizeof(BitsOf<D>);
  const Chooser<L> chooser = find_chooser<L>(p.n, p.m);
  alignas(64) typename L::Key keys[kTileKeys * kTileRows<L>];  // [count][width]
  TileMask<L> mask;
  const int64_t src_k = p.src_k * kSize, dst_k = p.dst_k * kSize;

  for_each_tile<L>(p.rows, p.k, [&](int64_t row, int64_t rows, int64_t first, int count) {
    const char* src = static_cast<const char*>(p.src) + row * kSize + first * src_k;
    const int64_t full = rows / L::kLanes * L::kLanes;
    const int64_t width = round_up(rows, L::kLanes);
    const int64_t padded = round_up(count, p.m);
    for (int i = 0; i < padded; ++i) {
      const Vec countdown = K::countdown_across(i);
      const char* from = src + i * src_k;
      typename L::Key* to = keys + i * width;
      if (i >= count) {  // the virtual weights of a short last group
        for (int64_t r = 0; r < width; r += L::kLanes) store(to + r, zero());
        continue;
      }
      for (int64_t r = 0; r < full; r += L::kLanes) {
        prefetch(from + r * kSize, kPrefetchKeys * src_k);
        store(to + r, K::from(E::raw(from + r * kSize), countdown));
      }
      if (full < rows)
        store(to + full, K::from(E::raw_first(from + full * kSize, static_cast<int>(rows - full)), countdown));
    }
    for (int64_t r = 0; r < rows; r += L::kLanes) {
      const int used = static_cast<int>(rows - r < L::kLanes ? rows - r : L::kLanes);
      chooser.in_lanes(keys + r, width, padded, p.n, low_bits(used), mask.bytes + r / 8, mask.kStride);
      if (p.bits) {
        uint32_t words[L::kLanes];
        mask.get_words(r, words);
        write_words(words, used, count, p.bits + (row + r) * p.bits_row + first / 8, p.bits_row);
      }
    }
    if (p.dst)
      for (int i = 0; i < count; ++i)
        copy_kept<kSize>(src + i * src_k, static_cast<char*>(p.dst) + row * kSize + (first + i) * dst_k,
                         mask.bytes + i * mask.kStride, rows, p.stream);
  });
}

template <int kSize>
void apply_wide(const ApplyPanel& p) {
  using L = typename Elements<kSize>::Lanes;
  TileMask<L> mask;
  const int64_t src_k = p.src_k * kSize, dst_k = p.dst_k * kSize;
  for_each_tile<L>(p.rows, p.k, [&](int64_t row, int64_t rows, int64_t first, int count) {
    for (int64_t r = 0; r < rows; r += L::kLanes) {
      uint32_t words[L::kLanes] = {};
      read_words(p.bits + (row + r) * p.bits_row + first / 8, p.bits_row, rows - r < L::kLanes ? rows - r : L::kLanes,
                 count, words);
      mask.set_words(r, words);
    }
    for (int i = 0; i < count; ++i)
      copy_kept<kSize, false>(static_cast<const char*>(p.src) + row * kSize + (first + i) * src_k,
                              static_cast<char*>(p.dst) + row * kSize + (first + i) * dst_k,
                              mask.bytes + i * mask.kStride, rows);
  });
}

// ---- Narrow ----

constexpr int kNarrowStrips = 4;

template <class L>
constexpr bool is_narrow(int64_t rows, int64_t src_k, int64_t dst_k) {
  return src_k == rows && dst_k == rows && rows % L::kLanes != 0 && rows < kNarrowStrips * L::kLanes;
}

// One block: kTileKeys steps of k in up to kNarrowStrips strips of lanes, or, where lanes would be left empty, several
// segments of kTileKeys side by side in the lanes of one strip: lane s * rows + r is row r of segment s.
template <int kSize>
class NarrowBlock {
 public:
  using E = Elements<kSize>;
  using L = typename E::Lanes;
  using Key = typename L::Key;

  explicit NarrowBlock(int rows) : rows_(rows), segments_(rows <= L::kLanes / 2 ? L::kLanes / rows : 1) {}

  int64_t longest() const { return segments_ * kTileKeys; }  // steps of k in a whole block

  template <DType D>
  void choose(const char* src, int64_t count, const Chooser<L>& chooser, int n, int m) {
    load_keys<D>(src, count * rows_);
    const int64_t padded = round_up(count < kTileKeys ? count : kTileKeys, m);
    if (segments_ == 1) {
      for (int r = 0; r < rows_; r += L::kLanes)
        chooser.in_lanes(keys_ + r, rows_, padded, n, low_bits(width(r)), strip(r), L::kMaskBytes);
    } else {
      const int64_t rows = rows_;  // the compiler must assume that a vector store changes members
      const int64_t segment = kTileKeys * rows;
      const int segments = segments_;
      const Key* from = keys_;
      Key* to = side_by_side_;
      for (int64_t i = 0; i < padded; ++i, from += rows, to += L::kLanes) {
        Vec all = load(from);
        for (int s = 1; s < segments; ++s) all = L::from_lane(s * rows, all, load(from + s * (segment - rows)));
        store(to, all);
      }
      chooser.in_lanes(side_by_side_, L::kLanes, padded, n, low_bits(segments_ * rows_), masks_, L::kMaskBytes);
    }
  }

  void write_bits(uint8_t* bits, int64_t bits_row, int64_t count) const {
    uint32_t words[kNarrowStrips * L::kLanes];  // by lane, over all strips
    for (int r = 0; r < rows_; r += L::kLanes)
      L::transpose_masks(masks_ + r / L::kLanes * kTileKeys * L::kMaskBytes, words + r);
    for (int64_t k = 0, s = 0; k < count; k += kTileKeys, ++s)
      write_words(words + s * rows_, rows_, length(count - k), bits + k / 8, bits_row);
  }

  void read_bits(const uint8_t* bits, int64_t bits_row, int64_t count) {
    uint32_t words[kNarrowStrips * L::kLanes] = {};
    for (int64_t k = 0, s = 0; k < count; k += kTileKeys, ++s)
      read_words(bits + k / 8, bits_row, rows_, length(count - k), words + s * rows_);
    for (int r = 0; r < rows_; r += L::kLanes) L::transpose_words(words + r, strip(r));
  }

  // dst = src where kept. The masks are spread to whole elements first, each step's vector over the tail of the one
  // before, so that the copy itself need not know the rows.
  void copy(const char* src, char* dst, int64_t count) {
    char* out = spread_;
    for (int64_t k = 0, s = 0; k < count; k += kTileKeys, ++s)
      out = rows_ <= L::kLanes ? spread_strip(length(count - k), static_cast<int>(s) * rows_, out)
                               : spread_strips(length(count - k), out);
    const int64_t bytes = count * rows_ * kSize;
    int64_t b = 0;
    for (; b + kVectorBytes <= bytes; b += kVectorBytes) store(dst + b, bit_and(load(src + b), load(spread_ + b)));
    if (b < bytes) {
      const int rest = static_cast<int>(bytes - b);
      store_bytes(dst + b, bit_and(load_bytes(src + b, rest), load(spread_ + b)), rest);
    }
  }

 private:
  static constexpr int kElements = kTileKeys * kNarrowStrips * L::kLanes;

  static int length(int64_t left) { return static_cast<int>(left < kTileKeys ? left : kTileKeys); }
  int width(int first_row) const { return rows_ - first_row < L::kLanes ? rows_ - first_row : L::kLanes; }
  uint8_t* strip(int first_row) { return masks_ + first_row / L::kLanes * kTileKeys * L::kMaskBytes; }

  static uint32_t mask_at(const uint8_t* mask) {
    typename L::MaskBits bits;
    std::memcpy(&bits, mask, sizeof(bits));
    return bits;
  }

  // The only strip, its lanes from first_lane on.
  char* spread_strip(int steps, int first_lane, char* out) const {
    const uint8_t* mask = masks_;
    const int64_t step_bytes = rows_ * kSize;
    if (rows_ <= L::kLanes / 2) {  // a shorter store less often meets two cache lines
      for (int i = 0; i < steps; ++i, mask += L::kMaskBytes, out += step_bytes)
        E::spread_half(out, mask_at(mask) >> first_lane);
    } else {
      for (int i = 0; i < steps; ++i, mask += L::kMaskBytes, out += step_bytes)
        E::spread(out, mask_at(mask) >> first_lane);
    }
    return out;
  }

  char* spread_strips(int steps, char* out) const {
    const int rows = rows_;
    for (int i = 0; i < steps; ++i) {
      const uint8_t* mask = masks_ + i * L::kMaskBytes;
      for (int r = 0; r < rows; r += L::kLanes, mask += kTileKeys * L::kMaskBytes) {
        E::spread(out, mask_at(mask));
        out += (rows - r < L::kLanes ? rows - r : L::kLanes) * kSize;
      }
    }
    return out;
  }

  // Keys where the elements are, and zeros for all that the lanes will read behind the end.
  template <DType D>
  void load_keys(const char* src, int64_t elements) {
    using K = Keys<D>;
    int64_t e = 0;
    for (; e + L::kLanes <= elements; e += L::kLanes) store(keys_ + e, K::from(E::raw(src + e * kSize), zero()));
    if (e < elements) {
      store(keys_ + e, K::from(E::raw_first(src + e * kSize, static_cast<int>(elements - e)), zero()));
      e += L::kLanes;
    }
    for (; e < longest() * rows_; e += L::kLanes) store(keys_ + e, zero());
  }

  const int rows_, segments_;
  // keys_ and spread_ have a vector of slack: a step's vector begins anywhere.
  alignas(64) Key keys_[kElements + L::kLanes];          // [count][rows]
  alignas(64) Key side_by_side_[kTileKeys * L::kLanes];  // [kTileKeys][kLanes]
  alignas(64) uint8_t masks_[kNarrowStrips * kTileKeys * L::kMaskBytes];
  alignas(64) char spread_[kElements * kSize + kVectorBytes];
};

// What    Chooses across a few dense rows; writes the masked copy, the packed mask, or both.
template <DType D>
void select_narrow(const SelectPanel& p) {
  constexpr int kSize = sizeof(BitsOf<D>);
  const auto chooser = find_chooser<typename Keys<D>::L>(p.n, p.m);
  NarrowBlock<kSize> block(static_cast<int>(p.rows));
  for (int64_t first = 0; first < p.k; first += block.longest()) {
    const int64_t count = p.k - first < block.longest() ? p.k - first : block.longest();
    const char* src = static_cast<const char*>(p.src) + first * p.rows * kSize;
    block.template choose<D>(src, count, chooser, p.n, p.m);
    if (p.bits) block.write_bits(p.bits + first / 8, p.bits_row, count);
    if (p.dst) block.copy(src, static_cast<char*>(p.dst) + first * p.rows * kSize, count);
  }
}

template <int kSize>
void apply_narrow(const ApplyPanel& p) {
  NarrowBlock<kSize> block(static_cast<int>(p.rows));
  for (int64_t first = 0; first < p.k; first += block.longest()) {
    const int64_t count = p.k - first < block.longest() ? p.k - first : block.longest();
    block.read_bits(p.bits + first / 8, p.bits_row, count);
    block.copy(static_cast<const char*>(p.src) + first * p.rows * kSize,
               static_cast<char*>(p.dst) + first * p.rows * kSize, count);
  }
}
