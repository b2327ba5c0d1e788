// Reading packed weights, and checking weights and indices before anything trusts them.
#include "../../core/bits.h"
#include "../../core/packed.h"
#include "../../core/dtype_switch.h"
#include "kernels.h"

namespace nms {
namespace {

template <class Bits>
void decompress_rows(const void* values, int64_t values_row, const uint8_t* indices, int64_t indices_row, void* dense,
                     int64_t dense_row, int64_t dense_k, int64_t rows, int64_t k, PackedFormat format) {
  const int64_t groups = (k + format.m - 1) / format.m;
  for (int64_t r = 0; r < rows; ++r) {
    const Bits* value = static_cast<const Bits*>(values) + r * values_row;
    const uint8_t* codes = indices + r * indices_row;
    Bits* out = static_cast<Bits*>(dense) + r * dense_row;
    for (int64_t i = 0; i < k; ++i) out[i * dense_k] = 0;
    for (int64_t group = 0; group < groups; ++group, value += format.n) {
      GroupDecoder decoder(read_bits(codes, group * format.group_bits, format.group_bits), format);
      for (int j = 0; j < format.n; ++j) {
        const int position = decoder.next();
        const int64_t i = group * format.m + position;
        if (position >= 0 && i < k) out[i * dense_k] = value[j];
      }
    }
  }
}

}  // namespace

void decompress(int element_size, const void* values, int64_t values_row, const uint8_t* indices, int64_t indices_row,
                void* dense, int64_t dense_row, int64_t dense_k, int64_t rows, int64_t k, int n, int m) {
  const PackedFormat format = packed_format(n, m);
  auto* run = element_size == 1   ? decompress_rows<uint8_t>
              : element_size == 2 ? decompress_rows<uint16_t>
              : element_size == 4 ? decompress_rows<uint32_t>
                                  : decompress_rows<uint64_t>;
  run(values, values_row, indices, indices_row, dense, dense_row, dense_k, rows, k, format);
}

int64_t find_bad_indices(const uint8_t* indices, int64_t indices_row, int64_t rows, int64_t groups, int n, int m) {
  const PackedFormat format = packed_format(n, m);
  const int64_t used = groups * format.group_bits;
  for (int64_t r = 0; r < rows; ++r) {
    const uint8_t* codes = indices + r * indices_row;
    for (int64_t group = 0; group < groups; ++group)
      if (!is_legal_code(read_bits(codes, group * format.group_bits, format.group_bits), format))
        return r * groups + group;
    if (used % 8 != 0 && codes[used / 8] >> (used % 8) != 0) return r * groups + groups - 1;
  }
  return -1;
}

Violation find_violation(DType dtype, const void* src, int64_t src_row, int64_t src_k, int64_t rows, int64_t k, int n,
                         int m) {
  Violation found{-1, 0};
  switch_dtype(dtype, [&](auto d) {
    using Bits = typename Element<d>::Bits;
    const int64_t groups = (k + m - 1) / m;
    for (int64_t r = 0; r < rows; ++r) {
      const Bits* row = static_cast<const Bits*>(src) + r * src_row;
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t first = group * m;
        const int64_t last = first + m < k ? first + m : k;
        int nonzeros = 0;
        for (int64_t i = first; i < last; ++i) nonzeros += magnitude_key<d>(row[i * src_k]) != 0;
        if (nonzeros > n) {
          found = Violation{r * groups + group, nonzeros};
          return;
        }
      }
    }
  });
  return found;
}

}  // namespace nms
