// What    Walks a row group by group and hands each group's mask to `emit(group, len, mask)`.
// Layout  Eight groups are ranked side by side: keys[i][lane] is weight i of group `lane`, so that the rank loops run
//         over lanes and any compiler turns them into vector instructions of whatever the target has.
// Note    Same rule as select_group: rank[j] starts at j as if all lower indices won; each later winner shifts by one.
#pragma once

#include <cstdint>

#include "../../core/dtype.h"
#include "../../core/select.h"

namespace nms {
namespace {

constexpr int kLanes = 8;

template <class Key>
void rank_lanes(const Key (*keys)[kLanes], Key (*rank)[kLanes], int m) {
  for (int i = 0; i < m; ++i)
    for (int lane = 0; lane < kLanes; ++lane) rank[i][lane] = static_cast<Key>(i);
  for (int i = 0; i < m; ++i) {
    Key rank_i[kLanes] = {};
    for (int j = i + 1; j < m; ++j) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const Key later_wins = keys[j][lane] > keys[i][lane];
        rank_i[lane] = static_cast<Key>(rank_i[lane] + later_wins);
        rank[j][lane] = static_cast<Key>(rank[j][lane] - later_wins);
      }
    }
    for (int lane = 0; lane < kLanes; ++lane) rank[i][lane] = static_cast<Key>(rank[i][lane] + rank_i[lane]);
  }
}

// M = m when it is known at compile time, else 0.
template <DType D, int M, class Emit>
void for_each_group(const typename Element<D>::Bits* row, int64_t stride, int64_t k, int n, int m_at_run_time,
                    Emit emit) {
  using Key = typename Element<D>::Key;
  const int m = M > 0 ? M : m_at_run_time;
  Key keys[M > 0 ? M : kMaxM][kLanes];
  Key rank[M > 0 ? M : kMaxM][kLanes];

  const int64_t groups = k / m;
  int64_t group = 0;
  for (; group + kLanes <= groups; group += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane)
      for (int i = 0; i < m; ++i) keys[i][lane] = magnitude_key<D>(row[((group + lane) * m + i) * stride]);
    rank_lanes(keys, rank, m);
    for (int lane = 0; lane < kLanes; ++lane) {
      uint64_t mask = 0;
      for (int i = 0; i < m; ++i) mask |= static_cast<uint64_t>(rank[i][lane] < n) << i;
      emit(group + lane, m, mask);
    }
  }
  for (; group * m < k; ++group) {
    Key one[kMaxM];
    const int len = static_cast<int>(k - group * m < m ? k - group * m : m);
    for (int i = 0; i < len; ++i) one[i] = magnitude_key<D>(row[(group * m + i) * stride]);
    emit(group, len, select_group(one, len, n));
  }
}

}  // namespace
}  // namespace nms
