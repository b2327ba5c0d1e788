// Packed masks to and from bytes, multiples of weights added to gradients, masked copies of another dtype, and the
// thresholds of groups.
#include "../../core/convert.h"
#include "../../core/dtype_switch.h"
#include "../../core/votes.h"
#include "kernels.h"

namespace nms {

void pack_bits(const uint8_t* mask, int64_t mask_row, int64_t mask_k, uint8_t* bits, int64_t bits_row, int64_t rows,
               int64_t k) {
  for (int64_t r = 0; r < rows; ++r) {
    const uint8_t* in = mask + r * mask_row;
    uint8_t* out = bits + r * bits_row;
    for (int64_t first = 0; first < k; first += 8) {
      const int len = static_cast<int>(k - first < 8 ? k - first : 8);
      unsigned byte = 0;
      for (int i = 0; i < len; ++i) byte |= static_cast<unsigned>(in[(first + i) * mask_k] != 0) << i;
      out[first >> 3] = static_cast<uint8_t>(byte);
    }
  }
}

void unpack_bits(const uint8_t* bits, int64_t bits_row, uint8_t* mask, int64_t mask_row, int64_t mask_k, int64_t rows,
                 int64_t k) {
  for (int64_t r = 0; r < rows; ++r) {
    const uint8_t* in = bits + r * bits_row;
    uint8_t* out = mask + r * mask_row;
    for (int64_t i = 0; i < k; ++i) out[i * mask_k] = in[i >> 3] >> (i & 7) & 1;
  }
}

void add_pruned(DType grad_dtype, void* grad, int64_t grad_k, DType w_dtype, const void* w, int64_t w_k,
                const uint8_t* bits, int64_t k, double factor) {
  switch_gradient_dtype(grad_dtype, [&](auto g) {
    switch_gradient_dtype(w_dtype, [&](auto d) {
      using Sum = typename Arithmetic<g>::Type;
      auto* grad_bits = static_cast<typename Element<g>::Bits*>(grad);
      auto* w_bits = static_cast<const typename Element<d>::Bits*>(w);
      for (int64_t i = 0; i < k; ++i) {
        if (bits[i >> 3] >> (i & 7) & 1) continue;
        const Sum term = static_cast<Sum>(factor) * static_cast<Sum>(to_arithmetic<d>(w_bits[i * w_k]));
        grad_bits[i * grad_k] = from_arithmetic<g>(to_arithmetic<g>(grad_bits[i * grad_k]) + term);
      }
    });
  });
}

void add_scaled(DType out_dtype, DType w_dtype, const AddPanel& p) {
  // The inner loop runs along memory.
  const bool along_k = p.out_k == 1 || p.rows == 1;
  const int64_t lines = along_k ? p.rows : p.k, length = along_k ? p.k : p.rows;
  const int64_t out_line = along_k ? p.out_row : p.out_k, out_step = along_k ? p.out_k : p.out_row;
  const int64_t w_line = along_k ? p.w_row : p.w_k, w_step = along_k ? p.w_k : p.w_row;
  switch_gradient_dtype(out_dtype, [&](auto g) {
    switch_gradient_dtype(w_dtype, [&](auto d) {
      using Sum = typename Arithmetic<g>::Type;
      using Out = typename Element<g>::Bits;
      const Sum factor = static_cast<Sum>(p.factor);
      for (int64_t line = 0; line < lines; ++line) {
        const Out* grad = static_cast<const Out*>(p.grad) + line * out_line;
        Out* out = static_cast<Out*>(p.out) + line * out_line;
        auto* w = static_cast<const typename Element<d>::Bits*>(p.w) + line * w_line;
        const auto add = [&](int64_t at, int64_t from) {
          const Sum term = factor * static_cast<Sum>(to_arithmetic<d>(w[from]));
          out[at] = from_arithmetic<g>(to_arithmetic<g>(grad[at]) + term);
        };
        if (out_step == 1 && w_step == 1)
          for (int64_t i = 0; i < length; ++i) add(i, i);
        else
          for (int64_t i = 0; i < length; ++i) add(i * out_step, i * w_step);
      }
    });
  });
}

void group_thresholds(DType dtype, const void* w, int64_t w_row, int64_t w_k, void* thresholds, int64_t thresholds_row,
                      int64_t rows, int64_t k, int m) {
  const auto of = [&](auto d) {
    using Bits = typename Element<d>::Bits;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t group = 0; group * m < k; ++group)
        static_cast<Bits*>(thresholds)[r * thresholds_row + group] =
            group_threshold<d>(static_cast<const Bits*>(w) + r * w_row + group * m * w_k, w_k, m);
  };
  if (dtype == DType::kFloat64)
    of(DTypeConstant<DType::kFloat64>{});
  else
    of(DTypeConstant<DType::kFloat32>{});
}

void apply_bits_rounded(DType src_dtype, DType dst_dtype, const ApplyPanel& p) {
  switch_gradient_dtype(src_dtype, [&](auto s) {
    switch_gradient_dtype(dst_dtype, [&](auto d) {
      using To = typename Element<d>::Bits;
      for (int64_t r = 0; r < p.rows; ++r) {
        auto* src = static_cast<const typename Element<s>::Bits*>(p.src) + r * p.src_row;
        auto* dst = static_cast<To*>(p.dst) + r * p.dst_row;
        const uint8_t* bits = p.bits + r * p.bits_row;
        for (int64_t i = 0; i < p.k; ++i) {
          const auto value = static_cast<typename Arithmetic<d>::Type>(to_arithmetic<s>(src[i * p.src_k]));
          const To kept = static_cast<To>(-(bits[i >> 3] >> (i & 7) & 1));
          dst[i * p.dst_k] = static_cast<To>(from_arithmetic<d>(value) & kept);
        }
      }
    });
  });
}

}  // namespace nms
