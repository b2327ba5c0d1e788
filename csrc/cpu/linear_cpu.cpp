// panel_pack, panel_restore, panel_unpack, panel_linear: the packed product of linear layers.
#include <algorithm>
#include <string>

#include "../core/packed.h"
#include "../packed_arguments.h"
#include "../torch_utils.h"
#include "kernels/kernels.h"
#include "kernels/linear.h"
#include "kernels/linear_pack.h"
#include "panel_arguments.h"
#include "panel_product.h"
#include "workspace.h"

namespace nms {
namespace {

PanelForm form_of(const Tensor& value_panels, const Tensor& index_panels, int64_t n, int64_t m, int64_t rows,
                  int64_t k) {
  PanelForm form;
  form.values = value_panels.mutable_data_ptr();
  form.indices = static_cast<uint32_t*>(index_panels.mutable_data_ptr());
  form.element_size = static_cast<int>(value_panels.element_size());
  form.rows = rows;
  form.k = k;
  form.layout = layout_of(value_panels, n, m, k);
  return form;
}

// ---- panel_pack, panel_restore, panel_unpack ----

std::tuple<Tensor, Tensor> panel_pack_cpu(const Tensor& values, const Tensor& indices, int64_t n, int64_t m,
                                          int64_t k) {
  check_panel_pattern(n, m);
  NMS_CHECK(k >= 0, "k must not be negative, got ", k);
  check_panel_values(values, "values");
  check_packed_rows(values, indices, n, m, k);
  const int64_t rows = values.size(0);

  const PanelLayout layout = layout_of(values, n, m, k);
  Tensor value_panels = new_weight(values, value_sizes(layout, rows), values.scalar_type());
  Tensor index_panels = new_weight(values, index_sizes(layout, rows), ScalarType::Int);
  const PanelForm form = form_of(value_panels, index_panels, n, m, rows, k);
  const int64_t grain = ceil_div(kThreadWork, std::max<int64_t>(1, layout.panel_values()));
  torch::stable::parallel_for(0, panel_count(rows), grain, [&](int64_t begin, int64_t end) {
    kernels().pack_panels(form, values.const_data_ptr(), const_bytes_of(indices), begin, end);
  });
  return {value_panels, index_panels};
}

std::tuple<Tensor, Tensor> panel_restore_cpu(const Tensor& value_panels, const Tensor& index_panels, int64_t n,
                                             int64_t m, int64_t rows, int64_t k) {
  check_panel_shapes(value_panels, index_panels, n, m, rows, k);
  const int64_t groups = ceil_div(k, m);
  const PackedFormat format = packed_format(static_cast<int>(n), static_cast<int>(m));
  Tensor values = new_empty(value_panels, {rows, groups * n}, value_panels.scalar_type());
  Tensor indices = new_empty(value_panels, {rows, index_row_bytes(format, groups)}, ScalarType::Byte);
  const PanelForm form = form_of(value_panels, index_panels, n, m, rows, k);
  const int64_t grain = ceil_div(kThreadWork, std::max<int64_t>(1, form.layout.panel_values()));
  torch::stable::parallel_for(0, panel_count(rows), grain, [&](int64_t begin, int64_t end) {
    restore_panels(form, values.mutable_data_ptr(), static_cast<uint8_t*>(indices.mutable_data_ptr()), begin, end);
  });
  return {values, indices};
}

Tensor panel_unpack_cpu(const Tensor& value_panels, const Tensor& index_panels, int64_t n, int64_t m, int64_t rows,
                        int64_t k) {
  check_panel_shapes(value_panels, index_panels, n, m, rows, k);
  Tensor dense = new_empty(value_panels, {rows, k}, value_panels.scalar_type());
  prefer_huge_pages(dense);
  const PanelForm form = form_of(value_panels, index_panels, n, m, rows, k);
  const int64_t grain = ceil_div(kThreadWork, std::max<int64_t>(1, k));
  torch::stable::parallel_for(0, panel_count(rows), grain, [&](int64_t begin, int64_t end) {
    kernels().unpack_panels(form, dense.mutable_data_ptr(), begin, end);
  });
  return dense;
}

// ---- panel_linear ----

Tensor panel_linear_cpu(const Tensor& x, const Tensor& value_panels, const Tensor& index_panels,
                        std::optional<Tensor> bias, int64_t n, int64_t m, int64_t rows, int64_t k,
                        std::string activation) {
  check_panels(value_panels, index_panels, n, m, rows, k);
  NMS_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == k, "the last size of x must be k = ", k, ", got shape ",
            shape_text(x));
  check_product_operands(x, value_panels, bias, rows);
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = rows;
  Tensor y = new_empty(x, sizes, x.scalar_type());
  if (y.numel() == 0) return y;

  const LinearTable& table = kernels().linear;
  const DType dtype = dtype_of(x, "x");
  const InputRows input = input_rows(x);
  LinearProblem problem;
  problem.kernels = &table.of[static_cast<int>(dtype)];
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
  problem.activation = activation_of(activation);
  choose_blocks(problem, torch::stable::get_num_threads());

  multiply_in_parallel(problem);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nmsparse, CPU, m) {
  m.impl("panel_pack", TORCH_BOX(&panel_pack_cpu));
  m.impl("panel_restore", TORCH_BOX(&panel_restore_cpu));
  m.impl("panel_unpack", TORCH_BOX(&panel_unpack_cpu));
  m.impl("panel_linear", TORCH_BOX(&panel_linear_cpu));
  m.impl("panel_linear.without_gradients", TORCH_BOX(&panel_linear_cpu));  // defined in _ops.py
}

}  // namespace nms
