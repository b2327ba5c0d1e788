#include "plan.h"

#include <cstring>
#include <new>
#include <string>

#include "error.h"

namespace nms::lt {
namespace {

void set_batches(const Api& api, const Opaque* handle, Opaque* mat, int64_t batches, int64_t stride) {
  if (batches == 1) return;
  const int count = static_cast<int>(batches);
  check(api, api.MatDescSetAttribute(handle, mat, MatAttribute::kNumBatches, &count, sizeof count),
        "MatDescSetAttribute", "a batch of " + std::to_string(batches));
  check(api, api.MatDescSetAttribute(handle, mat, MatAttribute::kBatchStride, &stride, sizeof stride),
        "MatDescSetAttribute", "a batch stride of " + std::to_string(stride));
}

// Said here in words; the library would say "not supported", or take a wrong problem for a right one.
void check_supported(const Problem& problem) {
  const std::string why = why_unsupported(problem);
  if (!why.empty()) throw Error(kNotSupported, "cuSPARSELt: " + why);
}

void describe_weight(const Api& api, const Opaque* handle, Descriptor& w, const Problem& p) {
  check_supported(p);
  check(api,
        api.StructuredDescriptorInit(handle, w.get(), p.rows, p.k, p.k, kAlignment, cuda_type(p.type), Order::kRow,
                                     Sparsity::kHalf),
        "StructuredDescriptorInit", describe(p));
  w.filled(api.MatDescriptorDestroy);
  set_batches(api, handle, w.get(), p.batches, p.rows * p.k);
}

}  // namespace

void DescriptorMemory::Free::operator()(std::byte* bytes) const {
  ::operator delete(bytes, std::align_val_t(kDescriptorAlignment));
}

DescriptorMemory::DescriptorMemory(const Api& api, int count)
    : step_((descriptor_bytes(api.version) + kDescriptorAlignment - 1) / kDescriptorAlignment * kDescriptorAlignment),
      bytes_(static_cast<std::byte*>(::operator new(step_* count, std::align_val_t(kDescriptorAlignment)))) {
  std::memset(bytes_.get(), 0, step_ * count);
}

WeightDescriptor::WeightDescriptor(const Api& api, const Opaque* handle, const Problem& problem)
    : memory_(api, 1), w_(memory_[0]) {
  describe_weight(api, handle, w_, problem);
}

Plan::Plan(const Api& api, const Opaque* handle, const Problem& problem)
    : memory_(api, 7),
      w_(memory_[0]),
      x_(memory_[1]),
      c_(memory_[2]),
      y_(memory_[3]),
      product_(memory_[4]),
      selection_(memory_[5]),
      plan_(memory_[6]) {
  describe_matrices(api, handle, problem);
  describe_product(api, handle, problem);
  choose_algorithm(api, handle, problem);
  check(api, api.MatmulPlanInit(handle, plan_.get(), product_.get(), selection_.get()), "MatmulPlanInit",
        describe(problem));
  plan_.filled(api.MatmulPlanDestroy);
  check(api, api.MatmulGetWorkspace(handle, plan_.get(), &workspace_bytes_), "MatmulGetWorkspace", describe(problem));
}

void Plan::describe_matrices(const Api& api, const Opaque* handle, const Problem& p) {
  describe_weight(api, handle, w_, p);
  const auto dense = [&](Descriptor& mat, int64_t rows, int64_t cols, int64_t ld, CudaType type, Order order,
                         int64_t batch_stride) {
    check(api, api.DenseDescriptorInit(handle, mat.get(), rows, cols, ld, kAlignment, type, order),
          "DenseDescriptorInit", describe(p));
    mat.filled(api.MatDescriptorDestroy);
    set_batches(api, handle, mat.get(), p.batches, batch_stride);
  };
  // x [tokens, k] row by row is the transposed B; the same x column by column is B [k, tokens] row by row.
  if (p.x_layout == XLayout::kTokenRows)
    dense(x_, p.tokens, p.k, p.x_ld, cuda_type(p.type), Order::kRow, p.x_batch_stride);
  else
    dense(x_, p.k, p.tokens, p.x_ld, cuda_type(p.type), Order::kRow, p.x_batch_stride);
  dense(c_, p.rows, p.tokens, p.rows, c_type(p), Order::kColumn, p.rows * p.tokens);
  dense(y_, p.rows, p.tokens, p.rows, cuda_type(p.out), Order::kColumn, p.rows * p.tokens);
}

void Plan::describe_product(const Api& api, const Opaque* handle, const Problem& p) {
  const Operation x_op = p.x_layout == XLayout::kTokenRows ? Operation::kTranspose : Operation::kNone;
  check(api,
        api.MatmulDescriptorInit(handle, product_.get(), Operation::kNone, x_op, w_.get(), x_.get(), c_.get(), y_.get(),
                                 compute_type(p.type)),
        "MatmulDescriptorInit", describe(p));
  // The library has no call that destroys a product's descriptor.
  const auto set = [&](MatmulAttribute attribute, const void* data, size_t bytes) {
    check(api, api.MatmulDescSetAttribute(handle, product_.get(), attribute, data, bytes), "MatmulDescSetAttribute",
          describe(p));
  };
  const int on = 1;
  if (p.activation == Activation::kRelu) set(MatmulAttribute::kRelu, &on, sizeof on);
  if (p.activation == Activation::kGelu) set(MatmulAttribute::kGelu, &on, sizeof on);
  if (p.scales) set(MatmulAttribute::kAlphaVectorScaling, &on, sizeof on);
  if (p.bias) set(MatmulAttribute::kBiasPointer, &p.bias, sizeof p.bias);
}

void Plan::choose_algorithm(const Api& api, const Opaque* handle, const Problem& p) {
  check(api, api.MatmulAlgSelectionInit(handle, selection_.get(), product_.get(), Algorithm::kDefault),
        "MatmulAlgSelectionInit", describe(p));
  selection_.filled(api.MatmulAlgSelectionDestroy);
  check(api,
        api.MatmulAlgGetAttribute(handle, selection_.get(), AlgorithmAttribute::kConfigMaxId, &algorithms_,
                                  sizeof algorithms_),
        "MatmulAlgGetAttribute", describe(p));
  const auto set = [&](AlgorithmAttribute attribute, int value) {
    check(api, api.MatmulAlgSetAttribute(handle, selection_.get(), attribute, &value, sizeof value),
          "MatmulAlgSetAttribute", describe(p));
  };
  if (p.choice.id >= 0) set(AlgorithmAttribute::kConfigId, p.choice.id);
  if (p.choice.split_k != 1) set(AlgorithmAttribute::kSplitK, p.choice.split_k);
  if (p.choice.split_k_mode != 0) set(AlgorithmAttribute::kSplitKMode, p.choice.split_k_mode);
}

}  // namespace nms::lt
