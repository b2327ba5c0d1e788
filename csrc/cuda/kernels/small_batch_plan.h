// How the small-batch product (small_batch.cuh) is divided among blocks, warps and lanes. Host code.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "layout.h"

namespace nms {

constexpr int kSmallThreads = 512;
constexpr int kSmallWarps = kSmallThreads / 32;
constexpr int kSmallTileBytes = 32 << 10;  // of x, in shared memory

// What does not depend on the machine.
struct SmallShape {
  int64_t rows;
  int units;          // pieces of a row that one thread takes at a time
  int tile_units;     // as many as x's tile has room for
  int warp_rows;      // of a warp whose lanes share all of them
  int max_lanes;      // that may share a row and take units of it each; 1: the warp takes a unit together
  int64_t row_bytes;  // values and indices of a row
  int64_t x_bytes;    // of all tokens of a tile
};

struct SmallPlan {
  int lanes = 32;       // that take units of a row each; if fewer than there may be, the others have rows of their own
  int parts = 1;        // warps of a block that share rows: each takes every parts-th piece of `lanes` units
  int splits = 1;       // blocks that share rows; their sums are added by a second kernel
  int split_units = 0;  // units of a split
  int tile_units = 0;   // units of a tile of x

  int64_t block_rows(int warp_rows, int max_lanes) const {
    return int64_t{kSmallWarps} / parts * (max_lanes / lanes) * warp_rows;
  }
};

// The division that takes the least time if blocks come in waves of two per multiprocessor, each as long as its bytes.
// Many parts make small blocks, which fill the waves but each read x; splits pay for a second kernel.
inline SmallPlan plan_small_batch(const SmallShape& shape, int multiprocessors) {
  constexpr double kSecondKernel = 32 << 10;  // bytes that a block reads meanwhile, about two microseconds' worth
  const int64_t slots = 2 * int64_t{std::max(1, multiprocessors)};
  SmallPlan best;
  double least = std::numeric_limits<double>::infinity();
  for (int splits = 1; splits <= 64 && (splits == 1 || shape.units >= shape.max_lanes * splits); splits *= 2) {
    SmallPlan plan;
    plan.splits = splits;
    plan.split_units = divide_up(shape.units, splits);
    plan.splits = std::max(1, divide_up(shape.units, std::max(1, plan.split_units)));
    plan.tile_units = std::min(shape.tile_units, std::max(1, plan.split_units));
    plan.lanes = 1;
    while (plan.lanes < shape.max_lanes && plan.lanes < plan.tile_units) plan.lanes *= 2;
    for (plan.parts = 1; plan.parts <= kSmallWarps; plan.parts *= 2) {
      if (plan.parts > 1 && (plan.parts / 2) * plan.lanes >= plan.tile_units) break;  // parts with nothing to do
      const int64_t rows = plan.block_rows(shape.warp_rows, shape.max_lanes);
      const int64_t waves = divide_up(divide_up(shape.rows, rows) * plan.splits, slots);
      const int rounds = divide_up(plan.tile_units, plan.lanes);  // of which the slowest part has more than the others
      const double uneven = static_cast<double>(divide_up(rounds, plan.parts) * plan.parts) / rounds;
      const double bytes = static_cast<double>(rows * shape.row_bytes) * uneven + static_cast<double>(shape.x_bytes);
      const double cost = static_cast<double>(waves) * bytes / plan.splits + (plan.splits > 1 ? kSecondKernel : 0.0);
      if (cost < least) least = cost, best = plan;
    }
  }
  return best;
}

}  // namespace nms
