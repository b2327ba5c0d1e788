// The selection rule for an m known at compile time, as a thread runs it on keys in registers.
//
// Three ways to the same mask, each where it takes the fewest instructions:
//   unique keys  8- and 16-bit types: behind its key a weight carries its place, the lower index as the larger number.
//                No two are equal, so the n-th largest of them is a threshold that exactly n reach.
//   ranks        wider types, m <= 8: every pair is compared (core/select.h).
//   threshold    wider types, m > 8: pairs grow with the square of m, a sorting network does not. More than n may reach
//                the n-th largest key; those equal to it are then dropped from the highest index down.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../../core/bits.h"
#include "../../core/dtype.h"
#include "../../core/select.h"
#include "chunk.h"

namespace nms {

// Batcher's odd-even merge sort, largest first. Sorted runs of length kRun are merged in pairs, by exchanges over
// shrinking distances. The lengths are template arguments so that every index is a constant.
template <int kRun, int kDistance, int M, class Key>
NMS_HD void sort_descending(Key (&keys)[M]) {
  if constexpr (kRun < M) {
    constexpr int kStart = kDistance % kRun;
    NMS_UNROLL
    for (int i = kStart; i + kDistance < M; ++i) {
      const int partner = i + kDistance;
      if ((i - kStart) / kDistance % 2 == 0 && i / (2 * kRun) == partner / (2 * kRun)) {
        const Key first = keys[i], second = keys[partner];
        keys[i] = first > second ? first : second;
        keys[partner] = first > second ? second : first;
      }
    }
    if constexpr (kDistance > 1)
      sort_descending<kRun, kDistance / 2>(keys);
    else
      sort_descending<2 * kRun, 2 * kRun>(keys);
  }
}

// The n-th largest key.
template <int M, class Key>
NMS_HD Key nth_largest(const Key (&keys)[M], int n) {
  Key sorted[M];
  NMS_UNROLL
  for (int i = 0; i < M; ++i) sorted[i] = keys[i];
  sort_descending<1, 1>(sorted);
  Key found = sorted[0];
  NMS_UNROLL
  for (int i = 1; i < M; ++i) found = i < n ? sorted[i] : found;  // sorted[n - 1] would need the array in memory
  return found;
}

template <int M, class Key>
NMS_HD uint32_t reach_threshold(const Key (&keys)[M], Key threshold) {
  uint32_t mask = 0;
  NMS_UNROLL
  for (int i = 0; i < M; ++i)
    if (keys[i] >= threshold) mask |= 1u << i;
  return mask;
}

template <int M>
NMS_HD uint32_t select_by_unique_keys(const int (&keys)[M] /* below 2^16 */, int n) {
  static_assert(M <= 32);
  int unique[M];
  NMS_UNROLL
  for (int i = 0; i < M; ++i) unique[i] = keys[i] * 32 + (31 - i);
  return reach_threshold(unique, nth_largest(unique, n));
}

template <int M, class Key>
NMS_HD uint32_t select_by_threshold(const Key (&keys)[M], int n) {
  static_assert(M <= 32);
  const Key threshold = nth_largest(keys, n);
  uint32_t kept = reach_threshold(keys, threshold);
  if (popcount64(kept) > n) {
    uint32_t equal = 0;
    NMS_UNROLL
    for (int i = 0; i < M; ++i)
      if (keys[i] == threshold) equal |= 1u << i;
    kept ^= equal;
    for (int wanted = n - popcount64(kept); wanted > 0; --wanted) {
      kept |= equal & (0u - equal);
      equal &= equal - 1;
    }
  }
  return kept;
}

// Keys as registers hold them.
template <DType D>
using RegisterKey = std::conditional_t<sizeof(typename Element<D>::Bits) == 8, int64_t, int>;

// Bit i of the result: the weight with keys[i] is kept.
template <DType D, int M>
NMS_HD uint32_t select_fixed(const RegisterKey<D> (&keys)[M], int n) {
  if constexpr (sizeof(typename Element<D>::Bits) <= 2)
    return select_by_unique_keys(keys, n);
  else if constexpr (M <= 8)
    return static_cast<uint32_t>(select_group<M>(keys, n));
  else
    return select_by_threshold(keys, n);
}

}  // namespace nms
