// What    The exact best transposable 2:4 mask of every 4x4 tile (the rule: core/transposable.h).
// Layout  src: [rows, cols], any strides, both multiples of 4. bits: [rows, ceil(cols / 8)]. A thread chooses for two
//         neighbouring tiles, whose rows together fill a byte of each of four mask rows.
// Launch  One thread per 4 x 8 weights; neighbouring threads along the columns, or along the rows where those adjoin.
//
// Scores are float64 sums. For int8 and float8_e4m3fn the float32 sums choose the same mask, at a fraction of the
// cost: every finite |w| is a multiple of 2^-9 (of 1) up to 448 (128), so sums of eight fit into 24 bits and both are
// exact. With NaN scored 2^100 instead of 2^1020 a sum with j NaNs is j * 2^100 or j * 2^1020 to the bit: finite terms
// vanish by rounding in both. So equal sums stay equal and larger ones stay larger.
#pragma once

#include "../../core/convert.h"
#include "../../core/dtype.h"
#include "../../core/transposable.h"
#include "chunk.h"
#include "launch.cuh"
#include "layout.h"

namespace nms {

template <DType D>
using TileScore = std::conditional_t<D == DType::kInt8 || D == DType::kFloat8E4M3, float, double>;

template <DType D>
NMS_HD TileScore<D> score_of(typename Element<D>::Bits bits) {
  if constexpr (D == DType::kInt8) {
    return static_cast<float>(magnitude_key<D>(bits));
  } else if constexpr (D == DType::kFloat8E4M3) {
    const uint32_t magnitude = bits & Element<D>::kMagnitude;
    return magnitude == static_cast<uint32_t>(Element<D>::kNaN) ? 0x1p100f
                                                                : to_arithmetic<D>(static_cast<uint8_t>(magnitude));
  } else {
    return tile_score(static_cast<double>(to_arithmetic<D>(bits)));
  }
}

template <DType D>
struct SelectTransposable {
  using Bits = typename Element<D>::Bits;

  static constexpr int kMinBlocks = sizeof(TileScore<D>) == 8 ? 2 : 3;  // 24 row sums and as many choices are alive

  const Bits* src;
  int64_t src_row, src_col;
  int64_t rows, cols;
  uint8_t* bits;
  bool by_rows;  // neighbouring threads take neighbouring rows of tiles
  bool aligned;  // four weights of a row are one aligned word or chunk
  Divisor fast;  // tiles along the direction of neighbouring threads

  NMS_HD int64_t count() const { return rows / 4 * divide_up(cols, 8); }

  NMS_HD void operator()(int64_t thread) const {
    const int64_t slow_at = fast.quotient(thread);
    const int64_t fast_at = thread - slow_at * fast.value();
    const int64_t row = 4 * (by_rows ? fast_at : slow_at);
    const int64_t col = 8 * (by_rows ? slow_at : fast_at);
    const uint32_t left = select(row, col);
    const uint32_t right = col + 4 < cols ? select(row, col + 4) : 0;
    const int64_t bits_row = divide_up(cols, 8);
    for (int i = 0; i < 4; ++i)
      bits[(row + i) * bits_row + col / 8] =
          static_cast<uint8_t>((left >> (4 * i) & 0xF) | (right >> (4 * i) & 0xF) << 4);
  }

  // Bit 4 * row + column: kept, of the tile that begins there.
  NMS_HD uint32_t select(int64_t row, int64_t col) const {
    TileScore<D> scores[16];
    const Bits* tile = src + row * src_row + col * src_col;
    NMS_UNROLL
    for (int i = 0; i < 4; ++i) {
      Four four;
      if (aligned) {
        four = *reinterpret_cast<const Four*>(tile + i * src_row);
      } else {
        NMS_UNROLL
        for (int j = 0; j < 4; ++j) four.element[j] = tile[i * src_row + j * src_col];
      }
      NMS_UNROLL
      for (int j = 0; j < 4; ++j) scores[4 * i + j] = score_of<D>(four.element[j]);
    }
    return select_transposable(scores);
  }

 private:
  struct alignas(sizeof(Bits) * 4 < kChunkBytes ? sizeof(Bits) * 4 : kChunkBytes) Four {
    Bits element[4];
  };
};

template <DType D>
SelectTransposable<D> make_select_transposable(const typename Element<D>::Bits* src, int64_t src_row, int64_t src_col,
                                               int64_t rows, int64_t cols, uint8_t* bits) {
  constexpr int64_t kBytes = std::min<int64_t>(4 * sizeof(*src), kChunkBytes);
  SelectTransposable<D> op;
  op.src = src;
  op.src_row = src_row;
  op.src_col = src_col;
  op.rows = rows;
  op.cols = cols;
  op.bits = bits;
  op.by_rows = src_row == 1 && src_col != 1;
  op.aligned = src_col == 1 && is_aligned(src, kBytes) && src_row * static_cast<int64_t>(sizeof(*src)) % kBytes == 0;
  op.fast = Divisor(std::max<int64_t>(1, op.by_rows ? rows / 4 : divide_up(cols, 8)));
  return op;
}

}  // namespace nms
