// lt_pack, lt_prune_pack: a packed or a dense weight as the blob that sparse tensor cores' software reads.
#include <string>

#include "../core/dtype_switch.h"
#include "../sparse24_arguments.h"
#include "cuda_utils.h"
#include "kernels/sparse24.cuh"

namespace nms {
namespace {

Tensor aligned(const Tensor& t) {  // contiguous, from a 16-byte boundary on
  const Tensor there = as_contiguous(t);
  return is_aligned(there.const_data_ptr(), kChunkBytes) ? there : torch::stable::clone(there);
}

template <DType D, bool kDense>
void launch_pack(const Tensor& src, const Tensor* indices, int64_t rows, int64_t k, MetadataLayout layout,
                 const Tensor& blob) {
  const OnDevice device(src);
  const uint8_t* codes = indices ? const_bytes_of(*indices) : nullptr;
  const int64_t row_units = k * static_cast<int64_t>(src.element_size()) / kPackBytes;
  launch_map(PackSparse24<D, kDense>{layout, const_bytes_of(src), codes, rows, k, Divisor(row_units), bytes_of(blob)},
             device.stream);
  check_launch();
}

Tensor lt_pack_cuda(const Tensor& values, const Tensor& indices, int64_t k, std::string layout) {
  check_lt_pack(values, indices, k, layout);
  const int64_t rows = values.size(0);
  const int bytes = static_cast<int>(values.element_size());
  Tensor blob = new_empty(values, {blob_bytes(rows, k, bytes)}, ScalarType::Byte);
  if (blob.numel() == 0) return blob;
  const Tensor from = aligned(values);
  // Nothing is chosen: one type of each size will do.
  if (bytes == 1)
    launch_pack<DType::kInt8, false>(from, &indices, rows, k, layout_named(layout), blob);
  else if (bytes == 2)
    launch_pack<DType::kFloat16, false>(from, &indices, rows, k, layout_named(layout), blob);
  else
    launch_pack<DType::kFloat32, false>(from, &indices, rows, k, layout_named(layout), blob);
  return blob;
}

Tensor lt_prune_pack_cuda(const Tensor& w, std::string layout) {
  NMS_CHECK(w.dim() == 2, "w must have 2 dimensions, got ", w.dim());
  const int64_t rows = w.size(0), k = w.size(1);
  check_layout(w, "w", rows, k, layout);
  Tensor blob = new_empty(w, {blob_bytes(rows, k, w.element_size())}, ScalarType::Byte);
  if (blob.numel() == 0) return blob;
  const Tensor from = aligned(w);
  switch_dtype(dtype_of(w, "w"), [&](auto d) {
    if constexpr (d != DType::kFloat64) launch_pack<d, true>(from, nullptr, rows, k, layout_named(layout), blob);
  });
  return blob;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nmsparse, CUDA, m) {
  m.impl("lt_pack", TORCH_BOX(&lt_pack_cuda));
  m.impl("lt_prune_pack", TORCH_BOX(&lt_prune_pack_cuda));
}

}  // namespace nms
