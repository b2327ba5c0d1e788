// The arithmetic of DominoSearch: a group's threshold, and how many of its weights are above it.
#pragma once

#include <cmath>
#include <cstdint>

#include "convert.h"
#include "dtype.h"
#include "select.h"

namespace nms {

template <DType D>
NMS_HD int count_above(const typename Element<D>::Bits* group /* [m], strided */, int64_t stride, int m,
                       typename Element<D>::Bits threshold) {
  const auto limit = magnitude_key<D>(threshold);
  int above = 0;
  for (int i = 0; i < m; ++i) above += magnitude_key<D>(group[i * stride]) > limit;
  return above;
}

// The keys of a strided group, for select_group: a GPU has no registers to index for them.
template <DType D>
struct GroupKeys {
  const typename Element<D>::Bits* group;
  int64_t stride;
  NMS_HD typename Element<D>::Key operator[](int i) const { return magnitude_key<D>(group[i * stride]); }
};

// The mean of the m / 2 smallest |w|: those that the selection rule would prune, added up in float64 in the order of
// their positions, and rounded once. Any NaN is the usual one.
template <DType D>
NMS_HD typename Element<D>::Bits group_threshold(const typename Element<D>::Bits* group /* [m], strided */,
                                                 int64_t stride, int m /* >= 2 */) {
  const int half = m / 2;
  const uint64_t kept = select_group(GroupKeys<D>{group, stride}, m, m - half);
  double sum = 0;
  for (int i = 0; i < m; ++i) {
    if (kept >> i & 1) continue;
    const auto value = to_arithmetic<D>(group[i * stride]);
    sum += static_cast<double>(value < 0 ? -value : value);
  }
  if (sum != sum) sum = NAN;  // one of all the NaNs
  return from_arithmetic<D>(static_cast<typename Arithmetic<D>::Type>(sum / half));
}

}  // namespace nms
