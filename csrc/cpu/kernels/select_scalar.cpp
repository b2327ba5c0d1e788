// Selection, compression and their table for every CPU: no instruction set is assumed.
#include <utility>

#include "../../core/bits.h"
#include "../../core/packed.h"
#include "dtype_switch.h"
#include "group_masks.h"
#include "kernels.h"

namespace nms {
namespace {

template <DType D>
void select(const SelectPanel& p) {
  using Bits = typename Element<D>::Bits;
  switch_m(p.m, [&](auto m) {
    for (int64_t r = 0; r < p.rows; ++r) {
      const Bits* src = static_cast<const Bits*>(p.src) + r * p.src_row;
      Bits* dst = static_cast<Bits*>(p.dst) + (p.dst ? r * p.dst_row : 0);
      BitWriter bits(p.bits + (p.bits ? r * p.bits_row : 0));
      for_each_group<D, m>(src, p.src_k, p.k, p.n, p.m, [&](int64_t group, int len, uint64_t mask) {
        if (p.dst) {
          const int64_t first = group * p.m;
          for (int i = 0; i < len; ++i) {
            const Bits keep = static_cast<Bits>(-static_cast<Bits>(mask >> i & 1));
            dst[(first + i) * p.dst_k] = src[(first + i) * p.src_k] & keep;
          }
        }
        if (p.bits) bits.put(mask, len);
      });
      if (p.bits) bits.finish();
    }
  });
}

template <DType D>
void compress(const CompressPanel& p) {
  using Bits = typename Element<D>::Bits;
  const PackedFormat format = packed_format(p.n, p.m);
  switch_m(p.m, [&](auto m) {
    for (int64_t r = 0; r < p.rows; ++r) {
      const Bits* src = static_cast<const Bits*>(p.src) + r * p.src_row;
      Bits* value = static_cast<Bits*>(p.values) + r * p.values_row;
      BitWriter indices(p.indices + r * p.indices_row);
      for_each_group<D, m>(src, p.src_k, p.k, p.n, p.m, [&](int64_t group, int len, uint64_t mask) {
        mask = fill_short_group(mask, len, p.n);
        indices.put(encode_group(mask, format), format.group_bits);
        for (uint64_t rest = mask; rest != 0; rest &= rest - 1) {
          const int position = lowest_bit(rest);
          *value++ = position < len ? src[(group * p.m + position) * p.src_k] : Bits{0};
        }
      });
      indices.finish();
    }
  });
}

template <class Bits>
void apply_bits(const ApplyPanel& p) {
  for (int64_t r = 0; r < p.rows; ++r) {
    const Bits* src = static_cast<const Bits*>(p.src) + r * p.src_row;
    Bits* dst = static_cast<Bits*>(p.dst) + r * p.dst_row;
    const uint8_t* bits = p.bits + r * p.bits_row;
    for (int64_t i = 0; i < p.k; ++i) {
      const Bits keep = static_cast<Bits>(-static_cast<Bits>(bits[i >> 3] >> (i & 7) & 1));
      dst[i * p.dst_k] = src[i * p.src_k] & keep;
    }
  }
}

int64_t count_differing(const uint8_t* a, const uint8_t* b, int64_t bytes) {
  int64_t count = 0;
  int64_t i = 0;
  for (; i + 8 <= bytes; i += 8) {
    uint64_t x, y;
    __builtin_memcpy(&x, a + i, 8);
    __builtin_memcpy(&y, b + i, 8);
    count += __builtin_popcountll(x ^ y);
  }
  for (; i < bytes; ++i) count += __builtin_popcount(a[i] ^ b[i]);
  return count;
}

template <int... Is>
Kernels make_table(std::integer_sequence<int, Is...>) {
  return Kernels{"scalar",
                 {select<static_cast<DType>(Is)>...},
                 {compress<static_cast<DType>(Is)>...},
                 {apply_bits<uint8_t>, apply_bits<uint16_t>, apply_bits<uint32_t>, apply_bits<uint64_t>},
                 count_differing};
}

}  // namespace

const Kernels& scalar_kernels() {
  static const Kernels table = make_table(std::make_integer_sequence<int, kNumDTypes>{});
  return table;
}

}  // namespace nms
