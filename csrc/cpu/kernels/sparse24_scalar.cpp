// Packed indices into the metadata layouts of sparse tensor cores.
#include <cstring>

#include "../../core/packed.h"
#include "sparse24.h"

namespace nms {

void write_metadata(MetadataLayout layout, int element_bytes, const uint8_t* indices, int64_t rows, int64_t k,
                    uint8_t* metadata) {
  const bool pairs = element_bytes == 4;
  const PackedFormat format = pairs ? packed_format(1, 2) : packed_format(2, 4);
  const int64_t groups = k / format.m;
  const int64_t row_bytes = index_row_bytes(format, groups);
  std::memset(metadata, 0, static_cast<size_t>(rows * groups / 2));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t q = 0; q < groups; ++q) {
      const auto code = static_cast<int>(read_bits(indices + r * row_bytes, q * format.group_bits, format.group_bits));
      const int64_t place = nibble_place(layout, element_bytes, rows, groups, r, q);
      metadata[place / 2] |= static_cast<uint8_t>((pairs ? pair_nibble(code) : code) << (place % 2 * 4));
    }
}

}  // namespace nms
