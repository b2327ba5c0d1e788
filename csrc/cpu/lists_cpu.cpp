// add_pruned_, foreach_add_pruned, foreach_add_kept, foreach_apply_bits, foreach_reselect: what a training step does to
// sparse weights.
//
// What    One call a step instead of several a weight, and one pass over memory for each of them: the sum is not a copy
//         and an addition, and a new mask is compared with the old one and written while it is in the first cache.
#include <atomic>

#include "kernels/kernels.h"
#include "panels.h"

namespace nms {
namespace {

using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;

void check_length(size_t length, size_t expected) {
  NMS_CHECK(length == expected, "all lists must have one entry a weight, got ", length, " and ", expected);
}

// A result that may be of another dtype than the weight.
void check_result(const Tensor& w, const Tensor& out) {
  if (w.scalar_type() != out.scalar_type()) gradient_dtype_of(out, "outs");
  check_same_shape(w, out, "ws and outs");
  check_same_device(w, out, "ws and outs");
  check_writable(out, "outs");
}

int log2_size(int64_t element) { return element == 1 ? 0 : element == 2 ? 1 : element == 4 ? 2 : 3; }

bool past_cache(const Tensor& out) { return out.numel() * static_cast<int64_t>(out.element_size()) >= kStreamBytes; }

void add_pruned_tiles(const Tensor& grad, const Tensor& w, const Tensor& bits, int64_t dim, double factor,
                      const Tensor& out) {
  const DType dtype = gradient_dtype_of(out, "grad");
  const DType w_dtype = gradient_dtype_of(w, "w");
  const Panels panels = make_panels(out, &w, dim, 8);
  const int64_t element = static_cast<int64_t>(out.element_size());
  const int64_t w_element = static_cast<int64_t>(w.element_size());
  const int64_t bits_row = ceil_div(panels.k, 8);
  const bool floats = dtype == DType::kFloat32 && w_dtype == DType::kFloat32 && panels.a.k == 1 && panels.b.k == 1;
  const bool apart = const_bytes_of(grad) != const_bytes_of(out);
  const bool stream = apart && past_cache(out);
  const AddPrunedFn add = kernels().add_pruned;
  // Where only float32 rows are fast, everything else is a copy and an addition in place.
  if (apart && !floats) {
    Tensor target = out;
    torch::stable::copy_(target, grad);
  }
  parallel_tiles(panels, 8, [&](const Tile& tile) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t at = (tile.a + r * panels.a.row) * element;
      const uint8_t* w_at = const_bytes_of(w) + (tile.b + r * panels.b.row) * w_element;
      const uint8_t* bits_at = const_bytes_of(bits) + (tile.first_row + r) * bits_row + tile.first_k / 8;
      if (floats)
        add({reinterpret_cast<const float*>(const_bytes_of(grad) + at), reinterpret_cast<const float*>(w_at),
             reinterpret_cast<float*>(bytes_of(out) + at), bits_at, tile.k, static_cast<float>(factor), stream});
      else
        add_pruned(dtype, bytes_of(out) + at, panels.a.k, w_dtype, w_at, panels.b.k, bits_at, tile.k, factor);
    }
  });
}

// out = where(bit, grad + factor * w, 0); grad is out, or shares its dtype and strides.
void add_kept_tiles(const Tensor& grad, const Tensor& w, const Tensor& bits, int64_t dim, double factor,
                    const Tensor& out) {
  const DType dtype = gradient_dtype_of(out, "outs");
  const DType w_dtype = gradient_dtype_of(w, "ws");
  const Panels panels = make_panels(out, &w, dim, 8);
  const int64_t element = static_cast<int64_t>(out.element_size());
  const int64_t w_element = static_cast<int64_t>(w.element_size());
  const int64_t bits_row = ceil_div(panels.k, 8);
  const bool floats = dtype == DType::kFloat32 && w_dtype == DType::kFloat32 && panels.a.k == 1 && panels.b.k == 1;
  const bool stream = const_bytes_of(grad) != const_bytes_of(out) && past_cache(out);
  const AddPrunedFn add = kernels().add_kept;
  const ApplyFn mask = kernels().apply_bits[log2_size(element)];
  parallel_tiles(panels, 8, [&](const Tile& tile) {
    const uint8_t* tile_bits = const_bytes_of(bits) + tile.first_row * bits_row + tile.first_k / 8;
    const uint8_t* tile_grad = const_bytes_of(grad) + tile.a * element;
    const uint8_t* tile_w = const_bytes_of(w) + tile.b * w_element;
    uint8_t* tile_out = bytes_of(out) + tile.a * element;
    if (floats) {
      for (int64_t r = 0; r < tile.rows; ++r)
        add({reinterpret_cast<const float*>(tile_grad + r * panels.a.row * element),
             reinterpret_cast<const float*>(tile_w + r * panels.b.row * w_element),
             reinterpret_cast<float*>(tile_out + r * panels.a.row * element), tile_bits + r * bits_row, tile.k,
             static_cast<float>(factor), stream});
      return;
    }
    // Of other layouts and dtypes a tile is summed, then masked while it is in the cache.
    add_scaled(
        dtype, w_dtype,
        {tile_grad, tile_out, panels.a.row, panels.a.k, tile_w, panels.b.row, panels.b.k, tile.rows, tile.k, factor});
    ApplyPanel p;
    p.src = tile_out;
    p.src_row = panels.a.row;
    p.src_k = panels.a.k;
    p.dst = tile_out;
    p.dst_row = panels.a.row;
    p.dst_k = panels.a.k;
    p.bits = tile_bits;
    p.bits_row = bits_row;
    p.rows = tile.rows;
    p.k = tile.k;
    mask(p);
  });
}

double read_scale(const std::optional<Tensor>& scale) {
  if (!scale) return 1;
  NMS_CHECK(scale->scalar_type() == ScalarType::Float && scale->numel() == 1 && scale->is_cpu(),
            "scale must be one float32 on the weights' device");
  return *static_cast<const float*>(scale->const_data_ptr());
}

void add_pruned_inplace_cpu(const Tensor& grad, const Tensor& w, const Tensor& bits, int64_t dim, double alpha,
                            std::optional<Tensor> scale) {
  check_same_shape(grad, w, "grad and w");
  check_same_device(grad, w, "grad and w");
  check_bits(bits, w, dim);
  check_writable(grad, "grad");
  add_pruned_tiles(grad, w, bits, dim, alpha * read_scale(scale), grad);
}

// add(grad, w, bits, dim, factor, out) for each weight; grad has the dtype and the strides of out.
template <class Add>
void foreach_add(const Tensors& grads, const Tensors& ws, const Tensors& bits, const Ints& dims,
                 const std::vector<double>& alphas, const std::optional<Tensor>& scale, const Tensors& outs,
                 const Add& add) {
  for (size_t length : {grads.size(), bits.size(), dims.size(), alphas.size(), outs.size()})
    check_length(length, ws.size());
  const double factor = read_scale(scale);
  for (size_t i = 0; i < ws.size(); ++i) {
    check_bits(bits[i], ws[i], dims[i]);
    check_same_shape(grads[i], ws[i], "grads and ws");
    check_same_device(grads[i], ws[i], "grads and ws");
    check_same_shape(outs[i], ws[i], "outs and ws");
    check_same_device(outs[i], ws[i], "outs and ws");
    check_writable(outs[i], "outs");
    Tensor grad = grads[i];
    const bool alike = grad.scalar_type() == outs[i].scalar_type() && strides_of(grad) == strides_of(outs[i]);
    if (!alike) {
      Tensor target = outs[i];
      torch::stable::copy_(target, grad);
      grad = outs[i];
    }
    add(grad, ws[i], bits[i], dims[i], factor * alphas[i], outs[i]);
  }
}

void foreach_add_pruned_cpu(const Tensors& grads, const Tensors& ws, const Tensors& bits, const Ints& dims,
                            const std::vector<double>& alphas, std::optional<Tensor> scale, const Tensors& outs) {
  foreach_add(grads, ws, bits, dims, alphas, scale, outs, add_pruned_tiles);
}

void foreach_add_kept_cpu(const Tensors& grads, const Tensors& ws, const Tensors& bits, const Ints& dims,
                          const std::vector<double>& alphas, std::optional<Tensor> scale, const Tensors& outs) {
  foreach_add(grads, ws, bits, dims, alphas, scale, outs, add_kept_tiles);
}

ApplyPanel apply_panel(const Panels& panels, const Tile& tile, const Tensor& w, const Tensor& out, const uint8_t* bits,
                       int64_t bits_row) {
  ApplyPanel p;
  p.src = const_bytes_of(w) + tile.a * static_cast<int64_t>(w.element_size());
  p.src_row = panels.a.row;
  p.src_k = panels.a.k;
  p.dst = bytes_of(out) + tile.b * static_cast<int64_t>(out.element_size());
  p.dst_row = panels.b.row;
  p.dst_k = panels.b.k;
  p.bits = bits;
  p.bits_row = bits_row;
  p.rows = tile.rows;
  p.k = tile.k;
  return p;
}

// Calls the masked copy of one dtype, or from one to another.
class MaskedCopy {
 public:
  MaskedCopy(const Tensor& w, const Tensor& out)
      : from_(dtype_of(w, "ws")), to_(dtype_of(out, "outs")), same_(kernels().apply_bits[log2_size(w.element_size())]) {
    if (from_ != to_) gradient_dtype_of(w, "ws");
  }
  void operator()(const ApplyPanel& p) const {
    if (from_ == to_)
      same_(p);
    else
      apply_bits_rounded(from_, to_, p);
  }

 private:
  DType from_, to_;
  ApplyFn same_;
};

void foreach_apply_bits_cpu(const Tensors& ws, const Tensors& bits, const Ints& dims, const Tensors& outs) {
  for (size_t length : {bits.size(), dims.size(), outs.size()}) check_length(length, ws.size());
  for (size_t i = 0; i < ws.size(); ++i) {
    check_bits(bits[i], ws[i], dims[i]);
    check_result(ws[i], outs[i]);
    const MaskedCopy copy(ws[i], outs[i]);
    const Panels panels = make_panels(ws[i], &outs[i], dims[i], 8);
    const int64_t bits_row = ceil_div(panels.k, 8);
    parallel_tiles(panels, 8, [&](const Tile& tile) {
      const uint8_t* mask = const_bytes_of(bits[i]) + tile.first_row * bits_row + tile.first_k / 8;
      copy(apply_panel(panels, tile, ws[i], outs[i], mask, bits_row));
    });
  }
}

// Returns how many weights changed sides.
int64_t reselect(const Tensor& w, int n, int m, int64_t dim, const Tensor& out, const Tensor& bits) {
  const DType dtype = dtype_of(w, "ws");
  const bool same = w.scalar_type() == out.scalar_type();
  const MaskedCopy copy(w, out);
  const Panels panels = make_panels(w, &out, dim, std::lcm(m, 8));
  const int64_t bits_row = ceil_div(panels.k, 8);
  const bool stream = past_cache(out);
  const SelectFn select = kernels().select[static_cast<int>(dtype)];
  const auto count_differing = kernels().count_differing;
  std::atomic<int64_t> total{0};
  parallel_tiles(panels, 8 * int64_t{m}, [&](const Tile& tile) {
    // The new mask of a tile is small: it stays in the first cache until it has been compared with the old one.
    const int64_t row_bytes = ceil_div(tile.k, 8);
    thread_local std::vector<uint8_t> fresh;
    if (fresh.size() < static_cast<size_t>(tile.rows * row_bytes)) fresh.resize(tile.rows * row_bytes);
    const ApplyPanel masked = apply_panel(panels, tile, w, out, fresh.data(), row_bytes);
    SelectPanel p;
    p.src = masked.src;
    p.src_row = masked.src_row;
    p.src_k = masked.src_k;
    p.dst = same ? masked.dst : nullptr;
    p.dst_row = masked.dst_row;
    p.dst_k = masked.dst_k;
    p.bits = fresh.data();
    p.bits_row = row_bytes;
    p.rows = tile.rows;
    p.k = tile.k;
    p.n = n;
    p.m = m;
    p.stream = stream;
    select(p);
    if (!same) copy(masked);
    int64_t changed = 0;
    uint8_t* old = bytes_of(bits) + tile.first_row * bits_row + tile.first_k / 8;
    const bool together = row_bytes == bits_row;
    const int64_t runs = together ? 1 : tile.rows, run = together ? tile.rows * row_bytes : row_bytes;
    for (int64_t r = 0; r < runs; ++r) {
      changed += count_differing(old + r * bits_row, fresh.data() + r * run, run);
      std::copy_n(fresh.data() + r * run, run, old + r * bits_row);
    }
    total.fetch_add(changed, std::memory_order_relaxed);
  });
  return total.load();
}

void foreach_reselect_cpu(const Tensors& ws, const Ints& ns, const Ints& ms, const Ints& dims, const Tensors& outs,
                          const Tensors& bits, const Tensor& changes, const Ints& places,
                          std::optional<Tensor> /* work */) {
  for (size_t length : {ns.size(), ms.size(), dims.size(), outs.size(), bits.size(), places.size()})
    check_length(length, ws.size());
  NMS_CHECK(changes.scalar_type() == ScalarType::Long && changes.dim() == 1 && changes.is_cpu(),
            "changes must be int64 of one dimension, on the weights' device");
  int64_t* counts = static_cast<int64_t*>(changes.mutable_data_ptr());
  for (size_t i = 0; i < ws.size(); ++i) {
    check_grouping(ws[i], ns[i], ms[i], dims[i], false);
    check_result(ws[i], outs[i]);
    check_bits(bits[i], ws[i], dims[i]);
    NMS_CHECK(0 <= places[i] && places[i] < changes.size(0), "places must be in [0, ", changes.size(0), "), got ",
              places[i]);
    counts[places[i] * changes.stride(0)] =
        reselect(ws[i], static_cast<int>(ns[i]), static_cast<int>(ms[i]), dims[i], outs[i], bits[i]);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nmsparse, CPU, m) {
  m.impl("add_pruned_", TORCH_BOX(&add_pruned_inplace_cpu));
  m.impl("foreach_add_pruned", TORCH_BOX(&foreach_add_pruned_cpu));
  m.impl("foreach_add_kept", TORCH_BOX(&foreach_add_kept_cpu));
  m.impl("foreach_apply_bits", TORCH_BOX(&foreach_apply_bits_cpu));
  m.impl("foreach_reselect", TORCH_BOX(&foreach_reselect_cpu));
}

}  // namespace nms
