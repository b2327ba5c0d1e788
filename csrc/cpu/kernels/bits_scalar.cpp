// Packed masks to and from bytes, the SR-STE term on the weights that a mask prunes, and masked copies of another
// dtype.
#include "../../core/convert.h"
#include "../../core/dtype_switch.h"
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
