// What lt_pack and lt_prune_pack check, on the CPU and on CUDA.
#pragma once

#include <string>

#include "core/packed.h"
#include "core/sparse24.h"
#include "torch_utils.h"

namespace nms {

inline MetadataLayout layout_named(const std::string& name) {
  NMS_CHECK(name == "cutlass" || name == "sm80" || name == "sm90",
            "layout must be \"cutlass\", \"sm80\" or \"sm90\", got \"", name, "\"");
  return name == "cutlass" ? MetadataLayout::kCutlass : name == "sm80" ? MetadataLayout::kSm80 : MetadataLayout::kSm90;
}

// That a weight [rows, k] of t's type has the layout.
inline void check_layout(const Tensor& t, const char* name, int64_t rows, int64_t k, const std::string& layout) {
  NMS_CHECK(dtype_of(t, name) != DType::kFloat64, name, " must not be float64");
  const int bytes = static_cast<int>(t.element_size());
  const MetadataMultiples need = metadata_multiples(layout_named(layout), bytes);
  NMS_CHECK(need.rows != 0, "layout ", layout, " is of 16-bit weights");
  const int64_t inputs = need.groups * (bytes == 4 ? 2 : 4);
  NMS_CHECK(rows % need.rows == 0 && k % inputs == 0, "layout ", layout, " needs rows in multiples of ", need.rows,
            " and k in multiples of ", inputs, ", got [", rows, ", ", k, "]");
}

inline void check_lt_pack(const Tensor& values, const Tensor& indices, int64_t k, const std::string& layout) {
  layout_named(layout);
  const int bytes = static_cast<int>(values.element_size());
  NMS_CHECK(values.dim() == 2 && values.is_contiguous() && values.size(1) * 2 == k,
            "values must be contiguous [rows, k / 2] with k = ", k);
  const int64_t rows = values.size(0), groups = k / (bytes == 4 ? 2 : 4);
  check_layout(values, "values", rows, k, layout);
  const PackedFormat format = bytes == 4 ? packed_format(1, 2) : packed_format(2, 4);
  NMS_CHECK(indices.scalar_type() == ScalarType::Byte && indices.is_contiguous() && indices.dim() == 2 &&
                indices.size(0) == rows && indices.size(1) == index_row_bytes(format, groups),
            "indices must be contiguous uint8 [", rows, ", ", index_row_bytes(format, groups), "]");
  check_same_device(values, indices, "values and indices");
}

// Bytes of the blob of a weight [rows, k]: values and four bits a group.
inline int64_t blob_bytes(int64_t rows, int64_t k, int64_t element_bytes) {
  return rows * k / 2 * element_bytes + rows * (k / (element_bytes == 4 ? 2 : 4)) / 2;
}

}  // namespace nms
