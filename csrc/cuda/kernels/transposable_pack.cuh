// What    The best transposable 2:4 mask, and both weights packed with it: W, and W transposed, each 2:4 along its
// rows.
//         What a training step with sparse forward and input gradient needs, from one reading of W.
// Layout  src: rows x cols, both multiples of 4, any strides. bits: [rows, ceil(cols / 8)]; values: [rows, cols / 2],
//         indices: [rows, ceil(cols / 8)]; the same of W transposed: [cols, rows / 2], [cols, ceil(rows / 8)].
//         A thread takes 8 x 8 weights, four tiles, whose masks fill whole bytes of all three:
//
//                        8 columns            row r:     byte of bits, byte of indices, 4 values
//            8 rows    [ 0 | 1 ]              column c:  byte of indices_t, 4 values_t
//                      [ 2 | 3 ]
//
//         It chooses all four masks and then reads the 32 kept weights again, twice, which are in the first cache.
// Launch  One thread per 8 x 8; a warp takes 32 rows x 64 columns, so that values_t are written in whole 32-byte
//         sectors and values in two. Bytes moved, 16 bits: 2 in, 2.375 out per weight. The choice takes about 300
//         instructions a tile in float32 sums, more in float64 (see transposable.cuh), beside about 60 to write it.
#pragma once

#include "compress.cuh"
#include "transposable.cuh"

namespace nms {

template <class Bits>
struct OneWay {  // a packed weight [rows, k]
  Bits* values;
  uint8_t* indices;
  int64_t k;
  int word_bytes;  // in which 4 values can be stored

  // Eight weights of a row from k0 on (four at the end), of which `mask` are kept: two of each four.
  template <class At>
  NMS_HD void write(int64_t row, int64_t k0, uint32_t mask, const At& at) const {
    const int groups = k0 + 4 < k ? 2 : 1;
    ValueWriter<Bits> writer(values + row * (k / 2) + k0 / 2, word_bytes);
    uint32_t code = 0;
    NMS_UNROLL
    for (int g = 0; g < 2; ++g) {
      if (g >= groups) break;
      const uint32_t four = mask >> (4 * g) & 0xF;
      const uint32_t first = four & 1 ? 0 : four & 2 ? 1 : 2, second = four & 8 ? 3 : four & 4 ? 2 : 1;
      writer.put(at(4 * g + static_cast<int>(first)));
      writer.put(at(4 * g + static_cast<int>(second)));
      code |= (first | second << 2) << (4 * g);
    }
    writer.finish();
    indices[row * divide_up(k, 8) + k0 / 8] = static_cast<uint8_t>(code);
  }
};

template <DType D>
struct PackTransposable {
  using Bits = typename Element<D>::Bits;
  static constexpr int kMinBlocks = SelectTransposable<D>::kMinBlocks;

  SelectTransposable<D> tiles;  // src, sizes, bits
  OneWay<Bits> normal, transposed;
  Divisor warp_columns;  // of 64 columns

  NMS_HD int64_t count() const { return divide_up(tiles.rows, 32) * warp_columns.value() * 32; }

  NMS_HD void operator()(int64_t thread) const {
    const int64_t warp = thread / 32, lane = thread % 32;
    const int64_t warp_row = warp_columns.quotient(warp);
    const int64_t row = warp_row * 32 + lane % 4 * 8;
    const int64_t col = (warp - warp_row * warp_columns.value()) * 64 + lane / 4 * 8;
    if (row >= tiles.rows || col >= tiles.cols) return;
    const bool lower = row + 4 < tiles.rows, right = col + 4 < tiles.cols;

    uint64_t mask = 0;  // bit 8 * row + column
    NMS_KEEP_LOOP
    for (int tile = 0; tile < 4; ++tile) {
      if ((tile / 2 == 1 && !lower) || (tile % 2 == 1 && !right)) continue;
      const uint64_t chosen = tiles.select(row + tile / 2 * 4, col + tile % 2 * 4);
      const uint64_t spread = (chosen & 0xF) | (chosen & 0xF0) << 4 | (chosen & 0xF00) << 8 | (chosen & 0xF000) << 12;
      mask |= spread << (tile / 2 * 32 + tile % 2 * 4);
    }

    const Bits* from = tiles.src + row * tiles.src_row + col * tiles.src_col;
    NMS_KEEP_LOOP
    for (int i = 0; i < (lower ? 8 : 4); ++i) {
      const auto of_row = static_cast<uint32_t>(mask >> (8 * i) & 0xFF);
      tiles.bits[(row + i) * divide_up(tiles.cols, 8) + col / 8] = static_cast<uint8_t>(of_row);
      normal.write(row + i, col, of_row, [&](int j) { return from[i * tiles.src_row + j * tiles.src_col]; });
    }
    NMS_KEEP_LOOP
    for (int j = 0; j < (right ? 8 : 4); ++j) {
      // Bits j, j + 8, ... of the mask, side by side: each lands in another bit of the product's highest byte.
      const uint64_t column = mask >> j & 0x0101010101010101ull;
      const auto of_column = static_cast<uint32_t>(column * 0x0102040810204080ull >> 56);
      transposed.write(col + j, row, of_column, [&](int i) { return from[i * tiles.src_row + j * tiles.src_col]; });
    }
  }
};

// Bytes in which the four values of a thread can be stored at every row.
template <class Bits>
int pack_word_bytes(const Bits* values, int64_t k) {
  constexpr int kBytes = static_cast<int>(sizeof(Bits));
  int bytes = std::min(8, 4 * kBytes);
  while (bytes > kBytes && (k / 2 * kBytes % bytes != 0 || !is_aligned(values, bytes))) bytes /= 2;
  return bytes;
}

template <DType D>
PackTransposable<D> make_pack_transposable(const SelectTransposable<D>& tiles, typename Element<D>::Bits* values,
                                           uint8_t* indices, typename Element<D>::Bits* values_t, uint8_t* indices_t) {
  using Bits = typename Element<D>::Bits;
  return {tiles, OneWay<Bits>{values, indices, tiles.cols, pack_word_bytes(values, tiles.cols)},
          OneWay<Bits>{values_t, indices_t, tiles.rows, pack_word_bytes(values_t, tiles.rows)},
          Divisor(std::max<int64_t>(1, divide_up(tiles.cols, 64)))};
}

}  // namespace nms
