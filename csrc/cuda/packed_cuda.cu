// compress, decompress, check_indices, find_violation: the packed form, and the checks before it is trusted.
#include "../core/dtype_switch.h"
#include "cuda_utils.h"
#include "kernels/compress.cuh"
#include "kernels/decompress.cuh"
#include "kernels/reduce.cuh"

namespace nms {
namespace {

PackedFormat format_of(int64_t n, int64_t m) { return packed_format(static_cast<int>(n), static_cast<int>(m)); }

std::tuple<Tensor, Tensor> compress_cuda(const Tensor& w, int64_t n, int64_t m, int64_t dim, bool pad) {
  check_grouping(w, n, m, dim, pad);
  const DType dtype = dtype_of(w, "w");
  const PackedFormat format = format_of(n, m);
  const int64_t groups = ceil_div(w.size(dim), m);
  Tensor values = new_empty(w, moved_last(sizes_of(w), dim, groups * n), w.scalar_type());
  Tensor indices = new_empty(w, moved_last(sizes_of(w), dim, index_row_bytes(format, groups)), ScalarType::Byte);

  // Rows may be merged where their codes end on a byte.
  const bool whole_bytes = groups * format.group_bits % 8 == 0;
  const Layout layout = layout_of(w, nullptr, dim, whole_bytes ? m : w.size(dim) + 1);
  if (layout.empty()) return {values, indices};
  const OnDevice device(w);
  switch_dtype(dtype, [&](auto d) {
    using Bits = BitsOf<d>;
    const Bits* src = data_of<Bits>(w);
    const auto out_for = [&](int64_t unit) {
      return packed_out(mutable_data_of<Bits>(values), bytes_of(indices), format, layout.k, unit);
    };
    switch_m(format.m, [&](auto fixed_m) {
      using Staged = CompressStaged<d, fixed_m>;
      const int unit = Staged::unit_for(format);
      if (const auto tiles = make_tiles<Bits>(layout, unit, src, nullptr)) {
        launch_staged(Staged{*tiles, src, out_for(unit), format, unit}, device.stream);
      } else {
        const int span = whole_byte_groups(format) * format.m;
        launch_map(CompressStrided<d>{make_spans(layout, span), src, out_for(span), format}, device.stream);
      }
    });
  });
  check_launch();
  return {values, indices};
}

// values [..., groups * n] and indices [..., bytes] of rows of k weights.
void check_packed(const Tensor& indices, int64_t n, int64_t m, int64_t k) {
  check_pattern(n, m);
  NMS_CHECK(k >= 0, "k must not be negative, got ", k);
  NMS_CHECK(indices.scalar_type() == ScalarType::Byte && indices.is_contiguous() && indices.dim() >= 1,
            "indices must be contiguous uint8 with at least one dim");
  const int64_t row_bytes = index_row_bytes(format_of(n, m), ceil_div(k, m));
  NMS_CHECK(indices.size(indices.dim() - 1) == row_bytes, "the last size of indices must be ", row_bytes, ", got ",
            indices.size(indices.dim() - 1));
}

template <class Bits>
void decompress_elements(const Tensor& values, const Tensor& indices, const Tensor& dense, const Layout& layout,
                         PackedFormat format, cudaStream_t stream) {
  launch_map(make_decompress<Bits>(layout, data_of<Bits>(values), const_bytes_of(indices), mutable_data_of<Bits>(dense),
                                   format),
             stream);
}

Tensor decompress_cuda(const Tensor& values, const Tensor& indices, int64_t n, int64_t m, int64_t k, int64_t dim) {
  check_packed(indices, n, m, k);
  dtype_of(values, "values");
  const int64_t groups = ceil_div(k, m);
  NMS_CHECK(values.is_contiguous(), "values must be contiguous");
  NMS_CHECK(0 <= dim && dim < values.dim(), "dim must be in [0, ", values.dim(), "), got ", dim);
  check_same_device(values, indices, "values and indices");
  const int64_t row_bytes = indices.size(indices.dim() - 1);
  NMS_CHECK(values.size(values.dim() - 1) == groups * n &&
                moved_last(sizes_of(values), values.dim() - 1, row_bytes) == sizes_of(indices),
            "values must have the shape of indices, with groups * n = ", groups * n, " as the last size");

  Tensor dense = new_empty(values, moved_back(sizes_of(values), dim, k), values.scalar_type());
  const PackedFormat format = format_of(n, m);
  const bool whole_bytes = groups * format.group_bits % 8 == 0;
  const Layout layout = layout_of(dense, nullptr, dim, whole_bytes ? m : k + 1);
  if (layout.empty()) return dense;
  const OnDevice device(values);
  switch (values.element_size()) {
    case 1:
      decompress_elements<uint8_t>(values, indices, dense, layout, format, device.stream);
      break;
    case 2:
      decompress_elements<uint16_t>(values, indices, dense, layout, format, device.stream);
      break;
    case 4:
      decompress_elements<uint32_t>(values, indices, dense, layout, format, device.stream);
      break;
    default:
      decompress_elements<uint64_t>(values, indices, dense, layout, format, device.stream);
      break;
  }
  check_launch();
  return dense;
}

Tensor check_indices_cuda(const Tensor& indices, int64_t n, int64_t m, int64_t k) {
  check_packed(indices, n, m, k);
  const int64_t row_bytes = indices.size(indices.dim() - 1);
  const int64_t rows = row_bytes == 0 ? 0 : indices.numel() / row_bytes;
  Tensor out = new_empty(indices, {}, ScalarType::Long);
  const OnDevice device(indices);
  const Divisor groups(std::max<int64_t>(1, ceil_div(k, m)));
  launch_reduce<Minimum>(FindBadIndices{const_bytes_of(indices), rows, groups, format_of(n, m)},
                         mutable_data_of<int64_t>(out), device.stream);
  check_launch();
  return out;
}

Tensor find_violation_cuda(const Tensor& w, int64_t n, int64_t m, int64_t dim, bool pad) {
  check_grouping(w, n, m, dim, pad);
  const DType dtype = dtype_of(w, "w");
  Tensor out = new_empty(w, {2}, ScalarType::Long);
  const Layout layout = layout_of(w, nullptr, dim, m);
  const OnDevice device(w);
  auto* result = mutable_data_of<int64_t>(out);
  switch_dtype(dtype, [&](auto d) {
    FindViolation<d> body{{}, data_of<typename Element<d>::Bits>(w), static_cast<int>(n)};
    if (layout.empty())
      body.spans.layout.rows.count = 0;
    else
      body.spans = make_spans(layout, m);
    launch_reduce<Minimum>(body, result, device.stream);
  });
  check_launch();
  split_violation_kernel<<<1, 1, 0, device.stream>>>(result);
  check_launch();
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nmsparse, CUDA, m) {
  m.impl("compress", TORCH_BOX(&compress_cuda));
  m.impl("decompress", TORCH_BOX(&decompress_cuda));
  m.impl("check_indices", TORCH_BOX(&check_indices_cuda));
  m.impl("find_violation", TORCH_BOX(&find_violation_cuda));
}

}  // namespace nms
