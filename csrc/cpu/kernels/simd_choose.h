// Choosing: which n of every m are kept. Knows nothing of rows, strides and outputs.
//
// Two shapes of input:
//   in rows    elements lie as the weights do, group after group. Result: one bit per element.
//   in lanes   keys[i][lane]: each lane is a row of its own, i runs along its group. Result: one mask of lanes per i.
//
// Ties go to the lower index. The networks find a threshold, the n-th largest key; keys equal to it can be more than
// there is room for, which is rare and repaired afterwards, the highest index first.
//
// Note    Included inside a target region, after simd_networks.h.
#pragma once

// How far ahead of its loads a chooser asks for memory. Without it the memory would rest while a block is sorted. The
// requests are spread over the sorting: processors drop what comes faster than they can note it down.
constexpr int kPrefetchBytes = 4096;

template <class L>
struct Chooser {
  using Key = typename L::Key;

  // Elements are of the lanes' size: floats, of which `nan` is the key of every NaN, or keys, which `nan` leaves as
  // they are. mask [count / 8] bytes; count is a multiple of `block`.
  void (*in_rows)(const Key* elements, int64_t count, int n, Key nan, uint8_t* mask);
  int64_t block;

  // keys [count][stride], of which the first kLanes of each i are read -> mask: kMaskBytes for each i, mask_stride
  // bytes apart. count is a multiple of m. Lanes that are not `used` may hold anything.
  void (*in_lanes)(const Key* keys, int64_t stride, int64_t count, int n, uint64_t used, uint8_t* mask,
                   int64_t mask_stride);
};

// From the bits of a float to its key, see core/dtype.h.
template <class L>
class KeyReader {
 public:
  using Key = typename L::Key;

  NMS_INLINE explicit KeyReader(Key nan)
      : magnitude_(L::broadcast(std::numeric_limits<Key>::max())), nan_(L::broadcast(nan)) {}

  NMS_INLINE Vec key(const Key* element) const { return L::min(magnitude(element), nan_); }
  // Enough to compare with a threshold: no threshold is above a NaN's key.
  NMS_INLINE Vec magnitude(const Key* element) const { return bit_and(load(element), magnitude_); }

 private:
  Vec magnitude_, nan_;
};

NMS_INLINE void store_word(uint8_t* mask, uint64_t word) { std::memcpy(mask, &word, sizeof(word)); }

// ---- Rows of groups of 2 or 4: every key is compared with its neighbours ----

// Key i loses against j when key[j] > key[i], or they are equal and j < i: in integers, when key[j] > key[i] - (j < i).
template <class L>
struct LowerIndexWins {
  alignas(64) typename L::Key for_flip1[L::kLanes] = {};   // 1 where i ^ 1 < i
  alignas(64) typename L::Key for_flip23[L::kLanes] = {};  // 1 where i ^ 2 < i, which is also where i ^ 3 < i
  constexpr LowerIndexWins() {
    for (int i = 0; i < L::kLanes; ++i) {
      for_flip1[i] = i & 1;
      for_flip23[i] = i >> 1 & 1;
    }
  }
};

template <class L, int kM, int kN>
void rank_in_rows(const typename L::Key* elements, int64_t count, int /* n */, typename L::Key nan, uint8_t* mask) {
  using Mask = typename L::Mask;
  const KeyReader<L> reader(nan);
  static constexpr LowerIndexWins<L> kLowerWins;
  const Vec step1 = load(kLowerWins.for_flip1);
  const Vec step23 = load(kLowerWins.for_flip23);
  for (int64_t first = 0; first < count; first += 64) {
    Mask dropped[64 / L::kLanes];
    NMS_UNROLL
    for (int i = 0; i < 64 / L::kLanes; ++i) {
      prefetch(elements + first + i * L::kLanes, kPrefetchBytes);
      const Vec key = reader.key(elements + first + i * L::kLanes);
      const Mask lost1 = L::less(L::subtract(key, step1), L::template neighbours<1>(key));
      if constexpr (kM == 2) {
        dropped[i] = lost1;
      } else {
        const Vec key23 = L::subtract(key, step23);
        const Mask lost2 = L::less(key23, L::template neighbours<2>(key));
        const Mask lost3 = L::less(key23, L::template neighbours<3>(key));
        if constexpr (kN == 1)  // dropped when it loses once
          dropped[i] = static_cast<Mask>(lost1 | lost2 | lost3);
        else if constexpr (kN == 2)  // twice
          dropped[i] = static_cast<Mask>((lost1 & lost2) | (lost3 & (lost1 | lost2)));
        else  // three times
          dropped[i] = static_cast<Mask>(lost1 & lost2 & lost3);
      }
    }
    store_word(mask + first / 8, ~L::word(dropped));
  }
}

// ---- Rows of groups of 8, 16 or 32: transposed in registers, so that a lane holds a group ----
//
// A block is kM vectors, kLanes groups. Its vectors are loaded in leaves of kPerPart vectors and transposed within
// their 128-bit parts: then lane j of part p holds the kPerPart neighbouring keys of part p of vector j. Such runs are
// sorted, cut to the best, and merged with the other runs of their group:
//
//   groups longer than a vector: the runs of its vectors stand in the same lanes of other leaves;
//   groups of several parts:     even_parts and odd_parts of two leaves bring them into the same lanes.

template <class L, int kM, int kPatternN>
class Block {
 public:
  using Key = typename L::Key;
  using Threshold = Rank<kM, kPatternN>;

  NMS_INLINE Block(const Key* elements, const KeyReader<L>& reader, const Threshold& rank)
      : elements_(elements),
        reader_(reader),
        rank_(rank),
        turn_(L::broadcast(static_cast<Key>(rank.turned ? -1 : 0))) {}

  // Lane g of the result belongs to group g where a group fills at least a vector, else see threshold_lane().
  NMS_INLINE Vec thresholds() const {
    Vec a[kWanted], b[kWanted];
    if constexpr (kGroupParts == 1) {
      Vec v[kM];
      load_leaf(v, 0, 0);
      sort_top<L, kM / 2, kWanted>(v);
      sort_top<L, kM / 2, kWanted>(v + kM / 2);
      NMS_UNROLL
      for (int i = 0; i < kWanted; ++i) {
        a[i] = v[i];
        b[i] = v[kM / 2 + i];
      }
    } else {
      load_halves<kGroupParts>(a, b, 0);
    }
    const Vec threshold = merge_threshold<L>(a, b, rank_);
    return Threshold::kAnyN ? bit_xor(threshold, turn_) : threshold;
  }

  // The thresholds of the keys in the block's vector f.
  static NMS_INLINE Vec spread(const Key* thresholds, int f) {
    if constexpr (kM >= L::kLanes)
      return L::broadcast(thresholds[f / kGroupVectors]);
    else
      return L::template spread<kM>(thresholds, f);
  }

 private:
  static constexpr int kGroupVectors = kM > L::kLanes ? kM / L::kLanes : 1;
  static constexpr int kGroupParts = kM / L::kPerPart < kParts ? kM / L::kPerPart : kParts;  // within a vector
  static constexpr int kWanted = Threshold::kN;                                              // at most kM / 2

  static constexpr int list_size(int keys) { return keys < kWanted ? keys : kWanted; }

  NMS_INLINE void load_leaf(Vec* v, int leaf, int group_vector) const {
    NMS_UNROLL
    for (int j = 0; j < L::kPerPart; ++j) {
      const Key* element = elements_ + ((leaf * L::kPerPart + j) * kGroupVectors + group_vector) * L::kLanes;
      prefetch(element, kPrefetchBytes);
      v[j] = reader_.key(element);
      if constexpr (Threshold::kAnyN) v[j] = bit_xor(v[j], turn_);
    }
    L::transpose_parts(v);
  }

  // The best of kCount vectors of each group, part by part.
  template <int kCount>
  NMS_INLINE void load_vectors(Vec* top, int leaf, int group_vector) const {
    if constexpr (kCount == 1) {
      Vec v[L::kPerPart];
      load_leaf(v, leaf, group_vector);
      sort_top<L, L::kPerPart, kWanted>(v);
      constexpr int kBest = list_size(L::kPerPart);
      NMS_UNROLL
      for (int i = 0; i < kBest; ++i) top[i] = v[i];
    } else {
      constexpr int kHalf = list_size(L::kPerPart * kCount / 2);
      Vec other[kHalf];
      load_vectors<kCount / 2>(top, leaf, group_vector);
      load_vectors<kCount / 2>(other, leaf, group_vector + kCount / 2);
      merge<L, kHalf, kWanted>(top, other);
    }
  }

  // The best of kCount neighbouring parts of each group; the leaves from `leaf` on share the vectors.
  template <int kCount>
  NMS_INLINE void load_parts(Vec* top, int leaf) const {
    if constexpr (kCount == 1) {
      load_vectors<kGroupVectors>(top, leaf, 0);
    } else {
      constexpr int kHalf = list_size(L::kPerPart * kGroupVectors * kCount / 2);
      Vec other[kHalf];
      load_halves<kCount>(top, other, leaf);
      merge<L, kHalf, kWanted>(top, other);
    }
  }

  template <int kCount>
  NMS_INLINE void load_halves(Vec* even, Vec* odd, int leaf) const {
    constexpr int kHalf = list_size(L::kPerPart * kGroupVectors * kCount / 2);
    Vec x[list_size(2 * kHalf)], y[list_size(2 * kHalf)];
    load_parts<kCount / 2>(x, leaf);
    load_parts<kCount / 2>(y, leaf + kCount / 2);
    NMS_UNROLL
    for (int i = 0; i < kHalf; ++i) {
      even[i] = even_parts(x[i], y[i]);
      odd[i] = odd_parts(x[i], y[i]);
    }
  }

  const Key* elements_;
  const KeyReader<L>& reader_;
  const Threshold& rank_;
  const Vec turn_;  // all ones: complement the keys
};

// `kept` has at least n bits in every group of m >= 8; where there are more, the highest bits of `tied` go.
inline uint64_t __attribute__((noinline)) drop_last_ties(uint64_t kept, uint64_t tied, int m, int n) {
  uint64_t counts = kept - (kept >> 1 & 0x5555555555555555);  // set bits per field, in fields of growing width
  counts = (counts & 0x3333333333333333) + (counts >> 2 & 0x3333333333333333);
  counts = (counts + (counts >> 4)) & 0x0F0F0F0F0F0F0F0F;
  if (m >= 16) counts = (counts + (counts >> 8)) & 0x00FF00FF00FF00FF;
  if (m >= 32) counts = (counts + (counts >> 16)) & 0x0000FFFF0000FFFF;
  const uint64_t one_each = m == 8 ? 0x0101010101010101 : m == 16 ? 0x0001000100010001 : 0x0000000100000001;
  for (uint64_t excess = counts - one_each * static_cast<uint64_t>(n); excess != 0;) {
    const int group = lowest_bit(excess) & -m;
    const uint64_t field = low_bits(m) << group;
    uint64_t candidates = tied & field;
    for (uint64_t left = (excess & field) >> group; left > 0; --left) {
      const uint64_t highest = uint64_t{1} << (63 - __builtin_clzll(candidates));
      candidates ^= highest;
      kept ^= highest;
    }
    excess &= ~field;
  }
  return kept;
}

template <class L, int kM, int kN>
void choose_in_rows(const typename L::Key* elements, int64_t count, int n, typename L::Key nan, uint8_t* mask) {
  using Key = typename L::Key;
  using Mask = typename L::Mask;
  constexpr int kBlock = kM * L::kLanes;
  constexpr int kWordVectors = 64 / L::kLanes;
  const KeyReader<L> reader(nan);
  const Rank<kM, kN> rank(n);
  const int expected = 64 / kM * (kN > 0 ? kN : n);
  for (int64_t first = 0; first < count; first += kBlock) {
    const Key* block_elements = elements + first;
    const Block<L, kM, kN> block(block_elements, reader, rank);
    alignas(64) Key thresholds[L::kLanes];
    store(thresholds, block.thresholds());
    for (int f = 0; f < kM; f += kWordVectors) {
      Mask dropped[kWordVectors];
      NMS_UNROLL
      for (int i = 0; i < kWordVectors; ++i)
        dropped[i] = L::less(reader.magnitude(block_elements + (f + i) * L::kLanes), block.spread(thresholds, f + i));
      uint64_t kept = ~L::word(dropped);
      if (__builtin_expect(popcount64(kept) != expected, 0)) {
        Mask tied[kWordVectors];
        for (int i = 0; i < kWordVectors; ++i)
          tied[i] = L::equal(reader.key(block_elements + (f + i) * L::kLanes), block.spread(thresholds, f + i));
        kept = drop_last_ties(kept, L::word(tied), kM, n);
      }
      store_word(mask + (first + f * L::kLanes) / 8, kept);
    }
  }
}

// ---- Lanes ----

// The masks of one group. Where `missing` is negative, that many keys equal to the threshold are dropped, the last
// first; where there are more than n without that, `missing` says so afterwards.
template <class L, int kM, bool kRepairTies, class KeyAt>
NMS_INLINE void keep_in_lanes(KeyAt key_at, Vec threshold, Vec& missing, uint8_t* mask, int64_t mask_stride) {
  using Mask = typename L::Mask;
  const Vec below = L::subtract(threshold, L::broadcast(1));
  Vec kept_count = zero();
  NMS_UNROLL
  for (int pair = kM - 2; pair >= 0; pair -= 2) {
    Mask kept[2];
    NMS_UNROLL
    for (int i = 1; i >= 0; --i) {
      const Vec key = key_at(pair + i);
      kept[i] = L::less(below, key);
      if constexpr (kRepairTies) {
        const Mask tie = static_cast<Mask>(L::equal(key, threshold) & L::less(missing, zero()));
        missing = L::add_one_where(tie, missing);
        kept[i] = static_cast<Mask>(kept[i] & ~tie);
      } else {
        kept_count = L::add_one_where(kept[i], kept_count);
      }
    }
    L::store_masks(mask + pair * mask_stride, mask_stride, kept[0], kept[1]);
  }
  if constexpr (!kRepairTies) missing = L::subtract(missing, kept_count);
}

template <class L, int kM, int kN>
void choose_in_lanes(const typename L::Key* keys, int64_t stride, int64_t count, int n, uint64_t used, uint8_t* mask,
                     int64_t mask_stride) {
  using Key = typename L::Key;
  const Rank<kM, kN> rank(n);
  const Vec turn = L::broadcast(static_cast<Key>(rank.turned ? -1 : 0));
  for (int64_t first = 0; first < count; first += kM) {
    const Key* group = keys + first * stride;
    Vec v[kM], unsorted[kM];
    NMS_UNROLL
    for (int i = 0; i < kM; ++i) {
      v[i] = unsorted[i] = load(group + i * stride);
      if constexpr (rank.kAnyN) v[i] = bit_xor(v[i], turn);
    }
    const auto key_at = [&](int i) {  // long groups are too many for the registers
      if constexpr (kM <= 8)
        return unsorted[i];
      else
        return load(group + i * stride);
    };
    sort_top<L, kM / 2, rank.kN>(v);
    sort_top<L, kM / 2, rank.kN>(v + kM / 2);
    Vec threshold = merge_threshold<L>(v, v + kM / 2, rank);
    if constexpr (rank.kAnyN) threshold = bit_xor(threshold, turn);

    uint8_t* group_mask = mask + first * mask_stride;
    Vec missing = L::broadcast(static_cast<Key>(n));
    keep_in_lanes<L, kM, false>(key_at, threshold, missing, group_mask, mask_stride);
    if (L::lane_bits(L::less(missing, zero())) & used)
      keep_in_lanes<L, kM, true>(key_at, threshold, missing, group_mask, mask_stride);
  }
}

// ---- n == m ----

template <class L>
void keep_all_in_rows(const typename L::Key*, int64_t count, int, typename L::Key, uint8_t* mask) {
  std::memset(mask, 0xFF, static_cast<size_t>(count / 8));
}

template <class L>
void keep_all_in_lanes(const typename L::Key*, int64_t, int64_t count, int, uint64_t, uint8_t* mask,
                       int64_t mask_stride) {
  for (int64_t i = 0; i < count; ++i) std::memset(mask + i * mask_stride, 0xFF, L::kMaskBytes);
}

// ---- The choice of the choice ----

template <class L, int kM, int kN>
constexpr Chooser<L> make_chooser() {
  if constexpr (kM <= 4)
    return {rank_in_rows<L, kM, kN>, 64, choose_in_lanes<L, kM, (kN <= kM / 2 ? kN : 0)>};
  else
    return {choose_in_rows<L, kM, kN>, kM * L::kLanes, choose_in_lanes<L, kM, kN>};
}

// A network for n = 1, 2, 4, ..., m/2, and one for all other n.
template <class L, int kM, int kN>
Chooser<L> find_in_powers(int n) {
  if (n == kN) return make_chooser<L, kM, kN>();
  if constexpr (kN < kM / 2)
    return find_in_powers<L, kM, 2 * kN>(n);
  else
    return make_chooser<L, kM, 0>();
}

constexpr bool has_chooser(int m) { return m == 2 || m == 4 || m == 8 || m == 16 || m == 32; }

template <class L>
Chooser<L> find_chooser(int n, int m) {  // has_chooser(m)
  if (n == m) return {keep_all_in_rows<L>, 64, keep_all_in_lanes<L>};
  switch (m) {
    case 2:
      return make_chooser<L, 2, 1>();
    case 4:
      return n == 1 ? make_chooser<L, 4, 1>() : n == 2 ? make_chooser<L, 4, 2>() : make_chooser<L, 4, 3>();
    case 8:
      return find_in_powers<L, 8, 1>(n);
    case 16:
      return find_in_powers<L, 16, 1>(n);
    default:
      return find_in_powers<L, 32, 1>(n);
  }
}
