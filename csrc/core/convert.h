// Values of the element types as float64/float32 and back, from their bits: the torch-free kernels know no Half class.
#pragma once

#include <cstdint>
#include <cstring>

#include "dtype.h"
#include "hd.h"

namespace nms {

template <class To, class From>
NMS_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// A small binary floating point format (sign, exponent, mantissa) widened to float32; exact.
template <int kExponentBits, int kMantissaBits, bool kHasInfinity>
NMS_HD float small_float_to_float(uint32_t bits) {
  constexpr int kBias = (1 << (kExponentBits - 1)) - 1;
  constexpr uint32_t kMaxExponent = (1u << kExponentBits) - 1;
  const uint32_t sign = bits >> (kExponentBits + kMantissaBits) & 1;
  const uint32_t exponent = bits >> kMantissaBits & kMaxExponent;
  const uint32_t mantissa = bits & ((1u << kMantissaBits) - 1);
  float magnitude;
  if (kHasInfinity && exponent == kMaxExponent) {
    magnitude = bit_cast<float>(0x7f800000u | mantissa << (23 - kMantissaBits));
  } else if (!kHasInfinity &&
             (bits & ((1u << (kExponentBits + kMantissaBits)) - 1)) == (1u << (kExponentBits + kMantissaBits)) - 1) {
    magnitude = bit_cast<float>(0x7fc00000u);
  } else if (exponent == 0) {  // zero or denormal: mantissa * 2^(1 - bias - mantissa bits)
    magnitude =
        static_cast<float>(mantissa) * bit_cast<float>(static_cast<uint32_t>(128 - kBias - kMantissaBits) << 23);
  } else {
    magnitude = bit_cast<float>((exponent + 127 - kBias) << 23 | mantissa << (23 - kMantissaBits));
  }
  return sign ? -magnitude : magnitude;
}

// float32 to a 16-bit format, round to nearest even; NaN stays NaN.
NMS_HD uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

NMS_HD uint16_t float_to_float16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00);  // rounds past 65504
  if (magnitude < 0x38800000u) {  // denormal result: adding 0.5 lets the float adder round to multiples of 2^-24
    const float shifted = bit_cast<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000u));
  }
  const uint32_t rebiased = magnitude - (112u << 23);
  return static_cast<uint16_t>(sign | (rebiased + 0xfff + (rebiased >> 13 & 1)) >> 13);
}

// The type in which arithmetic on an element type is done.
template <DType D>
struct Arithmetic {
  using Type = float;
};
template <>
struct Arithmetic<DType::kFloat64> {
  using Type = double;
};

template <DType D>
NMS_HD typename Arithmetic<D>::Type to_arithmetic(typename Element<D>::Bits bits) {
  if constexpr (D == DType::kFloat64) return bit_cast<double>(bits);
  if constexpr (D == DType::kFloat32) return bit_cast<float>(bits);
  if constexpr (D == DType::kBFloat16) return bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  if constexpr (D == DType::kFloat16) return small_float_to_float<5, 10, true>(bits);
  if constexpr (D == DType::kFloat8E4M3) return small_float_to_float<4, 3, false>(bits);
  if constexpr (D == DType::kInt8) return static_cast<float>(static_cast<int8_t>(bits));
}

template <DType D>
NMS_HD typename Element<D>::Bits from_arithmetic(typename Arithmetic<D>::Type value) {
  static_assert(D != DType::kFloat8E4M3 && D != DType::kInt8, "storage formats: nothing is accumulated in them");
  if constexpr (D == DType::kBFloat16) return float_to_bfloat16(value);
  if constexpr (D == DType::kFloat16) return float_to_float16(value);
  if constexpr (D == DType::kFloat32 || D == DType::kFloat64) return bit_cast<typename Element<D>::Bits>(value);
}

}  // namespace nms
