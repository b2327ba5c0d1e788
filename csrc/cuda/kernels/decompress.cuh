// What    The dense weight from its packed form. Codes that no encoder writes are harmless: what points outside its
//         group or past k is ignored, and of equal indices the last one counts.
// Layout  values: [rows, groups * n], indices: [rows, index bytes]; dense: rows x k, any strides. A thread looks up,
// for
//         each of its positions, which of the group's values belongs there; nothing is written twice.
// Launch  One thread per 16 bytes of a dense row, or, where the group dim is strided, per group, with neighbouring
//         threads on neighbouring rows.
#pragma once

#include "../../core/packed.h"
#include "chunk.h"
#include "launch.cuh"
#include "layout.h"

namespace nms {

// Which of a group's values stands at `position`; -1: none.
NMS_HD int value_at(uint64_t code, PackedFormat format, int position) {
  if (format.index_bits == 0) {
    if (!(code >> position & 1)) return -1;
    const int rank = popcount64(code & low_bits(position));
    return rank < format.n ? rank : -1;
  }
  for (int j = format.n - 1; j >= 0; --j)
    if (static_cast<int>(code >> (j * format.index_bits) & low_bits(format.index_bits)) == position) return j;
  return -1;
}

template <class Bits>
struct Decompress {
  Spans spans;  // of the dense weight
  const Bits* values;
  int64_t values_row;  // elements
  const uint8_t* indices;
  int64_t indices_row;  // bytes
  Bits* dense;
  PackedFormat format;
  Divisor m;
  bool aligned;  // every span is one aligned chunk

  NMS_HD int64_t count() const { return spans.count(); }

  NMS_HD void operator()(int64_t thread) const {
    const Spans::At at = spans.at(thread);
    Reader reader(*this, at);
    Bits* out = dense + at.a;
    if (aligned) {
      Chunk chunk{};
      NMS_UNROLL
      for (int i = 0; i < kChunkElements<Bits>; ++i) set_chunk_element(&chunk, i, reader.next());
      store_chunk(out, chunk);
    } else {
      for (int64_t i = 0; i < at.len; ++i) out[i * spans.layout.a_k] = reader.next();
    }
  }

 private:
  // The weights of a row, one after the other.
  class Reader {
   public:
    NMS_HD Reader(const Decompress& op, const Spans::At& at) : op_(op) {
      group_ = op.m.quotient(at.first_k);
      position_ = static_cast<int>(at.first_k - group_ * op.format.m);
      values_ = op.values + at.row * op.values_row + group_ * op.format.n;
      codes_ = op.indices + at.row * op.indices_row;
      read_code();
    }

    NMS_HD Bits next() {
      if (position_ == op_.format.m) {
        position_ = 0;
        ++group_;
        values_ += op_.format.n;
        read_code();
      }
      const int j = value_at(code_, op_.format, position_++);
      return j >= 0 ? values_[j] : Bits{0};
    }

   private:
    NMS_HD void read_code() { code_ = read_bits(codes_, group_ * op_.format.group_bits, op_.format.group_bits); }

    const Decompress& op_;
    const Bits* values_;
    const uint8_t* codes_;
    int64_t group_;
    int position_;
    uint64_t code_;
  };
};

template <class Bits>
Decompress<Bits> make_decompress(const Layout& layout /* not empty */, const Bits* values, const uint8_t* indices,
                                 Bits* dense, PackedFormat format) {
  constexpr int64_t kElements = kChunkElements<Bits>;
  const bool line = layout.a_k == 1;
  const int64_t groups = divide_up(layout.k, format.m);
  bool aligned = line && layout.k % kElements == 0 && is_aligned(dense, kChunkBytes);
  for (int d = 0; d < layout.rows.dims; ++d) aligned = aligned && layout.rows.a[d] % kElements == 0;
  return Decompress<Bits>{make_spans(layout, line ? kElements : format.m),
                          values,
                          groups * format.n,
                          indices,
                          index_row_bytes(format, groups),
                          dense,
                          format,
                          Divisor(format.m),
                          aligned};
}

}  // namespace nms
