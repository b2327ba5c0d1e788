// What    Chooses the n largest |w| of every m and writes the masked copy, the packed mask, or both, in one pass.
// Layout  src, dst: rows x k, any strides. bits: [rows, ceil(k / 8)] bytes in the order of row numbers. One thread
//         chooses for a unit of whole groups that fill whole mask bytes, so that no two threads write the same byte;
//         neighbouring threads write neighbouring bytes, which the hardware joins into one transaction.
// Launch  SelectStaged: 128 threads a tile of 16 KiB in shared memory (staged.h). M = m for 2, 4, 8, 16, 32; 0: any m.
//         SelectStrided: one thread per span of lcm(m, 8) weights, read where they lie; what no tile fits.
#pragma once

#include <numeric>

#include "../../core/bits.h"
#include "../../core/dtype.h"
#include "../../core/select.h"
#include "launch.cuh"
#include "layout.h"
#include "select_fixed.h"
#include "staged.h"

namespace nms {

template <DType D>
using BitsOf = typename Element<D>::Bits;

// What a thread holds at once for a fixed M: whole groups and whole chunks.
template <DType D, int M>
struct Cell {
  static constexpr int kPerChunk = kChunkElements<BitsOf<D>>;
  static constexpr int kElements = M > kPerChunk ? M : kPerChunk;
  static constexpr int kChunks = kElements / kPerChunk;
  static constexpr int kGroups = kElements / M;

  Chunk chunks[kChunks];

  NMS_HD BitsOf<D> operator[](int i) const { return chunk_element<BitsOf<D>>(chunks, i); }

  NMS_HD void gather(const BitsOf<D>* elements, int pitch) {
    NMS_UNROLL
    for (int c = 0; c < kChunks; ++c) chunks[c] = Chunk{};
    NMS_UNROLL
    for (int i = 0; i < kElements; ++i) set_chunk_element(chunks, i, elements[i * pitch]);
  }

  // `first` is the number of an element in shared memory, the next ones are `pitch` apart.
  NMS_HD void load(const SharedTile<BitsOf<D>>& tile, int first, int pitch) {
    if (pitch != 1) return gather(tile.elements() + first, pitch);
    NMS_UNROLL
    for (int c = 0; c < kChunks; ++c) chunks[c] = tile.chunk(first / kPerChunk + c);
  }

  // Bit i: element i is kept.
  NMS_HD uint32_t select(int n) const {
    uint32_t mask = 0;
    NMS_UNROLL
    for (int g = 0; g < kGroups; ++g) {
      RegisterKey<D> keys[M];
      NMS_UNROLL
      for (int i = 0; i < M; ++i) keys[i] = magnitude_key<D, RegisterKey<D>>((*this)[g * M + i]);
      mask |= select_fixed<D>(keys, n) << (g * M);
    }
    return mask;
  }

  NMS_HD void mask(uint32_t kept) {
    NMS_UNROLL
    for (int c = 0; c < kChunks; ++c) chunks[c] = masked<BitsOf<D>>(chunks[c], kept >> (c * kPerChunk));
  }
};

// Keys of a group whose elements `View::get` finds.
template <DType D, class View>
struct KeysOf {
  const View& view;
  int first;

  NMS_HD auto operator[](int i) const { return magnitude_key<D>(view.get(first + i)); }
};

// Any m: group after group, the weights read as often as they are compared. `bits` may be null.
template <DType D, class View>
NMS_HD void select_span(const View& view, int len, int n, int m, uint8_t* bits) {
  BitWriter writer(bits);
  for (int first = 0; first < len; first += m) {
    const int group = len - first < m ? len - first : m;
    const uint64_t mask = select_group(KeysOf<D, View>{view, first}, group, n);
    for (int i = 0; i < group; ++i) view.put(first + i, mask >> i & 1);
    if (bits) writer.put(mask, group);
  }
  if (bits) writer.finish();
}

// Blocks that share a multiprocessor at least, which limits the registers of a thread: it holds m keys and, from m = 16
// on, their sorted copy. Chosen so that nothing spills (scripts/cuda_registers.py).
template <DType D>
constexpr int min_blocks(int m) {
  const int words = sizeof(BitsOf<D>) == 8 ? 2 * m : m;
  return words <= 4 ? 8 : words <= 8 ? 7 : words <= 16 ? 6 : words > 32 ? 2 : sizeof(BitsOf<D>) == 8 ? 3 : 4;
}

template <DType D, int M>
struct SelectStaged {
  using Bits = BitsOf<D>;

  Tiles tiles;
  const Bits* src;
  Bits* dst;         // may be null, may be src
  uint8_t* bits;     // may be null
  int64_t bits_row;  // bytes
  int n, m;
  int unit;  // unit_for(m)

  using Held = Cell<D, M == 0 ? 1 : M>;
  static constexpr int kUnit = M == 0 ? 0 : Held::kElements < 8 ? 8 : Held::kElements;
  static constexpr int kMinBlocks = min_blocks<D>(M);
  static int unit_for(int m) { return M == 0 ? std::lcm(m, 8) : kUnit; }

  NMS_HD int64_t count() const { return tiles.count(); }
  NMS_HD bool writes_tile() const { return dst != nullptr; }
  NMS_HD int unit_size() const { return M == 0 ? unit : kUnit; }

  NMS_HD void copy_in(const Tile& tile, Chunk* shared, int thread) const {
    nms::copy_in(tiles, tile, src, unit_size(), shared, thread);
  }
  NMS_HD void copy_out(const Tile& tile, Chunk* shared, int thread) const {
    nms::copy_out(tiles, tile, dst, shared, thread);
  }

  NMS_HD void work(const Tile& tile, Chunk* shared, int thread) const {
    if constexpr (M != 0) {
      if (tiles.pitch == 1) return work_along_row(tile, SharedTile<Bits>(tiles, shared), thread);
    }
    const int units = unit_count(tile, unit_size());
    for (int u = thread; u < units; u += kStagedThreads) {
      const Unit at = unit_at(tiles, tile, unit_size(), u);
      uint8_t* out = bits ? bits + at.row * bits_row + (tile.first_k + at.k) / 8 : nullptr;
      if constexpr (M == 0) {
        select_span<D>(View{SharedTile<Bits>(tiles, shared), at.first, tiles.pitch, dst != nullptr}, at.len, n, m, out);
      } else {
        select_across_rows(SharedTile<Bits>(tiles, shared).elements() + at.first, at.len, out);
      }
    }
  }

 private:
  struct View {
    SharedTile<Bits> tile;
    int first, pitch;
    bool write;

    NMS_HD Bits get(int i) const { return tile.element(first + i * pitch); }
    NMS_HD void put(int i, bool kept) const {
      if (write && !kept) tile.element(first + i * pitch) = 0;
    }
  };

  // Group dim of stride 1: whole chunks, and nothing to compute but their number.
  NMS_HD void work_along_row(const Tile& tile, const SharedTile<Bits>& shared, int thread) const {
    constexpr int kBytes = kUnit / 8;  // of the mask
    uint8_t* const out = bits ? bits + tile.row * bits_row + tile.first_k / 8 : nullptr;
    const bool wide = is_aligned(out, kBytes);
    for (int u = thread; u * kUnit < tile.k; u += kStagedThreads) {
      uint32_t mask = 0;
      NMS_UNROLL
      for (int c = 0; c < kUnit / Held::kElements; ++c) {
        const int chunk = (u * kUnit / Held::kElements + c) * Held::kChunks;
        Held cell;
        NMS_UNROLL
        for (int i = 0; i < Held::kChunks; ++i) cell.chunks[i] = shared.chunk(chunk + i);
        const uint32_t kept = cell.select(n);
        mask |= kept << (c * Held::kElements);
        if (dst == nullptr) continue;
        cell.mask(kept);
        NMS_UNROLL
        for (int i = 0; i < Held::kChunks; ++i) shared.chunk(chunk + i) = cell.chunks[i];
      }
      if (out == nullptr) continue;
      const int len = tile.k - u * kUnit;
      if (wide && len >= kUnit)
        store_word(out + u * kBytes, mask, kBytes);
      else
        store_bytes_of_mask(out + u * kBytes, mask, len < kUnit ? len : kUnit);
    }
  }

  // Group dim strided: element by element, neighbouring threads in neighbouring rows.
  NMS_HD void select_across_rows(Bits* elements, int len, uint8_t* out) const {
    uint32_t mask = 0;
    NMS_UNROLL
    for (int c = 0; c < kUnit / Held::kElements; ++c, elements += Held::kElements * tiles.pitch) {
      Held cell;
      cell.gather(elements, tiles.pitch);
      const uint32_t kept = cell.select(n);
      mask |= kept << (c * Held::kElements);
      if (dst == nullptr) continue;
      NMS_UNROLL
      for (int i = 0; i < Held::kElements; ++i)
        if (!(kept >> i & 1)) elements[i * tiles.pitch] = 0;
    }
    if (out) store_bytes_of_mask(out, mask, len);
  }

  NMS_HD static void store_bytes_of_mask(uint8_t* out, uint32_t mask, int len) {
    store_bytes(out, mask & low_bits(len), (len + 7) / 8);
  }
};

template <DType D>
struct SelectStrided {
  using Bits = BitsOf<D>;

  Spans spans;  // of lcm(m, 8)
  const Bits* src;
  Bits* dst;         // may be null, may be src
  uint8_t* bits;     // may be null
  int64_t bits_row;  // bytes
  int n, m;

  NMS_HD int64_t count() const { return spans.count(); }

  NMS_HD void operator()(int64_t thread) const {
    const Spans::At at = spans.at(thread);
    const View view{src + at.a, dst ? dst + at.b : nullptr, spans.layout.a_k, spans.layout.b_k};
    uint8_t* out = bits ? bits + at.row * bits_row + at.first_k / 8 : nullptr;
    select_span<D>(view, static_cast<int>(at.len), n, m, out);
  }

 private:
  struct View {
    const Bits* src;
    Bits* dst;
    int64_t src_k, dst_k;

    NMS_HD Bits get(int i) const { return src[i * src_k]; }
    NMS_HD void put(int i, bool kept) const {
      if (dst) dst[i * dst_k] = kept ? src[i * src_k] : Bits{0};
    }
  };
};

}  // namespace nms
