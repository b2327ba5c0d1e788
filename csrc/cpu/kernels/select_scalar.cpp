// Selection, compression and their table for every CPU: no instruction set is assumed.
#include <utility>

#include "../../core/bits.h"
#include "../../core/convert.h"
#include "../../core/packed.h"
#include "../../core/dtype_switch.h"
#include "group_masks.h"
#include "votes.h"
#include "kernels.h"

namespace nms {
namespace {

// Eight weights at a time: all ones where a bit of the byte is set.
template <class Bits>
struct ByteMasks {
  Bits of[256][8] = {};
  constexpr ByteMasks() {
    for (int byte = 0; byte < 256; ++byte)
      for (int i = 0; i < 8; ++i) of[byte][i] = static_cast<Bits>(byte >> i & 1 ? ~Bits{0} : Bits{0});
  }
};

// out = where(bit, in, 0) for one row.
template <class Bits>
void keep_row(const Bits* in, int64_t in_k, Bits* out, int64_t out_k, const uint8_t* bits, int64_t k) {
  static constexpr ByteMasks<Bits> kMasks;
  const int64_t whole = in_k == 1 && out_k == 1 ? k / 8 : 0;
  for (int64_t byte = 0; byte < whole; ++byte)
    for (int i = 0; i < 8; ++i) out[8 * byte + i] = in[8 * byte + i] & kMasks.of[bits[byte]][i];
  for (int64_t i = 8 * whole; i < k; ++i) out[i * out_k] = in[i * in_k] & kMasks.of[bits[i >> 3]][i & 7];
}

template <DType D>
void select(const SelectPanel& p) {
  using Bits = typename Element<D>::Bits;
  constexpr int kChunkGroups = 64;  // whole mask bytes for every m
  uint8_t chunk_bits[kChunkGroups * kMaxM / 8];
  const int64_t chunk = kChunkGroups * p.m;
  switch_m(p.m, [&](auto m) {
    for (int64_t r = 0; r < p.rows; ++r) {
      const Bits* src = static_cast<const Bits*>(p.src) + r * p.src_row;
      Bits* dst = static_cast<Bits*>(p.dst) + (p.dst ? r * p.dst_row : 0);
      uint8_t* row_bits = p.bits ? p.bits + r * p.bits_row : nullptr;
      for (int64_t first = 0; first < p.k; first += chunk) {
        const int64_t count = p.k - first < chunk ? p.k - first : chunk;
        uint8_t* bits = row_bits ? row_bits + first / 8 : chunk_bits;
        BitWriter writer(bits);
        for_each_group<D, m>(src + first * p.src_k, p.src_k, count, p.n, p.m,
                             [&](int64_t, int len, uint64_t mask) { writer.put(mask, len); });
        writer.finish();
        if (p.dst) keep_row(src + first * p.src_k, p.src_k, dst + first * p.dst_k, p.dst_k, bits, count);
      }
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
  for (int64_t r = 0; r < p.rows; ++r)
    keep_row(static_cast<const Bits*>(p.src) + r * p.src_row, p.src_k, static_cast<Bits*>(p.dst) + r * p.dst_row,
             p.dst_k, p.bits + r * p.bits_row, p.k);
}

void add_pruned_row(const AddPrunedRow& row) {
  static constexpr ByteMasks<uint32_t> kMasks;
  for (int64_t i = 0; i < row.k; ++i) {
    const float sum = row.grad[i] + row.factor * row.w[i];
    const uint32_t kept = kMasks.of[row.bits[i >> 3]][i & 7];
    const uint32_t out = (bit_cast<uint32_t>(row.grad[i]) & kept) | (bit_cast<uint32_t>(sum) & ~kept);
    row.out[i] = bit_cast<float>(out);
  }
}

void add_kept_row(const AddPrunedRow& row) {
  static constexpr ByteMasks<uint32_t> kMasks;
  for (int64_t i = 0; i < row.k; ++i) {
    const float sum = row.grad[i] + row.factor * row.w[i];
    row.out[i] = bit_cast<float>(bit_cast<uint32_t>(sum) & kMasks.of[row.bits[i >> 3]][i & 7]);
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
                 add_pruned_row,
                 add_kept_row,
                 count_differing,
                 {count_votes<DType::kFloat64>, count_votes<DType::kFloat32>}};
}

}  // namespace

const Kernels& scalar_kernels() {
  static const Kernels table = make_table(std::make_integer_sequence<int, kNumDTypes>{});
  return table;
}

}  // namespace nms
