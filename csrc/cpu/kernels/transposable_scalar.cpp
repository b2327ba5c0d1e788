// What    Exact best transposable 2:4 mask, tile by tile (the rule: core/transposable.h).
// Layout  A tile's four rows give four nibbles; two neighbouring tiles fill a byte of each of the four mask rows.
#include "../../core/transposable.h"

#include "../../core/convert.h"
#include "../../core/dtype_switch.h"
#include "kernels.h"

namespace nms {

void select_transposable(DType dtype, const void* src, int64_t src_row, int64_t src_col, uint8_t* bits,
                         int64_t bits_row, int64_t rows, int64_t cols) {
  switch_dtype(dtype, [&](auto d) {
    auto* weight = static_cast<const typename Element<d>::Bits*>(src);
    for (int64_t row = 0; row < rows; row += 4) {
      for (int64_t col = 0; col < cols; col += 4) {
        double scores[16];
        for (int i = 0; i < 4; ++i)
          for (int j = 0; j < 4; ++j)
            scores[4 * i + j] = tile_score(to_arithmetic<d>(weight[(row + i) * src_row + (col + j) * src_col]));
        const uint32_t mask = select_transposable(scores);
        for (int i = 0; i < 4; ++i) {
          uint8_t& byte = bits[(row + i) * bits_row + col / 8];
          const unsigned nibble = mask >> (4 * i) & 0xF;
          byte = static_cast<uint8_t>(col % 8 == 0 ? nibble : byte | nibble << 4);
        }
      }
    }
  });
}

}  // namespace nms
