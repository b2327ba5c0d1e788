// group_thresholds, foreach_vote, foreach_add_kept: what DominoSearch does to weights.
#include "../core/dtype_switch.h"
#include "cuda_utils.h"
#include "kernels/reduce.cuh"
#include "kernels/votes.cuh"

namespace nms {
namespace {

using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;

// fn(DTypeConstant) of a weight that has thresholds.
template <class Fn>
void switch_thresholded(const Tensor& w, const Fn& fn) {
  if (w.scalar_type() == ScalarType::Double)
    fn(DTypeConstant<DType::kFloat64>{});
  else
    fn(DTypeConstant<DType::kFloat32>{});
}

Tensor group_thresholds_cuda(const Tensor& w, int64_t m, int64_t dim) {
  check_thresholded(w, m, dim);
  NMS_CHECK(m >= 2, "m must be 2 or more, got ", m);
  Tensor thresholds = new_empty(w, moved_last(sizes_of(w), dim, w.size(dim) / m), w.scalar_type());
  const Layout layout = layout_of(w, nullptr, dim, m);
  if (layout.empty()) return thresholds;
  const OnDevice device(w);
  switch_thresholded(w, [&](auto d) {
    using Bits = typename Element<d>::Bits;
    launch_map(GroupThresholds<d>{make_spans(layout, m), data_of<Bits>(w), mutable_data_of<Bits>(thresholds),
                                  static_cast<int>(m)},
               device.stream);
  });
  check_launch();
  return thresholds;
}

void foreach_vote_cuda(const Tensors& ws, const Tensors& thresholds, const Ints& ns, const Ints& ms, const Ints& dims,
                       const Tensor& counts) {
  for (size_t length : {thresholds.size(), ns.size(), ms.size(), dims.size()})
    NMS_CHECK(length == ws.size(), "all lists must have one entry a weight, got ", length, " and ", ws.size());
  check_counts(counts, ws.size());
  auto* votes = mutable_data_of<int64_t>(counts);
  for (size_t i = 0; i < ws.size(); ++i) {
    check_thresholds(ws[i], thresholds[i], ms[i], dims[i]);
    check_same_device(ws[i], counts, "ws and counts");
    const Layout layout = layout_of(ws[i], nullptr, dims[i], ms[i]);
    const OnDevice device(ws[i]);
    switch_thresholded(ws[i], [&](auto d) {
      using Bits = typename Element<d>::Bits;
      CountVotes<d> body{
          {}, data_of<Bits>(ws[i]), data_of<Bits>(thresholds[i]), static_cast<int>(ns[i]), static_cast<int>(ms[i])};
      if (layout.empty())
        body.spans.layout.rows.count = 0;
      else
        body.spans = make_spans(layout, ms[i]);
      launch_reduce<Sum>(body, votes + i, device.stream);
    });
    check_launch();
  }
}

void add_kept(const Tensor& grad, const Tensor& w, const Tensor& bits, int64_t dim, double alpha,
              const std::optional<Tensor>& scale, const Tensor& out) {
  const DType dtype = gradient_dtype_of(out, "outs");
  const DType w_dtype = gradient_dtype_of(w, "ws");
  const Layout layout = layout_of(out, &w, dim, 8);
  if (layout.empty()) return;
  const OnDevice device(out);
  switch_gradient_dtype(dtype, [&](auto g) {
    switch_gradient_dtype(w_dtype, [&](auto d) {
      using GradBits = typename Element<g>::Bits;
      using WeightBits = typename Element<d>::Bits;
      const auto* sums = data_of<GradBits>(grad);
      auto* results = mutable_data_of<GradBits>(out);
      const auto* weights = data_of<WeightBits>(w);
      const bool aligned = whole_bytes_aligned(layout, sums, sizeof(GradBits), weights, sizeof(WeightBits)) &&
                           whole_bytes_aligned(layout, results, sizeof(GradBits), nullptr, 0);
      launch_map(AddKept<g, d>{make_spans(layout, 8), sums, results, weights, const_bytes_of(bits),
                               ceil_div(layout.k, 8), alpha, scale ? data_of<float>(*scale) : nullptr, aligned},
                 device.stream);
    });
  });
  check_launch();
}

void foreach_add_kept_cuda(const Tensors& grads, const Tensors& ws, const Tensors& bits, const Ints& dims,
                           const std::vector<double>& alphas, std::optional<Tensor> scale, const Tensors& outs) {
  for (size_t length : {grads.size(), bits.size(), dims.size(), alphas.size(), outs.size()})
    NMS_CHECK(length == ws.size(), "all lists must have one entry a weight, got ", length, " and ", ws.size());
  for (size_t i = 0; i < ws.size(); ++i) {
    check_bits(bits[i], ws[i], dims[i]);
    check_same_shape(grads[i], ws[i], "grads and ws");
    check_same_device(grads[i], ws[i], "grads and ws");
    check_same_shape(outs[i], ws[i], "outs and ws");
    check_same_device(outs[i], ws[i], "outs and ws");
    check_writable(outs[i], "outs");
    if (scale) {
      NMS_CHECK(scale->scalar_type() == ScalarType::Float && scale->numel() == 1, "scale must be one float32");
      check_same_device(outs[i], *scale, "outs and scale");
    }
    Tensor grad = grads[i];
    const bool alike = grad.scalar_type() == outs[i].scalar_type() && strides_of(grad) == strides_of(outs[i]);
    if (!alike) {
      Tensor target = outs[i];
      torch::stable::copy_(target, grad);
      grad = outs[i];
    }
    add_kept(grad, ws[i], bits[i], dims[i], alphas[i], scale, outs[i]);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nmsparse, CUDA, m) {
  m.impl("group_thresholds", TORCH_BOX(&group_thresholds_cuda));
  m.impl("foreach_vote", TORCH_BOX(&foreach_vote_cuda));
  m.impl("foreach_add_kept", TORCH_BOX(&foreach_add_kept_cuda));
}

}  // namespace nms
