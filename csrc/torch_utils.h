// How this project spells tensors, checks and outputs: the only header that knows the libtorch stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "core/select.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // the name that it got after torch 2.11
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

#define NMS_CHECK(condition, ...) STD_TORCH_CHECK(condition, "nmsparse: ", __VA_ARGS__)

namespace nms {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Char:
      return DType::kInt8;
    case ScalarType::Float8_e4m3fn:
      return DType::kFloat8E4M3;
    default:
      break;
  }
  NMS_CHECK(false, name, " must be float64, float32, bfloat16, float16, int8 or float8_e4m3fn");
}

inline DType gradient_dtype_of(const Tensor& t, const char* name) {
  const DType dtype = dtype_of(t, name);
  NMS_CHECK(dtype != DType::kInt8 && dtype != DType::kFloat8E4M3, name,
            " must be float64, float32, bfloat16 or float16");
  return dtype;
}

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  std::vector<int64_t> sizes(t.dim());
  for (size_t d = 0; d < sizes.size(); ++d) sizes[d] = t.size(static_cast<int64_t>(d));
  return sizes;
}

/// The sizes as error messages show them, such as "[2, 3]".
inline std::string shape_text(const Tensor& t) {
  std::string text = "[";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
  return text + "]";
}

inline std::vector<int64_t> strides_of(const Tensor& t) {
  std::vector<int64_t> strides(t.dim());
  for (size_t d = 0; d < strides.size(); ++d) strides[d] = t.stride(static_cast<int64_t>(d));
  return strides;
}

inline bool has_sizes(const Tensor& t, const std::vector<int64_t>& sizes) {
  const auto own = t.sizes();
  return std::equal(own.begin(), own.end(), sizes.begin(), sizes.end());
}

inline int64_t product(const std::vector<int64_t>& sizes) {
  int64_t total = 1;
  for (int64_t size : sizes) total *= size;
  return total;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// [others..., last]: sizes with dim `dim` taken out and `last` put at the end. The shape of packed outputs.
inline std::vector<int64_t> moved_last(std::vector<int64_t> sizes, int64_t dim, int64_t last) {
  sizes.erase(sizes.begin() + dim);
  sizes.push_back(last);
  return sizes;
}

// [others..., last] -> the last size taken out and `k` put at `dim`. The shape of unpacked outputs.
inline std::vector<int64_t> moved_back(std::vector<int64_t> sizes, int64_t dim, int64_t k) {
  sizes.pop_back();
  sizes.insert(sizes.begin() + dim, k);
  return sizes;
}

inline void check_pattern(int64_t n, int64_t m) {
  NMS_CHECK(1 <= n && n <= m && m <= kMaxM, "pattern n:m must satisfy 1 <= n <= m <= 64, got ", n, ":", m);
}

inline void check_grouping(const Tensor& w, int64_t n, int64_t m, int64_t dim, bool pad) {
  check_pattern(n, m);
  NMS_CHECK(0 <= dim && dim < w.dim(), "dim must be in [0, ", w.dim(), "), got ", dim);
  NMS_CHECK(pad || w.size(dim) % m == 0, "size ", w.size(dim), " of dim ", dim, " is no multiple of m = ", m);
}

inline void check_same_shape(const Tensor& a, const Tensor& b, const char* names) {
  NMS_CHECK(sizes_of(a) == sizes_of(b), names, " must have the same shape");
}

// torch::stable::contiguous asks the dispatcher even where there is nothing to do.
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline void check_same_device(const Tensor& a, const Tensor& b, const char* names) {
  NMS_CHECK(a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index(), names,
            " must be on the same device");
}

// Tensors that are written to hold every element in a place of its own.
inline void check_writable(const Tensor& t, const char* name) {
  for (int64_t d = 0; d < t.dim(); ++d)
    NMS_CHECK(t.stride(d) != 0 || t.size(d) <= 1 || t.numel() == 0, name, " is written to, but is expanded along dim ",
              d);
}

// bits as the packed mask of a tensor of w's shape, grouped along dim.
inline void check_bits(const Tensor& bits, const Tensor& w, int64_t dim) {
  NMS_CHECK(0 <= dim && dim < w.dim(), "dim must be in [0, ", w.dim(), "), got ", dim);
  NMS_CHECK(bits.scalar_type() == ScalarType::Byte && bits.is_contiguous(), "bits must be contiguous uint8");
  NMS_CHECK(sizes_of(bits) == moved_last(sizes_of(w), dim, ceil_div(w.size(dim), 8)),
            "bits must have the shape of w with its group dim moved last and divided by 8");
  check_same_device(bits, w, "w and bits");
}

// The outputs of a pruning: `out` stands where w does, element for element; bits is its packed mask or absent.
inline void check_prune_outputs(const Tensor& w, const Tensor& out, const std::optional<Tensor>& bits, int64_t dim) {
  check_same_shape(w, out, "w and out");
  check_same_device(w, out, "w and out");
  NMS_CHECK(w.scalar_type() == out.scalar_type(), "w and out must have the same dtype");
  check_writable(out, "out");
  if (bits) check_bits(*bits, w, dim);
}

// A new contiguous tensor on the device of `like`. torch::stable::new_empty finds the same by name in the dispatcher,
// which takes about as long as the product of a small layer.
// A weight whose groups have thresholds.
inline void check_thresholded(const Tensor& w, int64_t m, int64_t dim) {
  const bool exact = w.scalar_type() == ScalarType::Double || w.scalar_type() == ScalarType::Float;
  NMS_CHECK(exact, "weights must be float64 or float32");
  check_grouping(w, 1, m, dim, false);
}

inline void check_thresholds(const Tensor& w, const Tensor& thresholds, int64_t m, int64_t dim) {
  check_thresholded(w, m, dim);
  NMS_CHECK(thresholds.scalar_type() == w.scalar_type(), "thresholds must have the dtype of ws");
  NMS_CHECK(sizes_of(thresholds) == moved_last(sizes_of(w), dim, w.size(dim) / m),
            "thresholds must have shape [other dims..., groups]");
  NMS_CHECK(thresholds.is_contiguous(), "thresholds must be contiguous");
  check_same_device(w, thresholds, "ws and thresholds");
}

inline void check_counts(const Tensor& counts, size_t length) {
  NMS_CHECK(counts.scalar_type() == ScalarType::Long && counts.is_contiguous() && counts.dim() == 1 &&
                counts.size(0) == static_cast<int64_t>(length),
            "counts must be torch.int64 [", length, "]");
}

inline Tensor new_empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(1, sizes[d]);
  int32_t device = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device, like.get_device_index(), &made));
  return Tensor(made);
}

// Like the constructor's answer to torch.empty_like: the same strides where `like` is dense in memory.
inline Tensor new_like(const Tensor& like) { return torch::stable::empty_like(like); }

inline Tensor new_bits(const Tensor& w, int64_t dim) {
  return new_empty(w, moved_last(sizes_of(w), dim, ceil_div(w.size(dim), 8)), ScalarType::Byte);
}

inline uint8_t* bytes_of(const Tensor& t) { return static_cast<uint8_t*>(t.mutable_data_ptr()); }
inline const uint8_t* const_bytes_of(const Tensor& t) { return static_cast<const uint8_t*>(t.const_data_ptr()); }

}  // namespace nms
