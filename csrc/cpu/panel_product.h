// What the ops that multiply rows of x with panels have in common.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../torch_utils.h"
#include "kernels/linear.h"
#include "panel_arguments.h"
#include "workspace.h"

namespace nms {

// x [..., k] as rows one stride apart.
struct __attribute__((visibility("hidden"))) InputRows {
  Tensor x;
  int64_t row = 0, k = 1;  // strides in elements
};

inline InputRows input_rows(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  InputRows rows{x, last > 0 ? x.stride(last - 1) : 0, x.stride(last)};
  for (int64_t d = last - 1; d > 0; --d) {
    if (x.stride(d - 1) != x.stride(d) * x.size(d) && x.size(d - 1) != 1) {
      rows.x = torch::stable::contiguous(x);
      rows.row = x.size(last);
      rows.k = 1;
      break;
    }
  }
  return rows;
}

// Rows of packed x, with those that fill up the last tile.
inline int64_t packed_rows(const LinearProblem& problem) {
  const BatchTiles tiles(problem.batch, problem.kernels->max_tile_rows(problem.layout));
  const int64_t last = tiles.count() - 1;
  return tiles.first_row(last) + tiles.tile_rows(last);
}

// All blocks of the product, in parallel.
inline void multiply_in_parallel(const LinearProblem& problem) {
  const PanelLayout& layout = problem.layout;
  const int64_t blocks = block_count(problem);
  const int64_t lanes = problem.int8.weight_scales ? layout.halves : 1;
  const int64_t work = problem.panels * layout.steps * layout.slots * lanes * problem.batch;
  const int64_t grain = std::max<int64_t>(1, kThreadWork * blocks / std::max<int64_t>(1, work));
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    thread_local Workspace workspace;
    multiply_blocks(problem, begin, end, workspace.get(block_memory(problem)));
    workspace.release_large();
  });
}

}  // namespace nms
