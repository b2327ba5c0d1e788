// Sorting networks over vectors: lane by lane, the largest n of m keys.
//
// What    v[0..m) holds m keys of each lane's group, in any order. A network of max and min puts the largest first.
// Only
//         the n-th largest is needed, so halves are sorted, cut to their n best, and merged; the last merge computes
//         nothing but its n-th element.
// Note    Included inside a target region, after simd_avx2.h or simd_avx512.h. `L` is Lanes32 or Lanes16 of that
// header.
#pragma once

// After it: hi >= lo.
template <class L>
NMS_INLINE void compare_exchange(Vec& hi, Vec& lo) {
  const Vec larger = L::max(hi, lo);
  lo = L::min(hi, lo);
  hi = larger;
}

template <class L>
NMS_INLINE void sort4(Vec* v) {
  compare_exchange<L>(v[0], v[1]);
  compare_exchange<L>(v[2], v[3]);
  compare_exchange<L>(v[0], v[2]);
  compare_exchange<L>(v[1], v[3]);
  compare_exchange<L>(v[1], v[2]);
}

template <class L>
NMS_INLINE void sort8(Vec* v) {  // 19 exchanges, the fewest possible
  constexpr int kSteps[19][2] = {{0, 2}, {1, 3}, {4, 6}, {5, 7}, {0, 4}, {1, 5}, {2, 6}, {3, 7}, {0, 1}, {2, 3},
                                 {4, 5}, {6, 7}, {2, 4}, {3, 5}, {1, 4}, {3, 6}, {1, 2}, {3, 4}, {5, 6}};
  NMS_UNROLL
  for (int i = 0; i < 19; ++i) compare_exchange<L>(v[kSteps[i][0]], v[kSteps[i][1]]);
}

// A bitonic sequence of C becomes sorted.
template <class L, int C>
NMS_INLINE void sort_bitonic(Vec* v) {
  if constexpr (C > 1) {
    NMS_UNROLL
    for (int i = 0; i < C / 2; ++i) compare_exchange<L>(v[i], v[i + C / 2]);
    sort_bitonic<L, C / 2>(v);
    sort_bitonic<L, C / 2>(v + C / 2);
  }
}

// a = the C largest of two sorted lists of C. Reversing b makes a|b bitonic: its larger half is max(a[i], b[C-1-i]).
template <class L, int C>
NMS_INLINE void merge_top(Vec* a, const Vec* b) {
  NMS_UNROLL
  for (int i = 0; i < C; ++i) a[i] = L::max(a[i], b[C - 1 - i]);
  sort_bitonic<L, C>(a);
}

// a[0..2C) = all of two sorted lists of C, a[0..C) and b.
template <class L, int C>
NMS_INLINE void merge_all(Vec* a, const Vec* b) {
  Vec low[C];
  NMS_UNROLL
  for (int i = 0; i < C; ++i) low[i] = L::min(a[i], b[C - 1 - i]);
  NMS_UNROLL
  for (int i = 0; i < C; ++i) a[i] = L::max(a[i], b[C - 1 - i]);
  NMS_UNROLL
  for (int i = 0; i < C; ++i) a[C + i] = low[i];
  sort_bitonic<L, C>(a);
  sort_bitonic<L, C>(a + C);
}

// a = the min(kWant, 2C) largest of two sorted lists of C, sorted.
template <class L, int C, int kWant>
NMS_INLINE void merge(Vec* a, const Vec* b) {
  if constexpr (kWant > C)
    merge_all<L, C>(a, b);
  else
    merge_top<L, C>(a, b);
}

// v[0..min(kWant, kCount)) = the largest of v[0..kCount), sorted. kWant is a power of two.
template <class L, int kCount, int kWant>
NMS_INLINE void sort_top(Vec* v) {
  if constexpr (kCount == 4 && kWant >= 4) {
    sort4<L>(v);
  } else if constexpr (kCount == 8 && kWant >= 8) {
    sort8<L>(v);
  } else if constexpr (kCount > 1) {
    constexpr int kHalf = kCount / 2;
    sort_top<L, kHalf, kWant>(v);
    sort_top<L, kHalf, kWant>(v + kHalf);
    merge<L, (kHalf < kWant ? kHalf : kWant), kWant>(v, v + kHalf);
  }
}

// Which of the keys is the threshold. kN is the number of keys that the lists must hold: n itself where the network was
// written for it, else (kAnyN) half of the group, from which n is read at run time. Patterns that keep more than half
// of a group are turned around: all keys are complemented, and the (m-n+1)-th smallest becomes the (m-n+1)-th largest.
template <int kM, int kPatternN>
struct Rank {
  static constexpr bool kAnyN = kPatternN == 0;
  static constexpr int kN = kAnyN ? (kM + 1) / 2 : kPatternN;

  int position = 0;  // read only if kAnyN
  bool turned = false;

  explicit Rank(int n) {
    if constexpr (kAnyN) {
      turned = n > kM / 2;
      position = turned ? kM - n : n - 1;
    }
  }
};

// The threshold from two sorted lists, the min(kN, m/2) best of each half of a group.
template <class L, int kM, int kPatternN>
NMS_INLINE Vec merge_threshold(Vec* a, const Vec* b, const Rank<kM, kPatternN>& rank) {
  constexpr int kN = Rank<kM, kPatternN>::kN;
  if constexpr (Rank<kM, kPatternN>::kAnyN) {
    merge_top<L, kN>(a, b);
    alignas(64) Vec sorted[kN];
    for (int i = 0; i < kN; ++i) sorted[i] = a[i];
    return sorted[rank.position];
  } else {  // the smallest of the larger half, see merge_top
    Vec nth = L::max(a[0], b[kN - 1]);
    NMS_UNROLL
    for (int i = 1; i < kN; ++i) nth = L::min(nth, L::max(a[i], b[kN - 1 - i]));
    return nth;
  }
}
