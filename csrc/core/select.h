// The selection rule: of a group of weights the n with the largest keys are kept; ties go to the lower index.
//
// The rule is stated through ranks. Weight i has rank = number of weights that beat it, and j beats i when its key is
// larger, or equal with j < i. Ranks within a group are a permutation of 0..len-1, so rank < n keeps exactly n.
#pragma once

#include <cstdint>

#include "hd.h"

namespace nms {

constexpr int kMaxM = 64;  // a group's mask fits in one 64-bit word

// Bit i of the result is set when keys[i] is kept. `len` may be smaller than the pattern's m (a short last group):
// the virtual zeros behind it have the lowest key and the highest indices, so they never displace a real weight.
// `keys` is a pointer or anything else that can be indexed.
template <class Keys>
NMS_HD uint64_t select_group(const Keys& keys /* [len] */, int len, int n) {
  uint64_t kept = 0;
  for (int i = 0; i < len; ++i) {
    int rank = 0;
    for (int j = 0; j < i; ++j) rank += keys[j] >= keys[i];
    for (int j = i + 1; j < len; ++j) rank += keys[j] > keys[i];
    if (rank < n) kept |= uint64_t{1} << i;
  }
  return kept;
}

// The same for a length known at compile time: each pair is compared once and all of it stays in registers.
template <int M, class Key>
NMS_HD uint64_t select_group(const Key (&keys)[M], int n) {
  int rank[M];
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int i = 0; i < M; ++i) rank[i] = i;  // as if every lower index won
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int i = 0; i < M; ++i) {
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int j = i + 1; j < M; ++j) {
      const int later_wins = keys[j] > keys[i];
      rank[i] += later_wins;
      rank[j] -= later_wins;
    }
  }
  uint64_t kept = 0;
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int i = 0; i < M; ++i) kept |= static_cast<uint64_t>(rank[i] < n) << i;
  return kept;
}

}  // namespace nms
