// What    DominoSearch: thresholds of groups, how many groups are below theirs, the pull on kept weights.
// Layout  thresholds [rows, groups] in the order of row numbers; a thread takes a group, or eight weights to add to.
// Launch  One thread per group or byte of the mask (map_kernel); votes are summed (reduce_kernel).
#pragma once

#include "../../core/votes.h"
#include "bits.cuh"
#include "launch.cuh"
#include "layout.h"

namespace nms {

template <DType D>
struct GroupThresholds {
  using Bits = typename Element<D>::Bits;

  Spans spans;  // of m
  const Bits* w;
  Bits* thresholds;
  int m;

  NMS_HD int64_t count() const { return spans.count(); }

  NMS_HD void operator()(int64_t thread) const {
    const Spans::At at = spans.at(thread);
    thresholds[at.row * spans.per_row.value() + at.index] = group_threshold<D>(w + at.a, spans.layout.a_k, m);
  }
};

// Fewer than n weights above the threshold; index: a group.
template <DType D>
struct CountVotes {
  using Bits = typename Element<D>::Bits;

  Spans spans;  // of m
  const Bits* w;
  const Bits* thresholds;
  int n, m;

  NMS_HD int64_t count() const { return spans.count(); }

  NMS_HD uint64_t operator()(int64_t index) const {
    const Spans::At at = spans.at(index);
    const Bits threshold = thresholds[at.row * spans.per_row.value() + at.index];
    return count_above<D>(w + at.a, spans.layout.a_k, m, threshold) < n;
  }
};

// out = where(bit, grad + alpha * scale * w, 0). G, W: their element types.
template <DType G, DType W>
struct AddKept {
  using GradBits = typename Element<G>::Bits;
  using WeightBits = typename Element<W>::Bits;
  using Sum = typename Arithmetic<G>::Type;

  Spans spans;           // of 8; a: grad and out, b: w
  const GradBits* grad;  // may be out
  GradBits* out;
  const WeightBits* w;
  const uint8_t* bits;
  int64_t bits_row;
  double alpha;
  const float* scale;  // on the device; may be null
  bool aligned;

  NMS_HD int64_t count() const { return spans.count(); }

  NMS_HD void operator()(int64_t thread) const {
    const Spans::At at = spans.at(thread);
    const uint8_t byte = bits[at.row * bits_row + at.index];
    const Sum factor = static_cast<Sum>(scale ? alpha * static_cast<double>(*scale) : alpha);
    if (aligned && at.len == 8) {
      auto sums = *reinterpret_cast<const Eight<GradBits>*>(grad + at.a);
      const auto weights = *reinterpret_cast<const Eight<WeightBits>*>(w + at.b);
      NMS_UNROLL
      for (int i = 0; i < 8; ++i)
        sums.element[i] = byte >> i & 1 ? add_multiple<G, W>(sums.element[i], weights.element[i], factor) : GradBits{0};
      *reinterpret_cast<Eight<GradBits>*>(out + at.a) = sums;
    } else {
      for (int i = 0; i < static_cast<int>(at.len); ++i) {
        const int64_t k = at.a + i * spans.layout.a_k;
        out[k] = byte >> i & 1 ? add_multiple<G, W>(grad[k], w[at.b + i * spans.layout.b_k], factor) : GradBits{0};
      }
    }
  }
};

}  // namespace nms
