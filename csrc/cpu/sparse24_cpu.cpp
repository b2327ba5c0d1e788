// lt_pack: a packed 2:4 weight as the blob that sparse tensor cores' software reads.
#include <cstring>
#include <string>

#include "../core/packed.h"
#include "../torch_utils.h"
#include "kernels/sparse24.h"

namespace nms {
namespace {

MetadataLayout layout_named(const std::string& name) {
  NMS_CHECK(name == "cutlass" || name == "sm80" || name == "sm90",
            "layout must be \"cutlass\", \"sm80\" or \"sm90\", got \"", name, "\"");
  return name == "cutlass" ? MetadataLayout::kCutlass : name == "sm80" ? MetadataLayout::kSm80 : MetadataLayout::kSm90;
}

Tensor lt_pack_cpu(const Tensor& values, const Tensor& indices, int64_t k, std::string layout_name) {
  const MetadataLayout layout = layout_named(layout_name);
  const int bytes = static_cast<int>(values.element_size());
  NMS_CHECK(dtype_of(values, "values") != DType::kFloat64, "values must not be float64");
  NMS_CHECK(values.dim() == 2 && values.is_contiguous() && values.size(1) * 2 == k,
            "values must be contiguous [rows, k / 2] with k = ", k);
  const int64_t rows = values.size(0), groups = k / (bytes == 4 ? 2 : 4);
  const MetadataMultiples need = metadata_multiples(layout, bytes);
  NMS_CHECK(need.rows != 0, "layout ", layout_name, " is of 16-bit weights");
  NMS_CHECK(rows % need.rows == 0 && groups % need.groups == 0, "layout ", layout_name, " needs rows in multiples of ",
            need.rows, " and k in multiples of ", need.groups * (bytes == 4 ? 2 : 4), ", got [", rows, ", ", k, "]");
  const PackedFormat format = bytes == 4 ? packed_format(1, 2) : packed_format(2, 4);
  NMS_CHECK(indices.scalar_type() == ScalarType::Byte && indices.is_contiguous() && indices.dim() == 2 &&
                indices.size(0) == rows && indices.size(1) == index_row_bytes(format, groups),
            "indices must be contiguous uint8 [", rows, ", ", index_row_bytes(format, groups), "]");
  check_same_device(values, indices, "values and indices");

  const int64_t value_bytes = values.numel() * bytes;
  Tensor blob = new_empty(values, {value_bytes + rows * groups / 2}, ScalarType::Byte);
  if (blob.numel() == 0) return blob;
  std::memcpy(bytes_of(blob), const_bytes_of(values), static_cast<size_t>(value_bytes));
  write_metadata(layout, bytes, const_bytes_of(indices), rows, k, bytes_of(blob) + value_bytes);
  return blob;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nmsparse, CPU, m) { m.impl("lt_pack", TORCH_BOX(&lt_pack_cpu)); }

}  // namespace nms
