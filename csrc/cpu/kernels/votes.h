// What    Which groups have how many weights above their threshold, and what the thresholds are: by keys, so that NaN
// is
//         above everything and equal to NaN.
#pragma once

#include <cstdint>

#include "../../core/dtype.h"
#include "../../core/votes.h"
#include "kernels.h"

namespace nms {
namespace {

template <DType D>
int64_t count_votes(const VotePanel& p) {
  using Bits = typename Element<D>::Bits;
  int64_t votes = 0;
  for (int64_t r = 0; r < p.rows; ++r) {
    const Bits* w = static_cast<const Bits*>(p.w) + r * p.w_row;
    const Bits* threshold = static_cast<const Bits*>(p.thresholds) + r * p.thresholds_row;
    for (int64_t group = 0; group * p.m < p.k; ++group)
      votes += count_above<D>(w + group * p.m * p.w_k, p.w_k, p.m, threshold[group]) < p.n;
  }
  return votes;
}

}  // namespace
}  // namespace nms
