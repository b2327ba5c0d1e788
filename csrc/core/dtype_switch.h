// From a run-time DType or pattern size to a template argument: fn is called with a std::integral_constant.
#pragma once

#include <type_traits>

#include "dtype.h"

namespace nms {

template <DType D>
using DTypeConstant = std::integral_constant<DType, D>;

template <class Fn>
void switch_dtype(DType dtype, Fn fn) {
  switch (dtype) {
    case DType::kFloat64:
      return fn(DTypeConstant<DType::kFloat64>{});
    case DType::kFloat32:
      return fn(DTypeConstant<DType::kFloat32>{});
    case DType::kBFloat16:
      return fn(DTypeConstant<DType::kBFloat16>{});
    case DType::kFloat16:
      return fn(DTypeConstant<DType::kFloat16>{});
    case DType::kInt8:
      return fn(DTypeConstant<DType::kInt8>{});
    case DType::kFloat8E4M3:
      return fn(DTypeConstant<DType::kFloat8E4M3>{});
    case DType::kCount:
      return;
  }
}

// The types in which gradients come.
template <class Fn>
void switch_gradient_dtype(DType dtype, Fn fn) {
  switch_dtype(dtype, [&](auto type) {
    constexpr DType kType = decltype(type)::value;
    if constexpr (kType == DType::kFloat64 || kType == DType::kFloat32 || kType == DType::kBFloat16 ||
                  kType == DType::kFloat16)
      fn(type);
  });
}

// The usual pattern sizes get loops of known length; 0 stands for all others.
template <class Fn>
void switch_m(int m, Fn fn) {
  switch (m) {
    case 2:
      return fn(std::integral_constant<int, 2>{});
    case 4:
      return fn(std::integral_constant<int, 4>{});
    case 8:
      return fn(std::integral_constant<int, 8>{});
    case 16:
      return fn(std::integral_constant<int, 16>{});
    case 32:
      return fn(std::integral_constant<int, 32>{});
    default:
      return fn(std::integral_constant<int, 0>{});
  }
}

}  // namespace nms
