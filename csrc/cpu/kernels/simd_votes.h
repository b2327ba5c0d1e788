// What    Counts groups with fewer than n weights above the group's threshold.
// Layout  A group is compared a vector at a time, zeros behind its end: no threshold is below them. Groups whose
// weights
//         do not lie side by side are copied first.
// Note    Included inside a target region, after simd_rows.h.
#pragma once

inline int count_above(const float* group /* [m] */, int m, float threshold) {
  using L = Lanes32;
  using K = Keys<DType::kFloat32>;
  uint32_t bits;
  std::memcpy(&bits, &threshold, sizeof(bits));
  const Vec limit = L::broadcast(magnitude_key<DType::kFloat32>(bits));
  const auto above = [&](Vec raw) { return popcount64(L::lane_bits(L::less(limit, K::from(raw, zero())))); };
  int count = 0, i = 0;
  for (; i + L::kLanes <= m; i += L::kLanes) count += above(load(group + i));
  if (i < m) count += above(K::E::raw_first(group + i, m - i));
  return count;
}

inline int64_t count_votes(const VotePanel& p) {
  alignas(64) float copy[kMaxM];
  int64_t votes = 0;
  for (int64_t r = 0; r < p.rows; ++r) {
    const float* w = static_cast<const float*>(p.w) + r * p.w_row;
    const float* threshold = static_cast<const float*>(p.thresholds) + r * p.thresholds_row;
    for (int64_t group = 0; group * p.m < p.k; ++group) {
      const float* first = w + group * p.m * p.w_k;
      if (p.w_k != 1) gather(first, p.w_k, p.m, copy);
      votes += count_above(p.w_k == 1 ? first : copy, p.m, threshold[group]) < p.n;
    }
  }
  return votes;
}
