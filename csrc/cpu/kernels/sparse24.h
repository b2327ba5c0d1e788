// Packed indices into the metadata layouts of sparse tensor cores (core/sparse24.h).
#pragma once

#include <cstdint>

#include "../../core/sparse24.h"

namespace nms {

// Codes of 2:4 (1:2 where element_bytes is 4), rows of k weights, as sparse tensor cores' metadata: rows * groups / 2
// bytes. Rows and groups are multiples of metadata_multiples().
void write_metadata(MetadataLayout layout, int element_bytes, const uint8_t* indices, int64_t rows, int64_t k,
                    uint8_t* metadata);

}  // namespace nms
