// What the ops on panels (core/panel_layout.h) have in common: checks of their arguments, their layout.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "../core/panel_layout.h"
#include "../torch_utils.h"
#include "kernels/linear.h"

namespace nms {

// A thread is worth waking for about this many multiply-adds of vectors: a few microseconds.
constexpr int64_t kThreadWork = 16384;

inline void check_panel_pattern(int64_t n, int64_t m) {
  NMS_CHECK(1 <= n && n <= m && m <= kMaxPanelM, "pattern n:m must satisfy 1 <= n <= m <= ", kMaxPanelM, ", got ", n,
            ":", m);
}

inline DType panel_dtype_of(const Tensor& t, const char* name) {
  const ScalarType type = t.scalar_type();
  NMS_CHECK(type == ScalarType::Double || type == ScalarType::Float || type == ScalarType::BFloat16 ||
                type == ScalarType::Half,
            name, " must be float64, float32, bfloat16 or float16");
  return dtype_of(t, name);
}

inline PanelLayout layout_of(const Tensor& values, int64_t n, int64_t m, int64_t k) {
  return panel_layout(static_cast<int>(n), static_cast<int>(m), k, dtype_of(values, "values"));
}

inline std::vector<int64_t> value_sizes(const PanelLayout& layout, int64_t rows) {
  std::vector<int64_t> sizes{panel_count(rows), layout.steps, layout.slots, kPanelRows};
  if (layout.halves > 1) sizes.push_back(layout.halves);
  return sizes;
}

inline std::vector<int64_t> index_sizes(const PanelLayout& layout, int64_t rows) {
  return {panel_count(rows), layout.words, kPanelRows};
}

// What there are panels of; products of int8 have an op of their own (panel_linear_int8).
inline void check_panel_values(const Tensor& values, const char* name) {
  if (values.scalar_type() != ScalarType::Char) panel_dtype_of(values, name);
}

inline void check_panel_shapes(const Tensor& value_panels, const Tensor& index_panels, int64_t n, int64_t m,
                               int64_t rows, int64_t k) {
  check_panel_pattern(n, m);
  NMS_CHECK(rows >= 0 && k >= 0, "rows and k must not be negative, got ", rows, " and ", k);
  check_panel_values(value_panels, "value_panels");
  const PanelLayout layout = layout_of(value_panels, n, m, k);
  NMS_CHECK(value_panels.is_contiguous() && has_sizes(value_panels, value_sizes(layout, rows)),
            "value_panels must be contiguous, of the shape that panel_pack gives for ", rows, " rows of ", k, " in ", n,
            ":", m);
  NMS_CHECK(index_panels.scalar_type() == ScalarType::Int && index_panels.is_contiguous() &&
                has_sizes(index_panels, index_sizes(layout, rows)),
            "index_panels must be contiguous int32, of the shape that panel_pack gives for ", rows, " rows of ", k,
            " in ", n, ":", m);
  check_same_device(value_panels, index_panels, "value_panels and index_panels");
}

inline void check_panels(const Tensor& value_panels, const Tensor& index_panels, int64_t n, int64_t m, int64_t rows,
                         int64_t k) {
  panel_dtype_of(value_panels, "value_panels");
  check_panel_shapes(value_panels, index_panels, n, m, rows, k);
}

// x and bias beside the panels of a weight with `rows` outputs. Makes the bias contiguous.
inline void check_product_operands(const Tensor& x, const Tensor& value_panels, std::optional<Tensor>& bias,
                                   int64_t rows) {
  NMS_CHECK(x.scalar_type() == value_panels.scalar_type(), "x must have the dtype of value_panels");
  check_same_device(x, value_panels, "x and value_panels");
  if (!bias) return;
  NMS_CHECK(bias->dim() == 1 && bias->size(0) == rows && bias->scalar_type() == x.scalar_type(), "bias must have ",
            rows, " elements of the dtype of x");
  check_same_device(x, *bias, "x and bias");
  bias = as_contiguous(*bias);
}

inline Activation activation_of(const std::string& name) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "silu") return Activation::kSilu;
  NMS_CHECK(false, "activation must be \"none\", \"relu\", \"gelu\" or \"silu\", got \"", name, "\"");
}

}  // namespace nms
