// What follows a product on CUDA: its arguments' checks, and its launch on a product that is there already.
#pragma once

#include <optional>
#include <string>

#include "../core/activation.h"
#include "cuda_utils.h"

namespace nms {

inline Activation activation_named(const std::string& name) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "silu") return Activation::kSilu;
  NMS_CHECK(false, "activation must be \"none\", \"relu\", \"gelu\" or \"silu\", got \"", name, "\"");
}

// A vector along the rows of a weight, if it is there; makes it contiguous.
inline void check_vector(std::optional<Tensor>& vector, const char* name, int64_t rows, ScalarType type,
                         const Tensor& like) {
  if (!vector) return;
  NMS_CHECK(vector->dim() == 1 && vector->size(0) == rows && vector->scalar_type() == type, name, " must have ", rows,
            " elements of ", type == ScalarType::Float ? "float32" : "the dtype of the result");
  check_same_device(*vector, like, name);
  vector = as_contiguous(*vector);
}

// to = activation(from * scales + bias), both contiguous [..., rows] of one dtype, or the same tensor.
void launch_epilogue(const Tensor& from, const Tensor& to, const std::optional<Tensor>& scales,
                     const std::optional<Tensor>& bias, Activation activation, cudaStream_t stream);

}  // namespace nms
