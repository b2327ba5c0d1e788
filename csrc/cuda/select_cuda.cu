// prune, mask_bits: choosing what is kept.
#include "../core/dtype_switch.h"
#include "cuda_utils.h"
#include "kernels/select.cuh"

namespace nms {
namespace {

// `out` and `bits` may each be null; `out` may be w itself.
void select_into(const Tensor& w, int64_t n, int64_t m, int64_t dim, const Tensor* out, const Tensor* bits) {
  const DType dtype = dtype_of(w, "w");
  const Layout layout = layout_of(w, out, dim, std::lcm(m, int64_t{8}));
  if (layout.empty()) return;
  const OnDevice device(w);
  const int pattern_n = static_cast<int>(n), pattern_m = static_cast<int>(m);
  const int64_t bits_row = ceil_div(layout.k, 8);
  switch_dtype(dtype, [&](auto d) {
    using Bits = BitsOf<d>;
    const Bits* src = data_of<Bits>(w);
    Bits* dst = out ? mutable_data_of<Bits>(*out) : nullptr;
    uint8_t* mask = bits ? bytes_of(*bits) : nullptr;
    switch_m(pattern_m, [&](auto fixed_m) {
      using Staged = SelectStaged<d, fixed_m>;
      const int unit = Staged::unit_for(pattern_m);
      if (const auto tiles = make_tiles<Bits>(layout, unit, src, dst)) {
        launch_staged(Staged{*tiles, src, dst, mask, bits_row, pattern_n, pattern_m, unit}, device.stream);
      } else {
        const Spans spans = make_spans(layout, std::lcm(m, int64_t{8}));
        launch_map(SelectStrided<d>{spans, src, dst, mask, bits_row, pattern_n, pattern_m}, device.stream);
      }
    });
  });
  check_launch();
}

std::tuple<Tensor, Tensor> prune_cuda(const Tensor& w, int64_t n, int64_t m, int64_t dim, bool pad) {
  check_grouping(w, n, m, dim, pad);
  Tensor out = new_like(w);
  Tensor bits = new_bits(w, dim);
  select_into(w, n, m, dim, &out, &bits);
  return {out, bits};
}

void prune_out_cuda(const Tensor& w, int64_t n, int64_t m, int64_t dim, bool pad, const Tensor& out,
                    std::optional<Tensor> bits) {
  check_grouping(w, n, m, dim, pad);
  check_prune_outputs(w, out, bits, dim);
  select_into(w, n, m, dim, &out, bits ? &*bits : nullptr);
}

void prune_inplace_cuda(const Tensor& w, int64_t n, int64_t m, int64_t dim, bool pad, std::optional<Tensor> bits) {
  prune_out_cuda(w, n, m, dim, pad, w, bits);
}

Tensor mask_bits_cuda(const Tensor& w, int64_t n, int64_t m, int64_t dim, bool pad) {
  check_grouping(w, n, m, dim, pad);
  Tensor bits = new_bits(w, dim);
  select_into(w, n, m, dim, nullptr, &bits);
  return bits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nmsparse, CUDA, m) {
  m.impl("prune", TORCH_BOX(&prune_cuda));
  m.impl("prune_out", TORCH_BOX(&prune_out_cuda));
  m.impl("prune_", TORCH_BOX(&prune_inplace_cuda));
  m.impl("mask_bits", TORCH_BOX(&mask_bits_cuda));
}

}  // namespace nms
