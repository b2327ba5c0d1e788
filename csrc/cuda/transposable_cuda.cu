// transposable_bits: the best 2:4 mask in rows and columns.
#include "../core/dtype_switch.h"
#include "cuda_utils.h"
#include "kernels/transposable.cuh"

namespace nms {
namespace {

Tensor transposable_bits_cuda(const Tensor& w) {
  NMS_CHECK(w.dim() == 2 && w.size(0) % 4 == 0 && w.size(1) % 4 == 0, "w must be 2-D with both sizes multiples of 4");
  const DType dtype = dtype_of(w, "w");
  Tensor bits = new_bits(w, 1);
  if (w.numel() == 0) return bits;
  const OnDevice device(w);
  switch_dtype(dtype, [&](auto d) {
    launch_map(make_select_transposable<d>(data_of<typename Element<d>::Bits>(w), w.stride(0), w.stride(1), w.size(0),
                                           w.size(1), bytes_of(bits)),
               device.stream);
  });
  check_launch();
  return bits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nmsparse, CUDA, m) { m.impl("transposable_bits", TORCH_BOX(&transposable_bits_cuda)); }

}  // namespace nms
