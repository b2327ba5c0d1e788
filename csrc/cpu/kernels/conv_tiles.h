// How pixels are cut into tiles for which there are kernels.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "conv.h"

namespace nms {

// The tiles of `count` pixels side by side, largest first.
class TileSplit {
 public:
  TileSplit(const ConvProblem& problem, int64_t count) {
    int sizes[kMaxTileRows], kinds = 0;
    for (int rows = kMaxTileRows; rows > 0; --rows)
      if (problem.tile(problem.layout, rows, 1).run != nullptr) sizes[kinds++] = rows;
    const int most = sizes[0];
    full_ = count > kSearched * most ? (count - (kSearched - 1) * most) / most : 0;
    most_ = most;
    // For the rest, the cheapest tiles: `cheapest` for every number of pixels up to it, and the last tile for each.
    const int rest = static_cast<int>(count - full_ * most);
    std::array<int, kSearched * kMaxTileRows + 1> cheapest{}, last{};
    for (int pixels = 1; pixels <= rest; ++pixels) {
      cheapest[pixels] = INT32_MAX;
      for (int kind = 0; kind < kinds; ++kind) {
        const int cost = 2 * sizes[kind] + kTileCost + cheapest[std::max(0, pixels - sizes[kind])];
        if (cost >= cheapest[pixels]) continue;
        cheapest[pixels] = cost;
        last[pixels] = sizes[kind];
      }
    }
    for (int left = rest; left > 0; left -= last[left]) rest_[rest_count_++] = static_cast<uint8_t>(last[left]);
    cost_ = full_ * (2 * most + kTileCost) + cheapest[rest];
  }

  int64_t count() const { return full_ + rest_count_; }
  int rows(int64_t tile) const { return tile < full_ ? most_ : rest_[tile - full_]; }
  int64_t total_rows() const {
    int64_t total = full_ * most_;
    for (int i = 0; i < rest_count_; ++i) total += rest_[i];
    return total;
  }
  int64_t cost() const { return cost_; }  // in halves of what a row of a large tile costs

 private:
  static constexpr int kSearched = 4;  // up to so many of the largest tiles, the best split is looked for
  static constexpr int kTileCost = 1;  // of a tile's values and indices, in halves of a row

  int64_t full_;
  int most_;
  int rest_count_ = 0;
  std::array<uint8_t, kSearched * kMaxTileRows> rest_{};
  int64_t cost_;
};

}  // namespace nms
