// The arguments of sgd_ and adamw_, and their checks: what the CPU and the CUDA ops share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/optim.h"
#include "torch_utils.h"

namespace nms {

using TensorList = std::vector<Tensor>;

struct StepLists {
  const TensorList &weights, &grads;
  std::vector<const TensorList*> states;
  const TensorList &sparse, &bits, &changes;  // of the first weights
  const std::vector<int64_t>& patterns;       // n, m, dim of each of them; n = 0 keeps the mask
};

// One weight of the lists.
struct StepWeight {
  const Tensor *weight, *grad;
  std::vector<const Tensor*> state;
  const Tensor *sparse = nullptr, *bits = nullptr, *changes = nullptr;  // null: a weight without a pattern
  DType weight_type, grad_type, sparse_type;
  int64_t n = 0, m = 1, dim = 0;
};

// Whether elements lie next to each other without gaps, in whatever order of dims.
inline bool fills_memory(const Tensor& t) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.size(d) != 1) dims.emplace_back(t.stride(d), t.size(d));
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// Operands are walked through together: the same shape in the same order of memory.
inline void check_operand(const Tensor& weight, const Tensor& other, const char* names) {
  check_same_shape(weight, other, names);
  check_same_device(weight, other, names);
  for (int64_t d = 0; d < weight.dim(); ++d)
    NMS_CHECK(weight.size(d) <= 1 || weight.stride(d) == other.stride(d), names, " must have the same strides");
}

inline DType narrower_type_of(const Tensor& other, DType weight, const char* names) {
  const DType type = gradient_dtype_of(other, names);
  NMS_CHECK(type == weight || (weight == DType::kFloat32 && type != DType::kFloat64), names,
            " must have the same dtype, or be narrower than float32");
  return type;
}

inline void check_lists(const StepLists& lists) {
  const size_t count = lists.weights.size(), sparse = lists.sparse.size();
  NMS_CHECK(lists.grads.size() == count, "there must be as many grads as weights");
  for (const TensorList* list : lists.states)
    NMS_CHECK(list->size() == count, "there must be as many tensors of state as weights");
  NMS_CHECK(sparse <= count && lists.bits.size() == sparse && lists.changes.size() == sparse &&
                lists.patterns.size() == 3 * sparse,
            "sparse, bits, changes and patterns must belong to the first weights");
}

inline StepWeight step_weight(const StepLists& lists, size_t index) {
  StepWeight w{};
  w.m = 1;
  w.weight = &lists.weights[index];
  w.grad = &lists.grads[index];
  w.weight_type = gradient_dtype_of(*w.weight, "weights");
  w.grad_type = narrower_type_of(*w.grad, w.weight_type, "weights and grads");
  check_operand(*w.weight, *w.grad, "weights and grads");
  check_writable(*w.weight, "weights");
  for (const TensorList* list : lists.states) {
    const Tensor& state = (*list)[index];
    check_operand(*w.weight, state, "weights and their state");
    NMS_CHECK(state.scalar_type() == w.weight->scalar_type(), "weights and their state must have the same dtype");
    w.state.push_back(&state);
  }
  if (index >= lists.sparse.size()) {
    NMS_CHECK(fills_memory(*w.weight), "weights without a pattern must fill their memory without gaps");
    return w;
  }
  w.sparse = &lists.sparse[index];
  w.bits = &lists.bits[index];
  w.changes = &lists.changes[index];
  w.n = lists.patterns[3 * index];
  w.m = lists.patterns[3 * index + 1];
  w.dim = lists.patterns[3 * index + 2];
  check_grouping(*w.weight, std::max<int64_t>(w.n, 1), w.m, w.dim, false);
  check_bits(*w.bits, *w.weight, w.dim);
  check_operand(*w.weight, *w.sparse, "weights and sparse");
  w.sparse_type = narrower_type_of(*w.sparse, w.weight_type, "weights and sparse");
  NMS_CHECK(w.changes->scalar_type() == ScalarType::Long && w.changes->numel() == 1,
            "changes must be one int64 each, on the weights' device");
  check_same_device(*w.weight, *w.changes, "weights and changes");
  return w;
}

inline Term term_of(const std::string& term) {
  if (term == "none") return Term::kNone;
  if (term == "gradient") return Term::kGradient;
  if (term == "decoupled") return Term::kDecoupled;
  NMS_CHECK(term == "masked", "term must be \"none\", \"gradient\", \"decoupled\" or \"masked\", got \"", term, "\"");
  return Term::kMasked;
}

// A number that lives with the weights; null if it is absent.
inline const float* scalar_of(const std::optional<Tensor>& t, const TensorList& weights, const char* name) {
  if (!t) return nullptr;
  NMS_CHECK(t->scalar_type() == ScalarType::Float && t->numel() == 1, name, " must be one float32");
  if (!weights.empty()) check_same_device(weights.front(), *t, name);
  return static_cast<const float*>(t->const_data_ptr());
}

inline void check_steps(const TensorList& weights, const TensorList& steps) {
  NMS_CHECK(steps.size() == weights.size(), "there must be as many steps as weights");
  for (const Tensor& step : steps) scalar_of(step, weights, "steps");
}

// Without what may live on a device: grad_scale, and a factor of lr.
inline SgdOptions sgd_options(const std::string& term, double lambda_w, double lr, double momentum, double dampening,
                              double weight_decay, bool nesterov, bool maximize, bool first) {
  SgdOptions options;
  options.term = term_of(term);
  options.lambda_w = lambda_w;
  options.lr = lr;
  options.momentum = momentum;
  options.dampening = dampening;
  options.weight_decay = weight_decay;
  options.nesterov = nesterov;
  options.maximize = maximize;
  options.first = first;
  return options;
}

inline AdamWOptions adamw_options(const std::string& term, double lambda_w, double lr, double beta1, double beta2,
                                  double eps, double weight_decay, bool amsgrad, bool maximize) {
  AdamWOptions options;
  options.term = term_of(term);
  options.lambda_w = lambda_w;
  options.lr = lr;
  options.beta1 = beta1;
  options.beta2 = beta2;
  options.eps = eps;
  options.weight_decay = weight_decay;
  options.amsgrad = amsgrad;
  options.maximize = maximize;
  return options;
}

}  // namespace nms
