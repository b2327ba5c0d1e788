// What    Walks a row group by group and hands each group's mask to `emit(group, len, mask)`.
// Layout  Groups are ranked side by side, lane by lane: keys[i] holds weight i of each. Lanes are the compiler's own
//         vectors of 16 bytes, which every 64-bit target has instructions for.
// Note    Same rule as select_group. A comparison of vectors is -1 where it holds, so counts go down.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../../core/dtype.h"
#include "../../core/select.h"

namespace nms {
namespace {

template <class Key>
struct KeyLanes {
  typedef Key Vector __attribute__((vector_size(16)));
  static constexpr int kLanes = 16 / sizeof(Key);
  static constexpr int kBits = 8 * sizeof(Key);               // mask bits that fit in a lane
  static constexpr int kWords = (kMaxM + kBits - 1) / kBits;  // lanes' worth of words for the largest group
};

// words[w][lane]: bits w * kBits ... of the mask of group `lane`.
template <class Key>
inline void select_lanes(const typename KeyLanes<Key>::Vector* keys /* [m] */, int m, int n,
                         typename KeyLanes<Key>::Vector* words) {
  using Vector = typename KeyLanes<Key>::Vector;
  constexpr int kBits = KeyLanes<Key>::kBits;
  for (int first = 0; first < m; first += kBits) {
    Vector word = {};
    for (int i = first; i < m && i < first + kBits; ++i) {
      const Vector key = keys[i];
      Vector won = {}, lost = {};  // minus the numbers of lower indices that i beats, of higher ones that beat it
      for (int j = 0; j < i; ++j) won += key > keys[j];
      for (int j = i + 1; j < m; ++j) lost += keys[j] > key;
      const Key index = static_cast<Key>(i), limit = static_cast<Key>(n);
      const Key bit = static_cast<Key>(std::make_unsigned_t<Key>{1} << (i - first));
      word |= (index + won - lost < limit) & (Vector{} + bit);
    }
    words[first / kBits] = word;
  }
}

// M = m when it is known at compile time, else 0.
template <DType D, int M, class Emit>
void for_each_group(const typename Element<D>::Bits* row, int64_t stride, int64_t k, int n, int m_at_run_time,
                    Emit emit) {
  using Key = typename Element<D>::Key;
  using Lanes = KeyLanes<Key>;
  constexpr int kLanes = Lanes::kLanes;
  const int m = M > 0 ? M : m_at_run_time;
  typename Lanes::Vector keys[M > 0 ? M : kMaxM] = {};
  typename Lanes::Vector words[Lanes::kWords];
  Key in_order[kLanes * (M > 0 ? M : kMaxM)];  // the same keys as they lie in the row

  const int64_t groups = k / m;
  int64_t group = 0;
  for (; group + kLanes <= groups; group += kLanes) {
    const auto* first = row + group * m * stride;
    if (stride == 1)
      for (int i = 0; i < kLanes * m; ++i) in_order[i] = magnitude_key<D>(first[i]);
    else
      for (int i = 0; i < kLanes * m; ++i) in_order[i] = magnitude_key<D>(first[i * stride]);
    for (int i = 0; i < m; ++i)
      for (int lane = 0; lane < kLanes; ++lane) keys[i][lane] = in_order[lane * m + i];
    select_lanes<Key>(keys, m, n, words);
    for (int lane = 0; lane < kLanes; ++lane) {
      uint64_t mask = 0;
      for (int w = 0; w * Lanes::kBits < m; ++w)
        mask |= static_cast<uint64_t>(static_cast<std::make_unsigned_t<Key>>(words[w][lane])) << (w * Lanes::kBits);
      emit(group + lane, m, mask);
    }
  }
  for (; group * m < k; ++group) {
    Key one[kMaxM] = {};
    const int len = static_cast<int>(k - group * m < m ? k - group * m : m);
    for (int i = 0; i < len; ++i) one[i] = magnitude_key<D>(row[(group * m + i) * stride]);
    emit(group, len, select_group(one, len, n));
  }
}

}  // namespace
}  // namespace nms
