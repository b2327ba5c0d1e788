// panel_matmul: x @ W for packed weights, the gradient of a linear layer's input.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "../torch_utils.h"
#include "kernels/kernels.h"
#include "kernels/matmul.h"
#include "panel_arguments.h"
#include "panel_product.h"
#include "workspace.h"

namespace nms {
namespace {

Tensor panel_matmul_cpu(const Tensor& x, const Tensor& value_panels, const Tensor& index_panels, int64_t n, int64_t m,
                        int64_t rows, int64_t k) {
  check_panels(value_panels, index_panels, n, m, rows, k);
  NMS_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == rows, "the last size of x must be rows = ", rows, ", got shape ",
            shape_text(x));
  std::optional<Tensor> no_bias;
  check_product_operands(x, value_panels, no_bias, rows);
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = k;
  Tensor y = new_empty(x, sizes, x.scalar_type());
  if (y.numel() == 0) return y;

  const InputRows input = input_rows(x);
  MatmulProblem problem;
  problem.kernels = &kernels().matmul.of[static_cast<int>(dtype_of(x, "x"))];
  problem.layout = layout_of(value_panels, n, m, k);
  problem.values = value_panels.const_data_ptr();
  problem.indices = static_cast<const uint32_t*>(index_panels.const_data_ptr());
  problem.rows = rows;
  problem.k = k;
  problem.batch = y.numel() / k;
  problem.x = input.x.const_data_ptr();
  problem.x_row = input.row;
  problem.x_r = input.k;
  problem.y = y.mutable_data_ptr();
  problem.element_size = static_cast<int>(x.element_size());

  thread_local Workspace packed_memory;
  uint8_t* packed = packed_memory.get(problem.blocks() * problem.packed_block_bytes());
  const int64_t pack_grain = ceil_div(kThreadWork, std::max<int64_t>(1, problem.packed_block_bytes() / 64));
  torch::stable::parallel_for(0, problem.blocks(), pack_grain,
                              [&](int64_t begin, int64_t end) { pack_matmul_input(problem, begin, end, packed); });
  const int64_t strip_work = problem.blocks() * kBlockUnits * (problem.batch + 16);
  torch::stable::parallel_for(0, problem.strips(), ceil_div(kThreadWork, std::max<int64_t>(1, strip_work)),
                              [&](int64_t begin, int64_t end) {
                                thread_local Workspace workspace;
                                multiply_strips(problem, packed, begin, end, workspace.get(strip_memory(problem)));
                              });
  packed_memory.release_large();
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nmsparse, CPU, m) { m.impl("panel_matmul", TORCH_BOX(&panel_matmul_cpu)); }

}  // namespace nms
