// compress, decompress, check_indices, find_violation: the packed form, and the checks before it is trusted.
#include <atomic>
#include <mutex>

#include "../core/packed.h"
#include "huge_pages.h"
#include "kernels/kernels.h"
#include "panels.h"

namespace nms {
namespace {

std::tuple<Tensor, Tensor> compress_cpu(const Tensor& w, int64_t n, int64_t m, int64_t dim, bool pad) {
  check_grouping(w, n, m, dim, pad);
  const DType dtype = dtype_of(w, "w");
  const PackedFormat format = packed_format(static_cast<int>(n), static_cast<int>(m));
  const int64_t groups = ceil_div(w.size(dim), m);
  const int64_t index_bytes = index_row_bytes(format, groups);
  Tensor values = on_huge_pages(new_empty(w, moved_last(sizes_of(w), dim, groups * n), w.scalar_type()));
  Tensor indices = new_empty(w, moved_last(sizes_of(w), dim, index_bytes), ScalarType::Byte);

  // Eight groups always fill whole index bytes, so tiles cut there; rows may be merged where their codes end on a byte.
  const bool whole_bytes = groups * format.group_bits % 8 == 0;
  const Panels panels = make_panels(w, nullptr, dim, whole_bytes ? m : w.size(dim) + 1);
  const int64_t row_groups = ceil_div(panels.k, m);
  const int64_t row_bytes = index_row_bytes(format, row_groups);
  const int64_t element = static_cast<int64_t>(w.element_size());
  const bool stream = values.numel() * element >= kStreamBytes;
  const CompressFn run = kernels().compress[static_cast<int>(dtype)];
  parallel_tiles(panels, 8 * m, [&](const Tile& tile) {
    const int64_t first_group = tile.first_k / m;
    CompressPanel p;
    p.src = const_bytes_of(w) + tile.a * element;
    p.src_row = panels.a.row;
    p.src_k = panels.a.k;
    p.values = bytes_of(values) + (tile.first_row * row_groups + first_group) * n * element;
    p.values_row = row_groups * n;
    p.indices = bytes_of(indices) + tile.first_row * row_bytes + first_group * format.group_bits / 8;
    p.indices_row = row_bytes;
    p.rows = tile.rows;
    p.k = tile.k;
    p.n = static_cast<int>(n);
    p.m = static_cast<int>(m);
    p.stream = stream;
    run(p);
  });
  return {values, indices};
}

// values [..., groups * n] and indices [..., bytes] of rows of k weights.
void check_packed(const Tensor& indices, int64_t n, int64_t m, int64_t k) {
  check_pattern(n, m);
  NMS_CHECK(k >= 0, "k must not be negative, got ", k);
  NMS_CHECK(indices.scalar_type() == ScalarType::Byte && indices.is_contiguous() && indices.dim() >= 1,
            "indices must be contiguous uint8 with at least one dim");
  const PackedFormat format = packed_format(static_cast<int>(n), static_cast<int>(m));
  NMS_CHECK(indices.size(indices.dim() - 1) == index_row_bytes(format, ceil_div(k, m)),
            "the last size of indices must be ", index_row_bytes(format, ceil_div(k, m)), ", got ",
            indices.size(indices.dim() - 1));
}

Tensor decompress_cpu(const Tensor& values, const Tensor& indices, int64_t n, int64_t m, int64_t k, int64_t dim) {
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

  Tensor dense = on_huge_pages(new_empty(values, moved_back(sizes_of(values), dim, k), values.scalar_type()));
  const Panels panels = make_panels(dense, nullptr, dim, k + 1);  // rows stay rows: codes may end within a byte
  const int64_t element = static_cast<int64_t>(values.element_size());
  const PackedFormat format = packed_format(static_cast<int>(n), static_cast<int>(m));
  parallel_tiles(panels, 8 * m, [&](const Tile& tile) {
    const int64_t first_group = tile.first_k / m;
    decompress(static_cast<int>(element),
               const_bytes_of(values) + (tile.first_row * groups + first_group) * n * element, groups * n,
               const_bytes_of(indices) + tile.first_row * row_bytes + first_group * format.group_bits / 8, row_bytes,
               bytes_of(dense) + tile.a * element, panels.a.row, panels.a.k, tile.rows, tile.k, static_cast<int>(n),
               static_cast<int>(m));
  });
  return dense;
}

// The smallest value reported from any thread.
class First {
 public:
  void report(int64_t position, int64_t detail) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (position < position_) {
      position_ = position;
      detail_ = detail;
    }
  }
  bool found() const { return position_ != INT64_MAX; }
  int64_t position() const { return found() ? position_ : -1; }
  int64_t detail() const { return detail_; }

 private:
  std::mutex mutex_;
  int64_t position_ = INT64_MAX;
  int64_t detail_ = 0;
};

Tensor check_indices_cpu(const Tensor& indices, int64_t n, int64_t m, int64_t k) {
  check_packed(indices, n, m, k);
  const int64_t groups = ceil_div(k, m);
  const int64_t row_bytes = indices.size(indices.dim() - 1);
  const int64_t rows = row_bytes == 0 ? 0 : indices.numel() / row_bytes;
  First first;
  torch::stable::parallel_for(
      0, rows, std::max<int64_t>(1, kTileElements / std::max<int64_t>(1, k)), [&](int64_t begin, int64_t end) {
        const int64_t bad = find_bad_indices(const_bytes_of(indices) + begin * row_bytes, row_bytes, end - begin,
                                             groups, static_cast<int>(n), static_cast<int>(m));
        if (bad >= 0) first.report(begin * groups + bad, 0);
      });
  Tensor out = new_empty(indices, {}, ScalarType::Long);
  *static_cast<int64_t*>(out.mutable_data_ptr()) = first.position();
  return out;
}

Tensor find_violation_cpu(const Tensor& w, int64_t n, int64_t m, int64_t dim, bool pad) {
  check_grouping(w, n, m, dim, pad);
  const DType dtype = dtype_of(w, "w");
  const int64_t element = static_cast<int64_t>(w.element_size());
  const Panels panels = make_panels(w, nullptr, dim, m);
  const int64_t groups = ceil_div(panels.k, m);
  First first;
  parallel_tiles(panels, 8 * m, [&](const Tile& tile) {
    const Violation local = find_violation(dtype, const_bytes_of(w) + tile.a * element, panels.a.row, panels.a.k,
                                           tile.rows, tile.k, static_cast<int>(n), static_cast<int>(m));
    if (local.group < 0) return;
    const int64_t tile_groups = ceil_div(tile.k, m);
    const int64_t row = tile.first_row + local.group / tile_groups;
    first.report(row * groups + tile.first_k / m + local.group % tile_groups, local.kept);
  });
  Tensor out = new_empty(w, {2}, ScalarType::Long);
  auto* result = static_cast<int64_t*>(out.mutable_data_ptr());
  result[0] = first.position();
  result[1] = first.detail();
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nmsparse, CPU, m) {
  m.impl("compress", TORCH_BOX(&compress_cpu));
  m.impl("decompress", TORCH_BOX(&decompress_cpu));
  m.impl("check_indices", TORCH_BOX(&check_indices_cpu));
  m.impl("find_violation", TORCH_BOX(&find_violation_cpu));
}

}  // namespace nms
