// transposable_bits, transposable_pack: the best 2:4 mask in rows and columns, and both weights packed with it.
#include <tuple>

#include "../core/dtype_switch.h"
#include "cuda_utils.h"
#include "kernels/transposable_pack.cuh"

namespace nms {
namespace {

void check_transposable(const Tensor& w) {
  NMS_CHECK(w.dim() == 2 && w.size(0) % 4 == 0 && w.size(1) % 4 == 0, "w must be 2-D with both sizes multiples of 4");
  dtype_of(w, "w");
}

template <DType D>
SelectTransposable<D> selection(const Tensor& w, const Tensor& bits) {
  return make_select_transposable<D>(data_of<typename Element<D>::Bits>(w), w.stride(0), w.stride(1), w.size(0),
                                     w.size(1), bytes_of(bits));
}

Tensor transposable_bits_cuda(const Tensor& w) {
  check_transposable(w);
  Tensor bits = new_bits(w, 1);
  if (w.numel() == 0) return bits;
  const OnDevice device(w);
  switch_dtype(dtype_of(w, "w"), [&](auto d) { launch_map(selection<d>(w, bits), device.stream); });
  check_launch();
  return bits;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> transposable_pack_cuda(const Tensor& w) {
  check_transposable(w);
  const int64_t rows = w.size(0), cols = w.size(1);
  Tensor values = new_empty(w, {rows, cols / 2}, w.scalar_type());
  Tensor indices = new_empty(w, {rows, ceil_div(cols, 8)}, ScalarType::Byte);
  Tensor values_t = new_empty(w, {cols, rows / 2}, w.scalar_type());
  Tensor indices_t = new_empty(w, {cols, ceil_div(rows, 8)}, ScalarType::Byte);
  Tensor bits = new_bits(w, 1);
  if (w.numel() > 0) {
    const OnDevice device(w);
    switch_dtype(dtype_of(w, "w"), [&](auto d) {
      using Bits = BitsOf<d>;
      launch_map(make_pack_transposable<d>(selection<d>(w, bits), mutable_data_of<Bits>(values), bytes_of(indices),
                                           mutable_data_of<Bits>(values_t), bytes_of(indices_t)),
                 device.stream);
    });
    check_launch();
  }
  return {values, indices, values_t, indices_t, bits};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nmsparse, CUDA, m) {
  m.impl("transposable_bits", TORCH_BOX(&transposable_bits_cuda));
  m.impl("transposable_pack", TORCH_BOX(&transposable_pack_cuda));
}

}  // namespace nms
