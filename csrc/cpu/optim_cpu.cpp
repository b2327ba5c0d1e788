// sgd_, adamw_: a whole optimizer step of N:M training in one pass over memory.
//
// What    Of each weight: gradient scale, decay, momentum or moments, the sparse training term, the new mask, the
//         masked copy, and the number of mask bits that changed.
// Layout  A tile of a weight is updated (optim.h), its mask chosen and its masked copy written (SelectPanel) while it
//         is in the cache. Weights without a pattern are taken as they lie in memory.
// Launch  All tiles of all weights are one range, which torch's thread pool shares out.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <deque>
#include <optional>
#include <string>
#include <vector>

#include "../optim_args.h"
#include "kernels/kernels.h"
#include "panels.h"

namespace nms {
namespace {

// ---- Scratch of a thread ----

// The parts of a tile that lie nowhere else. Kept from step to step.
struct Scratch {
  std::vector<uint8_t> bits;
  std::vector<uint32_t> ones, words;
  std::vector<float> masked;
};

template <class T>
T* at_least(std::vector<T>& buffer, int64_t count, T fill = T{}) {
  if (buffer.size() < static_cast<size_t>(count)) buffer.resize(static_cast<size_t>(count), fill);
  return buffer.data();
}

Scratch& scratch() {
  thread_local Scratch buffers;
  return buffers;
}

// ---- One weight ----

struct Work : StepWeight {
  Panels panels;
  std::optional<Tiling> tiles;
  int64_t first_tile = 0;  // of the whole list's
  bool stream = false;     // write the parameter past the cache
  std::atomic<int64_t> changed{0};
};

uint8_t* at(const Tensor& t, int64_t element) { return bytes_of(t) + element * static_cast<int64_t>(t.element_size()); }

void lay_out(Work& work) {
  if (work.sparse == nullptr) {
    work.panels.rows = 1;
    work.panels.k = work.weight->numel();
    work.panels.a.k = 1;
  } else {
    work.panels = make_panels(*work.weight, nullptr, work.dim, std::lcm(work.m, int64_t{8}));
    NMS_CHECK(work.panels.a.k == 1 || work.panels.a.row == 1 || work.panels.rows == 1,
              "weights must have a stride of 1 along their group dim or the last of the others");
  }
  // All operands of a tile stay in the second-level cache; smaller tiles cost more in fences than they save.
  if (!work.panels.empty()) work.tiles.emplace(work.panels, 8 * work.m);
  const int64_t bytes = work.weight->numel() * static_cast<int64_t>(work.weight->element_size());
  work.stream = work.sparse && bytes >= kStreamBytes;
}

// ---- One tile ----

// Old mask bits by new ones; returns how many differ.
int64_t replace_bits(uint8_t* bits, int64_t bits_row, const uint8_t* fresh, int64_t fresh_row, int64_t rows) {
  if (bits_row == fresh_row) {  // whole rows
    fresh_row *= rows;
    rows = 1;
  }
  int64_t changed = 0;
  const auto count_differing = kernels().count_differing;
  for (int64_t r = 0; r < rows; ++r, bits += bits_row, fresh += fresh_row) {
    changed += count_differing(bits, fresh, fresh_row);
    std::memcpy(bits, fresh, static_cast<size_t>(fresh_row));
  }
  return changed;
}

// A tile in the terms of all kernels.
struct TileView {
  const Work& work;
  const Tile& tile;
  bool in_rows = work.panels.a.k == 1;
  int64_t bits_row = ceil_div(work.panels.k, 8);
  uint8_t* bits = work.bits ? bytes_of(*work.bits) + tile.first_row * bits_row + tile.first_k / 8 : nullptr;

  int64_t elements() const { return tile.rows * tile.k; }
};

// The tile's mask with a word a weight, in the order of memory.
const uint32_t* spread_mask(const TileView& view) {
  Scratch& buffers = scratch();
  ApplyPanel p{};
  p.src = at_least(buffers.ones, view.elements(), ~0u);
  p.dst = at_least(buffers.words, view.elements());
  p.src_row = p.dst_row = 1;
  p.src_k = p.dst_k = view.tile.rows;
  p.bits = view.bits;
  p.bits_row = view.bits_row;
  p.rows = view.tile.rows;
  p.k = view.tile.k;
  kernels().apply_bits[2](p);
  return buffers.words.data();
}

template <class Options, class UpdateFn>
void update_tile(const TileView& view, const Options& options, UpdateFn update) {
  const Work& work = view.work;
  const Tile& tile = view.tile;
  UpdatePanel p{};
  p.weight = at(*work.weight, tile.a);
  p.grad = at(*work.grad, tile.a);
  for (size_t s = 0; s < work.state.size(); ++s) p.state[s] = at(*work.state[s], tile.a);
  p.outer = view.in_rows ? tile.rows : tile.k;
  p.inner = view.in_rows ? tile.k : tile.rows;
  p.stride = view.in_rows ? work.panels.a.row : work.panels.a.k;
  if (view.bits && options.term != Term::kNone) {
    if (view.in_rows) {
      p.bits = view.bits;
      p.bits_row = view.bits_row;
    } else {
      p.words = spread_mask(view);
    }
  }
  update(kernels().optim, work.weight_type, work.grad_type, p, options);
}

// The new mask, or the old one, and the masked weight to a destination of the weight's type.
void mask_tile(const TileView& view, void* dst, int64_t dst_row, int64_t dst_k, bool stream, Work& work) {
  const Tile& tile = view.tile;
  if (work.n == 0) {
    ApplyPanel p{};
    p.src = at(*work.weight, tile.a);
    p.src_row = work.panels.a.row;
    p.src_k = work.panels.a.k;
    p.dst = dst;
    p.dst_row = dst_row;
    p.dst_k = dst_k;
    p.bits = view.bits;
    p.bits_row = view.bits_row;
    p.rows = tile.rows;
    p.k = tile.k;
    kernels().apply_bits[work.weight_type == DType::kFloat64 ? 3 : work.weight_type == DType::kFloat32 ? 2 : 1](p);
    return;
  }
  SelectPanel p{};
  p.src = at(*work.weight, tile.a);
  p.src_row = work.panels.a.row;
  p.src_k = work.panels.a.k;
  p.dst = dst;
  p.dst_row = dst_row;
  p.dst_k = dst_k;
  p.bits_row = ceil_div(tile.k, 8);
  p.bits = at_least(scratch().bits, tile.rows * p.bits_row);
  p.rows = tile.rows;
  p.k = tile.k;
  p.n = static_cast<int>(work.n);
  p.m = static_cast<int>(work.m);
  p.stream = stream;
  kernels().select[static_cast<int>(work.weight_type)](p);
  const int64_t changed = replace_bits(view.bits, view.bits_row, p.bits, p.bits_row, tile.rows);
  if (changed != 0) work.changed.fetch_add(changed, std::memory_order_relaxed);
}

template <class Options, class UpdateFn>
void run_tile(Work& work, const Tile& tile, const Options& options, UpdateFn update) {
  const TileView view{work, tile};
  update_tile(view, options, update);
  if (work.sparse == nullptr) return;
  if (work.sparse_type == work.weight_type)
    return mask_tile(view, at(*work.sparse, tile.a), work.panels.a.row, work.panels.a.k, work.stream, work);

  // The parameter is narrower than the weight: rounded on its way.
  const int64_t outer = view.in_rows ? tile.rows : tile.k, inner = view.in_rows ? tile.k : tile.rows;
  const int64_t stride = view.in_rows ? work.panels.a.row : work.panels.a.k;
  const float* masked = at_least(scratch().masked, view.elements());
  mask_tile(view, scratch().masked.data(), view.in_rows ? inner : 1, view.in_rows ? 1 : inner, false, work);
  for (int64_t o = 0; o < outer; ++o)
    kernels().optim.narrow(work.sparse_type, masked + o * inner, at(*work.sparse, tile.a + o * stride), inner);
}

// ---- The step ----

double number_of(const std::optional<Tensor>& t, const TensorList& weights, double otherwise, const char* name) {
  const float* number = scalar_of(t, weights, name);
  return number ? *number : otherwise;
}

void complete(StepOptions& options, const TensorList& weights, const std::optional<Tensor>& lr_tensor,
              const std::optional<Tensor>& grad_scale) {
  options.lr *= number_of(lr_tensor, weights, 1, "lr_tensor");
  options.grad_scale = number_of(grad_scale, weights, 1, "grad_scale");
}

// options_of(index) are those of one weight.
template <class OptionsOf, class UpdateFn>
void make_step(const StepLists& lists, const OptionsOf& options_of, UpdateFn update) {
  std::deque<Work> all;
  int64_t total = 0;
  for (size_t i = 0; i < lists.weights.size(); ++i) {
    Work& work = all.emplace_back();
    static_cast<StepWeight&>(work) = step_weight(lists, i);
    lay_out(work);
    work.first_tile = total;
    if (work.tiles) total += work.tiles->size();
  }
  constexpr int64_t kGrainTiles = kGrainElements / kTileElements;
  torch::stable::parallel_for(0, total, kGrainTiles, [&](int64_t begin, int64_t end) {
    size_t index = 0;
    for (int64_t tile = begin; tile < end; ++tile) {
      while (index + 1 < all.size() && all[index + 1].first_tile <= tile) ++index;
      Work& work = all[index];
      run_tile(work, (*work.tiles)[tile - work.first_tile], options_of(index), update);
    }
  });
  for (size_t i = 0; i < lists.sparse.size(); ++i)
    *static_cast<int64_t*>(lists.changes[i].mutable_data_ptr()) = all[i].changed.load();
}

void sgd_cpu(TensorList weights, TensorList grads, TensorList momenta, TensorList sparse, TensorList bits,
             TensorList changes, std::vector<int64_t> patterns, std::string term, double lambda_w, double lr,
             std::optional<Tensor> lr_tensor, double momentum, double dampening, double weight_decay, bool nesterov,
             bool maximize, bool first, std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf) {
  StepLists lists{weights, grads, {}, sparse, bits, changes, patterns};
  if (momentum != 0) lists.states.push_back(&momenta);
  check_lists(lists);
  if (number_of(found_inf, weights, 0, "found_inf") != 0) return;
  SgdOptions options = sgd_options(term, lambda_w, lr, momentum, dampening, weight_decay, nesterov, maximize, first);
  complete(options, weights, lr_tensor, grad_scale);
  make_step(
      lists, [&](size_t) { return options; },
      [](const OptimTable& table, DType w, DType g, const UpdatePanel& u, const SgdOptions& o) {
        table.sgd(w, g, u, o);
      });
}

void adamw_cpu(TensorList weights, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs,
               TensorList max_exp_avg_sqs, TensorList steps, TensorList sparse, TensorList bits, TensorList changes,
               std::vector<int64_t> patterns, std::string term, double lambda_w, double lr,
               std::optional<Tensor> lr_tensor, double beta1, double beta2, double eps, double weight_decay,
               bool amsgrad, bool maximize, std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf) {
  StepLists lists{weights, grads, {&exp_avgs, &exp_avg_sqs}, sparse, bits, changes, patterns};
  if (amsgrad) lists.states.push_back(&max_exp_avg_sqs);
  check_lists(lists);
  check_steps(weights, steps);
  if (number_of(found_inf, weights, 0, "found_inf") != 0) return;
  AdamWOptions options = adamw_options(term, lambda_w, lr, beta1, beta2, eps, weight_decay, amsgrad, maximize);
  complete(options, weights, lr_tensor, grad_scale);
  std::vector<AdamWOptions> of_weight(weights.size(), options);
  for (size_t i = 0; i < weights.size(); ++i) {
    const double step = number_of(steps[i], weights, 0, "steps");
    of_weight[i].correction1 = 1 - std::pow(beta1, step);
    of_weight[i].correction2 = 1 - std::pow(beta2, step);
  }
  make_step(
      lists, [&](size_t i) { return of_weight[i]; },
      [](const OptimTable& table, DType w, DType g, const UpdatePanel& u, const AdamWOptions& o) {
        table.adamw(w, g, u, o);
      });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nmsparse, CPU, m) {
  m.impl("sgd_", TORCH_BOX(&sgd_cpu));
  m.impl("adamw_", TORCH_BOX(&adamw_cpu));
}

}  // namespace nms
