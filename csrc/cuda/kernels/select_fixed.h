// The selection rule for an m known at compile time, as a thread runs it on keys in registers.
//
// Up to 8 keys are ranked pair by pair (core/select.h). Beyond that, pairs grow with the square of m and a sorting
// network wins: it gives the n-th largest key T, and the group keeps every key above T and the first ones equal to T.
// That is the same rule: ranks order by key, then by index.
#pragma once

#include <cstdint>

#include "../../core/bits.h"
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

template <int M, class Key>
NMS_HD uint64_t select_by_threshold(const Key (&keys)[M], int n) {
  static_assert(M <= 32);
  Key sorted[M];
  NMS_UNROLL
  for (int i = 0; i < M; ++i) sorted[i] = keys[i];
  sort_descending<1, 1>(sorted);
  Key threshold = sorted[0];
  NMS_UNROLL
  for (int i = 1; i < M; ++i) threshold = i < n ? sorted[i] : threshold;  // sorted[n - 1] would need it in memory

  uint32_t above = 0, equal = 0;
  NMS_UNROLL
  for (int i = 0; i < M; ++i) {
    above |= static_cast<uint32_t>(keys[i] > threshold) << i;
    equal |= static_cast<uint32_t>(keys[i] == threshold) << i;
  }
  uint32_t kept = above;
  for (int wanted = n - popcount64(above); wanted > 0; --wanted) {  // once, unless keys tie at the threshold
    kept |= equal & (0u - equal);
    equal &= equal - 1;
  }
  return kept;
}

template <int M, class Key>
NMS_HD uint64_t select_fixed(const Key (&keys)[M], int n) {
  if constexpr (M <= 8)
    return select_group<M>(keys, n);
  else
    return select_by_threshold<M>(keys, n);
}

}  // namespace nms
