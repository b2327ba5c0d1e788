// pack_bits, unpack_bits, apply_bits, add_pruned_, sad: working with packed masks.
#include "../core/dtype_switch.h"
#include "cuda_utils.h"
#include "kernels/bits.cuh"
#include "kernels/reduce.cuh"

namespace nms {
namespace {

Tensor pack_bits_cuda(const Tensor& mask, int64_t dim) {
  NMS_CHECK(mask.scalar_type() == ScalarType::Bool, "mask must be bool");
  NMS_CHECK(0 <= dim && dim < mask.dim(), "dim must be in [0, ", mask.dim(), "), got ", dim);
  Tensor bits = new_bits(mask, dim);
  const Layout layout = layout_of(mask, nullptr, dim, 8);
  if (layout.empty()) return bits;
  const OnDevice device(mask);
  const uint8_t* src = const_bytes_of(mask);
  launch_map(PackBits{make_spans(layout, 8), src, bytes_of(bits), ceil_div(layout.k, 8),
                      whole_bytes_aligned(layout, src, 1, nullptr, 0)},
             device.stream);
  check_launch();
  return bits;
}

Tensor unpack_bits_cuda(const Tensor& bits, int64_t k, int64_t dim) {
  NMS_CHECK(bits.scalar_type() == ScalarType::Byte && bits.is_contiguous(), "bits must be contiguous uint8");
  NMS_CHECK(0 <= dim && dim < bits.dim(), "dim must be in [0, ", bits.dim(), "), got ", dim);
  NMS_CHECK(k >= 0 && bits.size(bits.dim() - 1) == ceil_div(k, 8),
            "the last size of bits must be ceil(k / 8), k = ", k);
  Tensor mask = new_empty(bits, moved_back(sizes_of(bits), dim, k), ScalarType::Bool);
  const Layout layout = layout_of(mask, nullptr, dim, 8);
  if (layout.empty()) return mask;
  const OnDevice device(bits);
  uint8_t* dst = bytes_of(mask);
  launch_map(UnpackBits{make_spans(layout, 8), const_bytes_of(bits), ceil_div(layout.k, 8), dst,
                        whole_bytes_aligned(layout, dst, 1, nullptr, 0)},
             device.stream);
  check_launch();
  return mask;
}

template <class Bits>
void apply_elements(const Tensor& w, const Tensor& bits, const Layout& layout, const Tensor& out, cudaStream_t stream) {
  const Bits* src = data_of<Bits>(w);
  Bits* dst = mutable_data_of<Bits>(out);
  const uint8_t* mask = const_bytes_of(bits);
  const int64_t bits_row = ceil_div(layout.k, 8);
  if (const auto tiles = make_tiles<Bits>(layout, ApplyStaged<Bits>::kUnit, src, dst))
    launch_staged(ApplyStaged<Bits>{*tiles, src, dst, mask, bits_row}, stream);
  else
    launch_map(ApplyStrided<Bits>{make_spans(layout, 8), src, dst, mask, bits_row}, stream);
}

void apply_into(const Tensor& w, const Tensor& bits, int64_t dim, const Tensor& out) {
  dtype_of(w, "w");
  check_bits(bits, w, dim);
  check_writable(out, "w");
  const Layout layout = layout_of(w, &out, dim, 8);
  if (layout.empty()) return;
  const OnDevice device(w);
  switch (w.element_size()) {
    case 1:
      apply_elements<uint8_t>(w, bits, layout, out, device.stream);
      break;
    case 2:
      apply_elements<uint16_t>(w, bits, layout, out, device.stream);
      break;
    case 4:
      apply_elements<uint32_t>(w, bits, layout, out, device.stream);
      break;
    default:
      apply_elements<uint64_t>(w, bits, layout, out, device.stream);
      break;
  }
  check_launch();
}

Tensor apply_bits_cuda(const Tensor& w, const Tensor& bits, int64_t dim) {
  Tensor out = new_like(w);
  apply_into(w, bits, dim, out);
  return out;
}

void apply_bits_inplace_cuda(const Tensor& w, const Tensor& bits, int64_t dim) { apply_into(w, bits, dim, w); }

void add_pruned_inplace_cuda(const Tensor& grad, const Tensor& w, const Tensor& bits, int64_t dim, double alpha,
                             std::optional<Tensor> scale) {
  const DType grad_dtype = gradient_dtype_of(grad, "grad");
  const DType w_dtype = gradient_dtype_of(w, "w");
  check_same_shape(grad, w, "grad and w");
  check_same_device(grad, w, "grad and w");
  check_bits(bits, w, dim);
  check_writable(grad, "grad");
  if (scale) {
    NMS_CHECK(scale->scalar_type() == ScalarType::Float && scale->numel() == 1, "scale must be one float32");
    check_same_device(grad, *scale, "grad and scale");
  }
  const Layout layout = layout_of(grad, &w, dim, 8);
  if (layout.empty()) return;
  const OnDevice device(grad);
  switch_gradient_dtype(grad_dtype, [&](auto g) {
    switch_gradient_dtype(w_dtype, [&](auto d) {
      using GradBits = typename Element<g>::Bits;
      using WeightBits = typename Element<d>::Bits;
      auto* sums = mutable_data_of<GradBits>(grad);
      const auto* weights = data_of<WeightBits>(w);
      launch_map(AddPruned<g, d>{make_spans(layout, 8), sums, weights, const_bytes_of(bits), ceil_div(layout.k, 8),
                                 alpha, scale ? data_of<float>(*scale) : nullptr,
                                 whole_bytes_aligned(layout, sums, sizeof(GradBits), weights, sizeof(WeightBits))},
                 device.stream);
    });
  });
  check_launch();
}

void sad_out_cuda(const Tensor& a, const Tensor& b, const Tensor& out) {
  const bool masks = a.scalar_type() == ScalarType::Bool || a.scalar_type() == ScalarType::Byte;
  NMS_CHECK(masks && a.scalar_type() == b.scalar_type(), "a and b must both be packed bits (uint8) or both be bool");
  NMS_CHECK(a.is_contiguous() && b.is_contiguous(), "a and b must be contiguous");
  NMS_CHECK(out.scalar_type() == ScalarType::Long && out.numel() == 1, "out must be one int64");
  check_same_shape(a, b, "a and b");
  check_same_device(a, b, "a and b");
  check_same_device(a, out, "a and out");
  const OnDevice device(a);
  const uint8_t* x = const_bytes_of(a);
  const uint8_t* y = const_bytes_of(b);
  launch_reduce<Sum>(CountDiffering{x, y, a.numel(), is_aligned(x, kChunkBytes) && is_aligned(y, kChunkBytes)},
                     mutable_data_of<int64_t>(out), device.stream);
  check_launch();
}

Tensor sad_cuda(const Tensor& a, const Tensor& b) {
  Tensor out = new_empty(a, {}, ScalarType::Long);
  sad_out_cuda(a, b, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nmsparse, CUDA, m) {
  m.impl("pack_bits", TORCH_BOX(&pack_bits_cuda));
  m.impl("unpack_bits", TORCH_BOX(&unpack_bits_cuda));
  m.impl("apply_bits", TORCH_BOX(&apply_bits_cuda));
  m.impl("apply_bits_", TORCH_BOX(&apply_bits_inplace_cuda));
  m.impl("add_pruned_", TORCH_BOX(&add_pruned_inplace_cuda));
  m.impl("sad", TORCH_BOX(&sad_cuda));
  m.impl("sad_out", TORCH_BOX(&sad_out_cuda));
}

}  // namespace nms
