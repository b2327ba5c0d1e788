// panel_linear_int8: the packed product of linear layers in integers.
#include <algorithm>
#include <string>

#include "../core/quantize.h"
#include "../torch_utils.h"
#include "kernels/kernels.h"
#include "panel_arguments.h"
#include "panel_product.h"
#include "workspace.h"

namespace nms {
namespace {

void check_row_operand(const Tensor& t, const char* name, ScalarType type, const char* type_name, int64_t rows,
                       const Tensor& value_panels) {
  NMS_CHECK(t.scalar_type() == type && t.is_contiguous() &&
                sizes_of(t) == std::vector<int64_t>({panel_count(rows), kPanelRows}),
            name, " must be contiguous ", type_name, " [", panel_count(rows), ", ", kPanelRows, "]");
  check_same_device(t, value_panels, (std::string(name) + " and value_panels").c_str());
}

// Rows of x to packed tiles, in parallel.
void quantize_rows(const LinearProblem& problem, const Int8Kernels& kernels, float* scales, uint8_t* packed) {
  const BatchTiles tiles(problem.batch, kernels.linear.max_tile_rows(problem.layout));
  const int64_t row_bytes = packed_row_bytes(problem);
  const int64_t tile_rows = tiles.tile_rows(0), rows = packed_rows(problem);
  const int64_t grain = ceil_div(kThreadWork, std::max<int64_t>(1, problem.k));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const bool fills = row >= problem.batch;
      const int64_t tile = std::min(row / tile_rows, tiles.count() - 1);
      QuantizeRow q;
      q.x = fills ? nullptr : static_cast<const uint8_t*>(problem.x) + row * problem.x_row * problem.element_size;
      q.x_k = problem.x_k;
      q.k = fills ? 0 : problem.k;
      q.row = static_cast<int>(row - tiles.first_row(tile));
      q.tile_rows = tiles.tile_rows(tile);
      q.packed = packed + tiles.first_row(tile) * row_bytes;
      q.scale = fills ? nullptr : scales + row;
      q.layout = &problem.layout;
      kernels.quantize(q);
    }
  });
}

Tensor panel_linear_int8_cpu(const Tensor& x, const Tensor& value_panels, const Tensor& index_panels,
                             const Tensor& scales, const Tensor& sums, std::optional<Tensor> bias, int64_t n, int64_t m,
                             int64_t rows, int64_t k, std::string activation) {
  NMS_CHECK(value_panels.scalar_type() == ScalarType::Char, "value_panels must be int8");
  check_panel_shapes(value_panels, index_panels, n, m, rows, k);
  check_row_operand(scales, "scales", ScalarType::Float, "float32", rows, value_panels);
  check_row_operand(sums, "sums", ScalarType::Int, "int32", rows, value_panels);
  NMS_CHECK(ceil_div(k, m) * n <= kMaxInt8Kept, "rows must keep at most ", kMaxInt8Kept,
            " weights for sums in 32 bits, got k = ", k, " in ", n, ":", m);
  NMS_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == k, "the last size of x must be k = ", k, ", got shape ",
            shape_text(x));
  const ScalarType type = x.scalar_type();
  NMS_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
            "x must be float32, bfloat16 or float16");
  check_same_device(x, value_panels, "x and value_panels");
  check_product_operands(x, x, bias, rows);
  const Activation chosen = activation_of(activation);
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = rows;
  Tensor y = new_empty(x, sizes, type);
  if (y.numel() == 0) return y;

  const Int8Kernels& kernels = nms::kernels().int8.of[static_cast<int>(dtype_of(x, "x"))];
  const InputRows input = input_rows(x);
  LinearProblem problem;
  problem.kernels = &kernels.linear;
  problem.layout = layout_of(value_panels, n, m, k);
  problem.values = value_panels.const_data_ptr();
  problem.indices = static_cast<const uint32_t*>(index_panels.const_data_ptr());
  problem.rows = rows;
  problem.panels = panel_count(rows);
  problem.batch = y.numel() / rows;
  problem.k = k;
  problem.x = input.x.const_data_ptr();
  problem.x_row = input.row;
  problem.x_k = input.k;
  problem.bias = bias ? bias->const_data_ptr() : nullptr;
  problem.y = y.mutable_data_ptr();
  problem.element_size = static_cast<int>(x.element_size());
  problem.activation = chosen;
  problem.int8.weight_scales = static_cast<const float*>(scales.const_data_ptr());
  problem.int8.weight_sums = static_cast<const int32_t*>(sums.const_data_ptr());
  choose_blocks(problem, torch::stable::get_num_threads());

  thread_local Workspace workspace;
  const int64_t tile_bytes = packed_rows(problem) * packed_row_bytes(problem);
  uint8_t* packed = workspace.get(tile_bytes + problem.batch * static_cast<int64_t>(sizeof(float)));
  float* x_scales = reinterpret_cast<float*>(packed + tile_bytes);
  quantize_rows(problem, kernels, x_scales, packed);
  problem.packed_x = packed;
  problem.int8.x_scales = x_scales;
  multiply_in_parallel(problem);
  workspace.release_large();
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nmsparse, CPU, m) { m.impl("panel_linear_int8", TORCH_BOX(&panel_linear_int8_cpu)); }

}  // namespace nms
