// Element types and the key by which weights are ranked.
//
// The key of a weight is the integer order of |w|. For every floating point format the magnitude bits are already in
// that order, so ranking needs no floating point arithmetic and gives the same answer on every device: denormals are
// not flushed and -0.0 equals 0.0. All NaNs share one key, just above infinity.
#pragma once

#include <cstdint>

#include "hd.h"

namespace nms {

enum class DType : int { kFloat64, kFloat32, kBFloat16, kFloat16, kInt8, kFloat8E4M3, kCount };

constexpr int kNumDTypes = static_cast<int>(DType::kCount);

// Keys are signed because SIMD instruction sets compare signed integers; every key is >= 0.
template <DType D>
struct Element;

template <>
struct Element<DType::kFloat64> {
  using Bits = uint64_t;
  using Key = int64_t;
  static constexpr Bits kMagnitude = 0x7fffffffffffffffull;
  static constexpr Key kNaN = 0x7ff0000000000001ll;
};
template <>
struct Element<DType::kFloat32> {
  using Bits = uint32_t;
  using Key = int32_t;
  static constexpr Bits kMagnitude = 0x7fffffffu;
  static constexpr Key kNaN = 0x7f800001;
};
template <>
struct Element<DType::kBFloat16> {
  using Bits = uint16_t;
  using Key = int16_t;
  static constexpr Bits kMagnitude = 0x7fff;
  static constexpr Key kNaN = 0x7f81;
};
template <>
struct Element<DType::kFloat16> {
  using Bits = uint16_t;
  using Key = int16_t;
  static constexpr Bits kMagnitude = 0x7fff;
  static constexpr Key kNaN = 0x7c01;
};
template <>
struct Element<DType::kFloat8E4M3> {
  using Bits = uint8_t;
  using Key = int16_t;
  static constexpr Bits kMagnitude = 0x7f;
  static constexpr Key kNaN = 0x7f;  // the format has one NaN magnitude and no infinity
};
template <>
struct Element<DType::kInt8> {
  using Bits = uint8_t;
  using Key = int16_t;  // |-128| = 128 needs more than int8_t
};

// As: a wider type than Key spares a GPU, whose registers have 32 bits, the narrowing.
template <DType D, class As = typename Element<D>::Key>
NMS_HD As magnitude_key(typename Element<D>::Bits bits) {
  if constexpr (D == DType::kInt8) {
    const int value = static_cast<int8_t>(bits);
    return static_cast<As>(value < 0 ? -value : value);
  } else {
    const As key = static_cast<As>(bits & Element<D>::kMagnitude);
    const As nan = Element<D>::kNaN;
    return key < nan ? key : nan;
  }
}

}  // namespace nms
