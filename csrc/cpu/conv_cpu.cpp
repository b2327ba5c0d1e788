// panel_conv: the packed product of convolutions.
#include <algorithm>
#include <string>

#include "../core/conv_shape.h"
#include "../torch_utils.h"
#include "kernels/conv.h"
#include "kernels/kernels.h"
#include "panel_arguments.h"
#include "workspace.h"

namespace nms {
namespace {

using Sizes = std::vector<int64_t>;

// The geometry, of 1 to 3 dims, with missing ones in front.
ConvShape conv_shape(const Tensor& x, const Sizes& kernel, const Sizes& stride, const Sizes& padding,
                     const Sizes& dilation) {
  const int64_t dims = static_cast<int64_t>(kernel.size());
  NMS_CHECK(1 <= dims && dims <= kMaxConvDims, "kernel must have 1 to 3 sizes, got ", dims);
  NMS_CHECK(static_cast<int64_t>(stride.size()) == dims && static_cast<int64_t>(dilation.size()) == dims,
            "stride and dilation must have ", dims, " sizes, as kernel has");
  NMS_CHECK(static_cast<int64_t>(padding.size()) == 2 * dims, "padding must have ", 2 * dims,
            " sizes, before and after each dim");
  NMS_CHECK(x.dim() == dims + 2, "x must have ", dims + 2, " dimensions, got ", x.dim());
  ConvShape shape;
  shape.batch = x.size(0);
  for (int64_t d = 0; d < kMaxConvDims; ++d) {
    const int64_t i = d - (kMaxConvDims - dims);
    const bool missing = i < 0;
    const size_t at = static_cast<size_t>(missing ? 0 : i);
    shape.in[d] = missing ? 1 : x.size(i + 1);
    shape.kernel[d] = missing ? 1 : kernel[at];
    shape.stride[d] = missing ? 1 : stride[at];
    shape.dilation[d] = missing ? 1 : dilation[at];
    shape.padding[d] = missing ? 0 : padding[2 * at];
    const int64_t after = missing ? 0 : padding[2 * at + 1];
    NMS_CHECK(shape.kernel[d] > 0 && shape.stride[d] > 0 && shape.dilation[d] > 0,
              "kernel, stride and dilation must be positive");
    NMS_CHECK(shape.padding[d] >= 0 && after >= 0, "padding must not be negative");
    shape.out[d] =
        conv_output_size(shape.in[d], shape.kernel[d], shape.stride[d], shape.dilation[d], shape.padding[d], after);
    NMS_CHECK(shape.out[d] > 0, "the kernel is larger than x with its padding along dim ", i);
  }
  return shape;
}

Tensor panel_conv_cpu(const Tensor& x, const Tensor& value_panels, const Tensor& index_panels,
                      std::optional<Tensor> bias, std::optional<Tensor> residual, int64_t n, int64_t m, int64_t rows,
                      int64_t k, Sizes kernel, Sizes stride, Sizes padding, Sizes dilation, int64_t groups,
                      std::string activation) {
  const ConvShape shape = conv_shape(x, kernel, stride, padding, dilation);
  check_panel_pattern(n, m);
  NMS_CHECK(rows >= 0 && k >= 0, "rows and k must not be negative, got ", rows, " and ", k);
  const bool paired = value_panels.scalar_type() == ScalarType::BFloat16;
  const int64_t row = shape.taps() * tap_inputs(static_cast<int>(n), static_cast<int>(m), k, shape.taps(), paired);
  check_panels(value_panels, index_panels, n, m, rows, row);
  NMS_CHECK(groups == 1 || (groups > 1 && rows % (groups * kPanelRows) == 0), "each of ", groups,
            " groups must have a multiple of 16 outputs, of ", rows, " in all");
  const int64_t last = x.dim() - 1;
  NMS_CHECK(x.size(last) == groups * k, "the last size of x must be groups * k = ", groups * k);
  check_product_operands(x, value_panels, bias, rows);

  Sizes sizes = sizes_of(x);
  for (int64_t d = 1; d < last; ++d) sizes[static_cast<size_t>(d)] = shape.out[kMaxConvDims - last + d];
  sizes.back() = rows;
  if (residual) {
    NMS_CHECK(has_sizes(*residual, sizes) && residual->scalar_type() == x.scalar_type(),
              "residual must have the shape of the result and the dtype of x");
    check_same_device(x, *residual, "x and residual");
    residual = as_contiguous(*residual);
  }
  Tensor y = new_empty(x, sizes, x.scalar_type());
  if (y.numel() == 0) return y;

  const Tensor image = x.stride(last) == 1 || x.size(last) <= 1 ? x : torch::stable::contiguous(x);
  ConvProblem problem;
  problem.kernels = &kernels().linear.of[static_cast<int>(dtype_of(x, "x"))];
  const ConvKernels& conv = kernels().conv.of[static_cast<int>(dtype_of(x, "x"))];
  problem.layout = layout_of(value_panels, n, m, row);
  problem.tile = conv.tile;
  problem.decoded = conv.indices(problem.layout);
  problem.values = value_panels.const_data_ptr();
  problem.indices = static_cast<const uint32_t*>(index_panels.const_data_ptr());
  problem.shape = shape;
  problem.groups = groups;
  problem.inputs = k;
  problem.outputs = rows;
  problem.x = image.const_data_ptr();
  problem.x_image = image.stride(0);
  for (int64_t d = 0; d < kMaxConvDims; ++d) {
    const int64_t dim = d - kMaxConvDims + last;
    problem.x_place[d] = dim < 1 ? 0 : image.stride(dim);
  }
  problem.bias = bias ? bias->const_data_ptr() : nullptr;
  problem.residual = residual ? residual->const_data_ptr() : nullptr;
  problem.y = y.mutable_data_ptr();
  problem.element_size = static_cast<int>(x.element_size());
  problem.activation = activation_of(activation);
  choose_conv_blocks(problem, torch::stable::get_num_threads());

  const int64_t blocks = conv_block_count(problem);
  const int64_t work = panel_count(rows) * problem.layout.steps * problem.layout.slots * shape.pixels();
  const int64_t grain = std::max<int64_t>(1, kThreadWork * blocks / std::max<int64_t>(1, work));
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    thread_local Workspace workspace;
    uint8_t* memory = workspace.get(conv_block_memory(problem));
    for (int64_t i = begin; i < end; ++i) conv_block(problem, i, memory);
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nmsparse, CPU, m) { m.impl("panel_conv", TORCH_BOX(&panel_conv_cpu)); }

}  // namespace nms
