// What ops on a packed weight [rows, k] check, on the CPU and on CUDA.
#pragma once

#include "core/packed.h"
#include "torch_utils.h"

namespace nms {

// values [rows, groups * n] and indices [rows, bytes] of an n:m that is one.
inline void check_packed_rows(const Tensor& values, const Tensor& indices, int64_t n, int64_t m, int64_t k) {
  const int64_t groups = ceil_div(k, m);
  const PackedFormat format = packed_format(static_cast<int>(n), static_cast<int>(m));
  NMS_CHECK(values.dim() == 2 && values.is_contiguous() && values.size(1) == groups * n,
            "values must be contiguous [rows, ", groups * n, "] for ", n, ":", m, " and k = ", k);
  const int64_t rows = values.size(0);
  NMS_CHECK(indices.scalar_type() == ScalarType::Byte && indices.dim() == 2 && indices.is_contiguous() &&
                indices.size(0) == rows && indices.size(1) == index_row_bytes(format, groups),
            "indices must be contiguous uint8 [", rows, ", ", index_row_bytes(format, groups), "]");
  check_same_device(values, indices, "values and indices");
}

}  // namespace nms
