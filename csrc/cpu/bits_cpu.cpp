// pack_bits, unpack_bits, apply_bits, sad: working with packed masks.
#include <atomic>

#include "huge_pages.h"
#include "kernels/kernels.h"
#include "panels.h"

namespace nms {
namespace {

Tensor pack_bits_cpu(const Tensor& mask, int64_t dim) {
  NMS_CHECK(mask.scalar_type() == ScalarType::Bool, "mask must be bool");
  NMS_CHECK(0 <= dim && dim < mask.dim(), "dim must be in [0, ", mask.dim(), "), got ", dim);
  Tensor bits = new_bits(mask, dim);
  const Panels panels = make_panels(mask, nullptr, dim, 8);
  const int64_t bits_row = ceil_div(panels.k, 8);
  parallel_tiles(panels, 8, [&](const Tile& tile) {
    pack_bits(const_bytes_of(mask) + tile.a, panels.a.row, panels.a.k,
              bytes_of(bits) + tile.first_row * bits_row + tile.first_k / 8, bits_row, tile.rows, tile.k);
  });
  return bits;
}

Tensor unpack_bits_cpu(const Tensor& bits, int64_t k, int64_t dim) {
  NMS_CHECK(bits.scalar_type() == ScalarType::Byte && bits.is_contiguous(), "bits must be contiguous uint8");
  NMS_CHECK(0 <= dim && dim < bits.dim(), "dim must be in [0, ", bits.dim(), "), got ", dim);
  NMS_CHECK(k >= 0 && bits.size(bits.dim() - 1) == ceil_div(k, 8),
            "the last size of bits must be ceil(k / 8), k = ", k);
  Tensor mask = on_huge_pages(new_empty(bits, moved_back(sizes_of(bits), dim, k), ScalarType::Bool));
  const Panels panels = make_panels(mask, nullptr, dim, 8);
  const int64_t bits_row = ceil_div(panels.k, 8);
  parallel_tiles(panels, 8, [&](const Tile& tile) {
    unpack_bits(const_bytes_of(bits) + tile.first_row * bits_row + tile.first_k / 8, bits_row, bytes_of(mask) + tile.a,
                panels.a.row, panels.a.k, tile.rows, tile.k);
  });
  return mask;
}

int log2_size(int64_t element) { return element == 1 ? 0 : element == 2 ? 1 : element == 4 ? 2 : 3; }

void apply_into(const Tensor& w, const Tensor& bits, int64_t dim, const Tensor& out) {
  dtype_of(w, "w");
  check_bits(bits, w, dim);
  check_writable(out, "w");
  const Panels panels = make_panels(w, &out, dim, 8);
  const int64_t element = static_cast<int64_t>(w.element_size());
  const int64_t bits_row = ceil_div(panels.k, 8);
  const ApplyFn apply = kernels().apply_bits[log2_size(element)];
  parallel_tiles(panels, 8, [&](const Tile& tile) {
    ApplyPanel p;
    p.src = const_bytes_of(w) + tile.a * element;
    p.src_row = panels.a.row;
    p.src_k = panels.a.k;
    p.dst = bytes_of(out) + tile.b * element;
    p.dst_row = panels.b.row;
    p.dst_k = panels.b.k;
    p.bits = const_bytes_of(bits) + tile.first_row * bits_row + tile.first_k / 8;
    p.bits_row = bits_row;
    p.rows = tile.rows;
    p.k = tile.k;
    apply(p);
  });
}

Tensor apply_bits_cpu(const Tensor& w, const Tensor& bits, int64_t dim) {
  Tensor out = on_huge_pages(new_like(w));
  apply_into(w, bits, dim, out);
  return out;
}

void apply_bits_inplace_cpu(const Tensor& w, const Tensor& bits, int64_t dim) { apply_into(w, bits, dim, w); }

void sad_out_cpu(const Tensor& a, const Tensor& b, const Tensor& out) {
  const bool masks = a.scalar_type() == ScalarType::Bool || a.scalar_type() == ScalarType::Byte;
  NMS_CHECK(masks && a.scalar_type() == b.scalar_type(), "a and b must both be packed bits (uint8) or both be bool");
  NMS_CHECK(a.is_contiguous() && b.is_contiguous(), "a and b must be contiguous");
  NMS_CHECK(out.scalar_type() == ScalarType::Long && out.numel() == 1, "out must be one int64");
  check_same_shape(a, b, "a and b");
  check_same_device(a, b, "a and b");
  check_same_device(a, out, "a and out");
  constexpr int64_t kGrainBytes = 1 << 18;  // below this one thread is faster than waking a second
  const uint8_t* x = const_bytes_of(a);
  const uint8_t* y = const_bytes_of(b);
  const auto count_differing = kernels().count_differing;
  std::atomic<int64_t> total{0};
  torch::stable::parallel_for(0, a.numel(), kGrainBytes, [&](int64_t begin, int64_t end) {
    total.fetch_add(count_differing(x + begin, y + begin, end - begin), std::memory_order_relaxed);
  });
  *static_cast<int64_t*>(out.mutable_data_ptr()) = total.load();
}

Tensor sad_cpu(const Tensor& a, const Tensor& b) {
  Tensor out = new_empty(a, {}, ScalarType::Long);
  sad_out_cpu(a, b, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nmsparse, CPU, m) {
  m.impl("pack_bits", TORCH_BOX(&pack_bits_cpu));
  m.impl("unpack_bits", TORCH_BOX(&unpack_bits_cpu));
  m.impl("apply_bits", TORCH_BOX(&apply_bits_cpu));
  m.impl("apply_bits_", TORCH_BOX(&apply_bits_inplace_cpu));
  m.impl("sad", TORCH_BOX(&sad_cpu));
  m.impl("sad_out", TORCH_BOX(&sad_out_cpu));
}

}  // namespace nms
