// small_batch_linear: few tokens times a packed weight, which is read as it is stored.
#include <string>

#include "../core/packed.h"
#include "../packed_arguments.h"
#include "cuda_utils.h"
#include "epilogue_arguments.h"
#include "kernels/small_batch_launch.cuh"

namespace nms {
namespace {

constexpr int64_t kMaxInputs = int64_t{1} << 30;  // units are counted in 32 bits

int multiprocessors(const Tensor& t) {
  int count = 0;
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, t.get_device_index());
  return count;
}

Tensor small_batch_linear_cuda(const Tensor& x, const Tensor& values, const Tensor& indices,
                               std::optional<Tensor> scales, std::optional<Tensor> bias, int64_t n, int64_t m,
                               int64_t k, std::string activation) {
  check_pattern(n, m);
  const ScalarType type = x.scalar_type();
  NMS_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, "x must be bfloat16 or float16");
  NMS_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == k, "the last size of x must be k = ", k, ", got shape ",
            shape_text(x));
  NMS_CHECK(k <= kMaxInputs, "k must be at most 2^30, got ", k);
  const bool int8 = values.scalar_type() == ScalarType::Char;
  NMS_CHECK(int8 || values.scalar_type() == type, "values must have the dtype of x, or be int8");
  NMS_CHECK(scales.has_value() == int8, "scales go with int8 values, and with no others");
  check_packed_rows(values, indices, n, m, k);
  const int64_t rows = values.size(0);
  check_same_device(x, values, "x and values");
  check_vector(scales, "scales", rows, ScalarType::Float, x);
  check_vector(bias, "bias", rows, type, x);

  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = rows;
  SmallProblem p{};
  p.tokens = k == 0 ? product(sizes) / std::max<int64_t>(1, rows) : x.numel() / k;
  p.rows = rows;
  p.k = k;
  if (p.tokens == 0 || rows == 0) return new_empty(x, sizes, type);
  if (k == 0) {  // no products: what an epilogue makes of zeros
    Tensor zeros = torch::stable::new_zeros(x, sizes);
    const OnDevice device(x);
    launch_epilogue(zeros, zeros, scales, bias, activation_named(activation), device.stream);
    return zeros;
  }

  // Rows of x one stride apart; the rest of its dims must lie one after the other.
  Tensor input = x;
  bool in_rows = x.stride(x.dim() - 1) == 1;
  for (int64_t d = x.dim() - 2; d > 0; --d) in_rows = in_rows && x.stride(d - 1) == x.stride(d) * x.size(d);
  if (!in_rows) input = torch::stable::contiguous(x);
  p.x = data_of<uint16_t>(input);
  // Not the copy's own strides: what has a dim of size 1 may count as contiguous as it is, with any stride there.
  p.x_row = in_rows && x.dim() > 1 ? x.stride(x.dim() - 2) : k;
  p.values = const_bytes_of(values);
  p.indices = const_bytes_of(indices);
  p.format = packed_format(static_cast<int>(n), static_cast<int>(m));
  p.int8 = int8;
  p.multiprocessors = multiprocessors(x);
  p.out.scales = scales ? data_of<float>(*scales) : nullptr;
  p.out.bias = bias ? data_of<uint16_t>(*bias) : nullptr;
  p.out.activation = activation_named(activation);

  const bool bfloat16 = type == ScalarType::BFloat16;
  const SmallPlan plan = bfloat16 ? plan_small_bfloat16(p) : plan_small_float16(p);
  // The splits' sums stand behind the result, in one allocation with it: so they belong to this call alone, whatever
  // streams and graphs run beside it.
  const int64_t elements = p.tokens * rows;
  const int64_t behind = plan.splits > 1 ? 2 * plan.splits * elements + 8 : 0;
  Tensor memory = plan.splits > 1 ? new_empty(x, {elements + behind}, type) : new_empty(x, sizes, type);
  p.out.y = mutable_data_of<uint16_t>(memory);
  float* workspace = nullptr;
  if (plan.splits > 1) workspace = reinterpret_cast<float*>(p.out.y + round_up(elements, int64_t{8}));
  const OnDevice device(x);
  (bfloat16 ? launch_small_bfloat16 : launch_small_float16)(p, plan, workspace, device.stream);
  check_launch();
  if (plan.splits == 1) return memory;
  return torch::stable::view(torch::stable::narrow(memory, 0, 0, elements), sizes);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nmsparse, CUDA, m) { m.impl("small_batch_linear", TORCH_BOX(&small_batch_linear_cuda)); }

}  // namespace nms
