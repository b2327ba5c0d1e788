// Sixteen numbers at a time between an element type and the type of its arithmetic.
//
// Note    Included inside a target region (or none, for the scalar kernels); convert_avx2.h or convert_avx512.h follows
//         where there is one.
#pragma once

constexpr int kConvertLanes = 16;

// Instruction sets specialise it.
template <DType D>
struct Conversion {
  using Bits = typename Element<D>::Bits;
  using Number = typename Arithmetic<D>::Type;

  static NMS_INLINE void widen(const Bits* in, Number* out) {
    for (int i = 0; i < kConvertLanes; ++i) out[i] = to_arithmetic<D>(in[i]);
  }
  static NMS_INLINE void narrow(const Number* in, Bits* out) {
    for (int i = 0; i < kConvertLanes; ++i) out[i] = from_arithmetic<D>(in[i]);
  }
};
