// prune, mask_bits, transposable_bits: choosing what is kept.
#include "huge_pages.h"
#include "kernels/kernels.h"
#include "panels.h"

namespace nms {
namespace {

// `out` and `bits` may each be null; `out` may be w itself.
void select_into(const Tensor& w, int64_t n, int64_t m, int64_t dim, const Tensor* out, const Tensor* bits) {
  const DType dtype = dtype_of(w, "w");
  const int64_t unit = 8 * m;  // whole groups and whole mask bytes
  const Panels panels = make_panels(w, out, dim, std::lcm(m, int64_t{8}));
  const int64_t element = static_cast<int64_t>(w.element_size());
  const uint8_t* src = const_bytes_of(w);
  uint8_t* dst = out ? bytes_of(*out) : nullptr;
  uint8_t* mask = bits ? bytes_of(*bits) : nullptr;
  const int64_t mask_row = ceil_div(panels.k, 8);
  const bool stream = dst && dst != src && panels.total_rows() * panels.k * element >= kStreamBytes;
  const SelectFn select = kernels().select[static_cast<int>(dtype)];

  parallel_tiles(panels, unit, [&](const Tile& tile) {
    SelectPanel p;
    p.src = src + tile.a * element;
    p.src_row = panels.a.row;
    p.src_k = panels.a.k;
    p.dst = dst ? dst + tile.b * element : nullptr;
    p.dst_row = panels.b.row;
    p.dst_k = panels.b.k;
    p.bits = mask ? mask + tile.first_row * mask_row + tile.first_k / 8 : nullptr;
    p.bits_row = mask_row;
    p.rows = tile.rows;
    p.k = tile.k;
    p.n = static_cast<int>(n);
    p.m = static_cast<int>(m);
    p.stream = stream;
    select(p);
  });
}

std::tuple<Tensor, Tensor> prune_cpu(const Tensor& w, int64_t n, int64_t m, int64_t dim, bool pad) {
  check_grouping(w, n, m, dim, pad);
  Tensor out = on_huge_pages(new_like(w));
  Tensor bits = new_bits(w, dim);
  select_into(w, n, m, dim, &out, &bits);
  return {out, bits};
}

void prune_out_cpu(const Tensor& w, int64_t n, int64_t m, int64_t dim, bool pad, const Tensor& out,
                   std::optional<Tensor> bits) {
  check_grouping(w, n, m, dim, pad);
  check_prune_outputs(w, out, bits, dim);
  select_into(w, n, m, dim, &out, bits ? &*bits : nullptr);
}

void prune_inplace_cpu(const Tensor& w, int64_t n, int64_t m, int64_t dim, bool pad, std::optional<Tensor> bits) {
  prune_out_cpu(w, n, m, dim, pad, w, bits);
}

Tensor mask_bits_cpu(const Tensor& w, int64_t n, int64_t m, int64_t dim, bool pad) {
  check_grouping(w, n, m, dim, pad);
  Tensor bits = new_bits(w, dim);
  select_into(w, n, m, dim, nullptr, &bits);
  return bits;
}

Tensor transposable_bits_cpu(const Tensor& w) {
  NMS_CHECK(w.dim() == 2 && w.size(0) % 4 == 0 && w.size(1) % 4 == 0, "w must be 2-D with both sizes multiples of 4");
  const DType dtype = dtype_of(w, "w");
  Tensor bits = new_bits(w, 1);
  const int64_t cols = w.size(1);
  const int64_t bits_row = bits.size(1);
  const int64_t element = static_cast<int64_t>(w.element_size());
  const int64_t grain = cols == 0 ? 1 : std::max<int64_t>(1, kTileElements / (4 * cols));
  torch::stable::parallel_for(0, w.size(0) / 4, grain, [&](int64_t begin, int64_t end) {
    select_transposable(dtype, const_bytes_of(w) + 4 * begin * w.stride(0) * element, w.stride(0), w.stride(1),
                        bytes_of(bits) + 4 * begin * bits_row, bits_row, 4 * (end - begin), cols);
  });
  return bits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nmsparse, CPU, m) {
  m.impl("prune", TORCH_BOX(&prune_cpu));
  m.impl("prune_out", TORCH_BOX(&prune_out_cpu));
  m.impl("prune_", TORCH_BOX(&prune_inplace_cpu));
  m.impl("mask_bits", TORCH_BOX(&mask_bits_cpu));
  m.impl("transposable_bits", TORCH_BOX(&transposable_bits_cpu));
}

}  // namespace nms
