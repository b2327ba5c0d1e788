// What    Chooses the n largest |w| of every m and packs them: values side by side, and where each stood.
// Layout  src: rows x k, any strides. values: [rows, groups * n]; indices: [rows, index bytes] (core/packed.h); both in
//         the order of row numbers. One thread packs a unit of groups whose codes fill whole index bytes; their values
//         lie side by side too, and are stored in the widest words that the pattern's alignment allows.
// Launch  CompressStaged: 128 threads a tile of 16 KiB in shared memory (staged.h). M = m for 2, 4, 8, 16, 32; 0: any
// m.
//         CompressStrided: one thread per unit, read where it lies; what no tile fits.
#pragma once

#include <numeric>

#include "../../core/packed.h"
#include "select.cuh"

namespace nms {

// Groups whose codes together end on a byte boundary.
inline int whole_byte_groups(PackedFormat format) { return 8 / std::gcd(format.group_bits, 8); }

// Collects values of 1, 2, 4 or 8 bytes into words of `word_bytes` (a power of two, at most 8) and stores those.
template <class Bits>
class ValueWriter {
 public:
  NMS_HD ValueWriter(Bits* out /* aligned to word_bytes */, int word_bytes)
      : out_(reinterpret_cast<uint8_t*>(out)), word_bytes_(word_bytes) {}

  NMS_HD void put(Bits value) {
    word_ |= static_cast<uint64_t>(value) << (8 * filled_);
    filled_ += static_cast<int>(sizeof(Bits));
    if (filled_ == word_bytes_) flush();
  }

  // What fills no word: the end of a row.
  NMS_HD void finish() {
    if (filled_ == 0) return;
    for (int i = 0; i < filled_; i += static_cast<int>(sizeof(Bits)))
      store_word(out_ + i, word_ >> (8 * i), static_cast<int>(sizeof(Bits)));
  }

 private:
  NMS_HD void flush() {
    store_word(out_, word_, word_bytes_);
    out_ += word_bytes_;
    word_ = 0;
    filled_ = 0;
  }

  uint8_t* out_;
  uint64_t word_ = 0;
  int word_bytes_, filled_ = 0;
};

// The packed weight in memory.
template <class Bits>
struct PackedOut {
  Bits* values;
  int64_t values_row;  // elements
  uint8_t* indices;
  int64_t indices_row;  // bytes
  int word_bytes;       // alignment of a unit's first value
};

template <class Bits>
PackedOut<Bits> packed_out(Bits* values, uint8_t* indices, PackedFormat format, int64_t k, int64_t unit) {
  const int64_t groups = divide_up(k, format.m);
  const int64_t unit_bytes = unit / format.m * format.n * static_cast<int64_t>(sizeof(Bits));
  const int64_t row_bytes = groups * format.n * static_cast<int64_t>(sizeof(Bits));
  int word_bytes = 8;
  while (unit_bytes % word_bytes != 0 || row_bytes % word_bytes != 0 || !is_aligned(values, word_bytes))
    word_bytes /= 2;
  return PackedOut<Bits>{values, groups * format.n, indices, index_row_bytes(format, groups), word_bytes};
}

// Any m: group after group.
template <DType D, class View>
NMS_HD void compress_span(const View& view, int len, PackedFormat format, BitsOf<D>* values, uint8_t* indices) {
  BitWriter writer(indices);
  for (int first = 0; first < len; first += format.m) {
    const int group = len - first < format.m ? len - first : format.m;
    const uint64_t kept = select_group(KeysOf<D, View>{view, first}, group, format.n);
    const uint64_t mask = fill_short_group(kept, group, format.n);
    writer.put(encode_group(mask, format), format.group_bits);
    for (uint64_t rest = mask; rest != 0; rest &= rest - 1) {
      const int position = lowest_bit(rest);
      *values++ = position < group ? view.get(first + position) : BitsOf<D>{0};
    }
  }
  writer.finish();
}

template <DType D, int M>
struct CompressStaged {
  using Bits = BitsOf<D>;
  using Held = Cell<D, M == 0 ? 1 : M>;

  Tiles tiles;
  const Bits* src;
  PackedOut<Bits> out;
  PackedFormat format;
  int unit;

  static constexpr int kMinBlocks = min_blocks<D>(M) - 1;  // the writers need registers too

  static int unit_for(PackedFormat format) {
    const int whole = whole_byte_groups(format) * format.m;
    return M == 0 ? whole : std::lcm(whole, Held::kElements);
  }

  NMS_HD int64_t count() const { return tiles.count(); }
  NMS_HD bool writes_tile() const { return false; }

  NMS_HD void copy_in(const Tile& tile, Chunk* shared, int thread) const {
    nms::copy_in(tiles, tile, src, unit, shared, thread);
  }
  NMS_HD void copy_out(const Tile&, Chunk*, int) const {}

  NMS_HD void work(const Tile& tile, Chunk* shared, int thread) const {
    const SharedTile<Bits> from(tiles, shared);
    const int units = unit_count(tile, unit);
    for (int u = thread; u < units; u += kStagedThreads) {
      const Unit at = unit_at(tiles, tile, unit, u);
      const int64_t group = (tile.first_k + at.k) / (M == 0 ? format.m : M);
      Bits* values = out.values + at.row * out.values_row + group * format.n;
      uint8_t* indices = out.indices + at.row * out.indices_row + group * format.group_bits / 8;
      if constexpr (M == 0)
        compress_span<D>(View{from, at.first, tiles.pitch}, at.len, format, values, indices);
      else
        compress_unit(from, at, values, indices);
    }
  }

 private:
  struct View {
    SharedTile<Bits> tile;
    int first, pitch;

    NMS_HD Bits get(int i) const { return tile.element(first + i * pitch); }
  };

  // A short last group needs no care: its virtual positions are zeros in shared memory.
  NMS_HD void compress_unit(const SharedTile<Bits>& tile, const Unit& at, Bits* values, uint8_t* indices) const {
    ValueWriter<Bits> writer(values, out.word_bytes);
    uint64_t codes = 0;
    int code_bits = 0;
    for (int first = 0; first < at.len; first += Held::kElements) {
      Held cell;
      cell.load(tile, at.first + first * tiles.pitch, tiles.pitch);
      const uint32_t kept = cell.select(format.n);
      NMS_UNROLL
      for (int g = 0; g < Held::kGroups; ++g) {
        if (first + g * M >= at.len) continue;
        const uint64_t mask = kept >> (g * M) & low_bits(M);
        codes |= encode_group(mask, format) << code_bits;
        code_bits += format.group_bits;
        NMS_UNROLL
        for (int i = 0; i < M; ++i)
          if (mask >> i & 1) writer.put(cell[g * M + i]);
      }
    }
    writer.finish();
    store_bytes(indices, codes, (code_bits + 7) / 8);
  }
};

template <DType D>
struct CompressStrided {
  using Bits = BitsOf<D>;

  Spans spans;  // of whole_byte_groups groups
  const Bits* src;
  PackedOut<Bits> out;
  PackedFormat format;

  NMS_HD int64_t count() const { return spans.count(); }

  NMS_HD void operator()(int64_t thread) const {
    const Spans::At at = spans.at(thread);
    const int64_t group = at.index * (static_cast<int>(spans.span) / format.m);
    compress_span<D>(View{src + at.a, spans.layout.a_k}, static_cast<int>(at.len), format,
                     out.values + at.row * out.values_row + group * format.n,
                     out.indices + at.row * out.indices_row + group * format.group_bits / 8);
  }

 private:
  struct View {
    const Bits* src;
    int64_t src_k;

    NMS_HD Bits get(int i) const { return src[i * src_k]; }
  };
};

}  // namespace nms
