// sgd_, adamw_: a whole optimizer step of N:M training in one pass over memory.
//
// All weights of a list that share types and group size are one launch (of up to StepTable::kMaxWeights weights); those
// without a pattern go along with the first launch of their types. Nothing waits for the device.
#include "../core/dtype_switch.h"
#include "../optim_args.h"
#include "cuda_utils.h"
#include "kernels/optim.cuh"

namespace nms {
namespace {

template <DType W, DType G>
StepOperands<W, G> operands_of(const StepWeight& w, const float* step_number) {
  StepOperands<W, G> at{};
  at.weight = mutable_data_of<BitsOf<W>>(*w.weight);
  at.grad = data_of<BitsOf<G>>(*w.grad);
  for (size_t s = 0; s < w.state.size(); ++s) at.state[s] = mutable_data_of<BitsOf<W>>(*w.state[s]);
  at.step_number = step_number;
  at.n = static_cast<int>(w.n);
  at.m = static_cast<int>(w.m);
  if (w.sparse) {
    at.sparse = mutable_data_of<BitsOf<G>>(*w.sparse);
    at.bits = bytes_of(*w.bits);
    at.changes = mutable_data_of<int64_t>(*w.changes);
  }
  return at;
}

Layout step_layout(const StepWeight& w) {
  if (w.sparse) return layout_of(*w.weight, w.weight, w.dim, std::lcm(w.m, int64_t{8}));
  const std::vector<int64_t> strides{1};
  return make_layout({w.weight->numel()}, strides, &strides, 0, 8);
}

// Sixteen bytes of every operand can be moved at once.
template <DType W, DType G>
bool all_aligned(const StepOperands<W, G>& at) {
  bool aligned = is_aligned(at.grad, kChunkBytes) && is_aligned(at.sparse, kChunkBytes);
  for (const auto* state : at.state) aligned = aligned && is_aligned(state, kChunkBytes);
  return aligned;
}

struct Launches {  // what they share
  const StepLists& lists;
  const TensorList* steps;  // null where the optimizer does not count
  StepScalars scalars;
  cudaStream_t stream;
};

template <template <class> class StepOf, DType W, DType G, int M, class Options>
void launch_weights(const Launches& launches, const std::vector<size_t>& indices, const Options& options) {
  using Body = StepTile<StepOf, W, G, M>;
  auto table = std::make_unique<StepTable<Body>>();
  const auto launch = [&] {
    launch_step(*table, options, launches.scalars, launches.stream);
    check_launch();
    table->weights = 0;
  };
  for (const size_t index : indices) {
    const StepWeight w = step_weight(launches.lists, index);
    const Layout layout = step_layout(w);
    if (layout.empty()) continue;
    StepOperands<W, G> at = operands_of<W, G>(w, launches.steps ? data_of<float>((*launches.steps)[index]) : nullptr);
    at.bits_row = ceil_div(layout.k, 8);
    const int unit = w.sparse ? Body::Select::unit_for(at.m) : Body::Select::unit_for(M == 0 ? 8 : M);
    auto tiles = make_tiles<BitsOf<W>>(layout, unit, at.weight, nullptr);
    if (!tiles) {
      launch_strided_step(StepStrided<StepOf, W, G>{make_spans(layout, std::lcm(w.m, int64_t{8})), at}, options,
                          launches.scalars, launches.stream);
      check_launch();
      continue;
    }
    tiles->aligned = tiles->aligned && all_aligned(at);
    table->append(Body{*tiles, at, unit});
    if (table->weights == StepTable<Body>::kMaxWeights) launch();
  }
  if (table->weights > 0) launch();
}

// The group size that a kernel is written for; 0: any.
template <DType W, class Fn>
void switch_step_m(int64_t m, Fn fn) {
  if constexpr (W == DType::kFloat32)
    switch_m(static_cast<int>(m), fn);
  else
    fn(std::integral_constant<int, 0>{});
}

template <DType W, DType G, template <class> class StepOf, class Options>
void launch_types(const Launches& launches, const std::vector<size_t>& indices, const Options& options) {
  const StepLists& lists = launches.lists;
  std::vector<std::pair<int64_t, std::vector<size_t>>> by_m;  // group size; weights
  std::vector<size_t> without_pattern;
  for (const size_t index : indices) {
    if (index >= lists.sparse.size()) {
      without_pattern.push_back(index);
      continue;
    }
    const int64_t m = lists.patterns[3 * index + 1];
    auto found = std::find_if(by_m.begin(), by_m.end(), [m](const auto& entry) { return entry.first == m; });
    if (found == by_m.end()) found = by_m.insert(by_m.end(), {m, {}});
    found->second.push_back(index);
  }
  if (by_m.empty()) by_m.push_back({4, {}});
  by_m.front().second.insert(by_m.front().second.end(), without_pattern.begin(), without_pattern.end());
  for (const auto& [m, same_m] : by_m)
    switch_step_m<W>(m, [&](auto fixed) { launch_weights<StepOf, W, G, fixed>(launches, same_m, options); });
}

// fn(types) for the pairs of types that weights and gradients may have.
template <class Fn>
void switch_step_types(DType weight, DType grad, Fn fn) {
  switch (weight) {
    case DType::kFloat64:
      return fn(DTypeConstant<DType::kFloat64>{}, DTypeConstant<DType::kFloat64>{});
    case DType::kBFloat16:
      return fn(DTypeConstant<DType::kBFloat16>{}, DTypeConstant<DType::kBFloat16>{});
    case DType::kFloat16:
      return fn(DTypeConstant<DType::kFloat16>{}, DTypeConstant<DType::kFloat16>{});
    default:
      if (grad == DType::kFloat32) return fn(DTypeConstant<DType::kFloat32>{}, DTypeConstant<DType::kFloat32>{});
      if (grad == DType::kBFloat16) return fn(DTypeConstant<DType::kFloat32>{}, DTypeConstant<DType::kBFloat16>{});
      return fn(DTypeConstant<DType::kFloat32>{}, DTypeConstant<DType::kFloat16>{});
  }
}

// changes = 0, for the kernels to add to. Counters mostly lie side by side.
void clear_changes(const TensorList& changes, cudaStream_t stream) {
  for (size_t first = 0; first < changes.size();) {
    int64_t* begin = mutable_data_of<int64_t>(changes[first]);
    size_t count = 1;
    while (first + count < changes.size() && mutable_data_of<int64_t>(changes[first + count]) == begin + count) ++count;
    cudaMemsetAsync(begin, 0, count * sizeof(int64_t), stream);
    first += count;
  }
}

template <template <class> class StepOf, class Options>
void make_step_cuda(const StepLists& lists, const TensorList* steps, const StepScalars& scalars,
                    const Options& options) {
  check_lists(lists);
  if (lists.weights.empty()) return;
  const OnDevice device(lists.weights.front());
  std::vector<std::pair<std::pair<DType, DType>, std::vector<size_t>>> by_types;
  for (size_t i = 0; i < lists.weights.size(); ++i) {
    const StepWeight w = step_weight(lists, i);
    check_same_device(lists.weights.front(), *w.weight, "weights");
    NMS_CHECK(!w.sparse || w.sparse_type == w.grad_type, "sparse and grads must have the same dtype");
    const std::pair<DType, DType> types{w.weight_type, w.grad_type};
    auto found = std::find_if(by_types.begin(), by_types.end(), [&](const auto& e) { return e.first == types; });
    if (found == by_types.end()) found = by_types.insert(by_types.end(), {types, {}});
    found->second.push_back(i);
  }
  clear_changes(lists.changes, device.stream);
  const Launches launches{lists, steps, scalars, device.stream};
  for (const auto& [types, indices] : by_types)
    switch_step_types(types.first, types.second,
                      [&](auto w, auto g) { launch_types<w, g, StepOf>(launches, indices, options); });
}

StepScalars scalars_of(const TensorList& weights, const std::optional<Tensor>& lr,
                       const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf) {
  return {scalar_of(lr, weights, "lr_tensor"), scalar_of(grad_scale, weights, "grad_scale"),
          scalar_of(found_inf, weights, "found_inf")};
}

void sgd_cuda(TensorList weights, TensorList grads, TensorList momenta, TensorList sparse, TensorList bits,
              TensorList changes, std::vector<int64_t> patterns, std::string term, double lambda_w, double lr,
              std::optional<Tensor> lr_tensor, double momentum, double dampening, double weight_decay, bool nesterov,
              bool maximize, bool first, std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf) {
  StepLists lists{weights, grads, {}, sparse, bits, changes, patterns};
  if (momentum != 0) lists.states.push_back(&momenta);
  const SgdOptions options =
      sgd_options(term, lambda_w, lr, momentum, dampening, weight_decay, nesterov, maximize, first);
  make_step_cuda<Sgd>(lists, nullptr, scalars_of(weights, lr_tensor, grad_scale, found_inf), options);
}

void adamw_cuda(TensorList weights, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs,
                TensorList max_exp_avg_sqs, TensorList steps, TensorList sparse, TensorList bits, TensorList changes,
                std::vector<int64_t> patterns, std::string term, double lambda_w, double lr,
                std::optional<Tensor> lr_tensor, double beta1, double beta2, double eps, double weight_decay,
                bool amsgrad, bool maximize, std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf) {
  StepLists lists{weights, grads, {&exp_avgs, &exp_avg_sqs}, sparse, bits, changes, patterns};
  if (amsgrad) lists.states.push_back(&max_exp_avg_sqs);
  check_steps(weights, steps);
  const AdamWOptions options = adamw_options(term, lambda_w, lr, beta1, beta2, eps, weight_decay, amsgrad, maximize);
  make_step_cuda<AdamW>(lists, &steps, scalars_of(weights, lr_tensor, grad_scale, found_inf), options);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nmsparse, CUDA, m) {
  m.impl("sgd_", TORCH_BOX(&sgd_cuda));
  m.impl("adamw_", TORCH_BOX(&adamw_cuda));
}

}  // namespace nms
