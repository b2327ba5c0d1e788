// lt_pack: a packed 2:4 weight as the blob that sparse tensor cores' software reads.
#include <cstring>
#include <string>

#include "../sparse24_arguments.h"
#include "kernels/sparse24.h"

namespace nms {
namespace {

Tensor lt_pack_cpu(const Tensor& values, const Tensor& indices, int64_t k, std::string layout) {
  check_lt_pack(values, indices, k, layout);
  const int bytes = static_cast<int>(values.element_size());
  const int64_t rows = values.size(0), value_bytes = values.numel() * bytes;
  Tensor blob = new_empty(values, {blob_bytes(rows, k, bytes)}, ScalarType::Byte);
  if (blob.numel() == 0) return blob;
  std::memcpy(bytes_of(blob), const_bytes_of(values), static_cast<size_t>(value_bytes));
  write_metadata(layout_named(layout), bytes, const_bytes_of(indices), rows, k, bytes_of(blob) + value_bytes);
  return blob;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nmsparse, CPU, m) { m.impl("lt_pack", TORCH_BOX(&lt_pack_cpu)); }

}  // namespace nms
