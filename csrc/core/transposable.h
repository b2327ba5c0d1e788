// The exact best transposable 2:4 mask of a 4x4 tile: two kept in every row and in every column.
//
// There are 90 such masks. A half tile (two rows) can have only 19 different column counts, and the bottom half must
// have the complement of the top half's counts. So the best mask is the best over 19 classes of (best top of the class)
// + (best bottom of the complementary class): about 170 additions and comparisons instead of 90 sums of 8.
//
//   row pattern p     0: ##..   1: #.#.   2: #..#   3: .##.   4: .#.#   5: ..##        complement of p is 5 - p
//   class of a half   {p, p}: counts 2,2,0,0 (6, one way each)
//                     {p, q}, p + q != 5: counts 2,1,1,0 (12, two ways: p over q, q over p)
//                     {p, 5-p}: counts 1,1,1,1 (1, six ways)
//
// Scores are float64 sums (r0 + r1) + (r2 + r3) of row sums a + b. Rounding is monotone, so the maximum found by halves
// equals the maximum over all 90, to the bit. The first maximum in the order of the loops below wins.
#pragma once

#include <cstdint>

#include "hd.h"

namespace nms {

// |w| as a score: finite for every input, so that no sum overflows and NaN and infinity are kept first.
NMS_HD double tile_score(double w) {
  const double magnitude = w < 0 ? -w : w;
  if (!(magnitude == magnitude)) return 0x1p1020;
  if (magnitude > 1.7976931348623157e308) return 0x1p1010;
  return magnitude < 0x1p1000 ? magnitude : 0x1p1000;
}

namespace detail {

template <class Score>
struct Half {  // the best of a class within a half tile
  Score score;
  int first, second;  // row patterns
};

NMS_HD int row_pattern_bits(int pattern) {
  constexpr uint32_t kBits = 0x3u | 0x5u << 4 | 0x9u << 8 | 0x6u << 12 | 0xAu << 16 | 0xCu << 20;
  return static_cast<int>(kBits >> (4 * pattern) & 0xF);
}

template <class Score>
NMS_HD void row_sums(const Score* row /* [4] */, Score* sums /* [6] */) {
  sums[0] = row[0] + row[1];
  sums[1] = row[0] + row[2];
  sums[2] = row[0] + row[3];
  sums[3] = row[1] + row[2];
  sums[4] = row[1] + row[3];
  sums[5] = row[2] + row[3];
}

template <class Score>
NMS_HD void prefer(Half<Score>& best, Score score, int first, int second) {
  if (score > best.score) best = Half<Score>{score, first, second};
}

template <class Score>
NMS_HD Half<Score> pair_class(const Score* a, const Score* b, int p, int q) {
  Half<Score> best{a[p] + b[q], p, q};
  if (p != q) prefer(best, a[q] + b[p], q, p);
  return best;
}

template <class Score>
NMS_HD Half<Score> complement_class(const Score* a, const Score* b) {
  Half<Score> best{a[0] + b[5], 0, 5};
  for (int p = 1; p < 6; ++p) prefer(best, a[p] + b[5 - p], p, 5 - p);
  return best;
}

}  // namespace detail

// Bit 4 * row + column of the result is set when that weight is kept. Score: double, or another type in which the sums
// of the scores at hand are in the same order.
template <class Score>
NMS_HD uint32_t select_transposable(const Score* scores /* [4][4] */) {
  using namespace detail;
  Score r0[6], r1[6], r2[6], r3[6];
  row_sums(scores, r0);
  row_sums(scores + 4, r1);
  row_sums(scores + 8, r2);
  row_sums(scores + 12, r3);

  Score best = -1;  // scores are never negative
  uint32_t mask = 0;
  auto consider = [&](const Half<Score>& top, const Half<Score>& bottom) {
    const Score score = top.score + bottom.score;
    if (score > best) {
      best = score;
      mask = static_cast<uint32_t>(row_pattern_bits(top.first) | row_pattern_bits(top.second) << 4 |
                                   row_pattern_bits(bottom.first) << 8 | row_pattern_bits(bottom.second) << 12);
    }
  };
  for (int p = 0; p < 6; ++p) consider(pair_class(r0, r1, p, p), pair_class(r2, r3, 5 - p, 5 - p));
  for (int p = 0; p < 6; ++p)
    for (int q = p + 1; q < 6; ++q)
      if (p + q != 5) consider(pair_class(r0, r1, p, q), pair_class(r2, r3, 5 - q, 5 - p));
  consider(complement_class(r0, r1), complement_class(r2, r3));
  return mask;
}

}  // namespace nms
