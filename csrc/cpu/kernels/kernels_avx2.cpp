// The AVX2 kernels: everything of simd_*.h, compiled for that instruction set.
#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../../core/bits.h"
#include "../../core/dtype.h"
#include "../../core/packed.h"
#include "../../core/select.h"
#include "kernels.h"
#include "target_region.h"

NMS_TARGET_REGION("avx2,bmi,bmi2,popcnt")

namespace nms {
namespace {

#include "simd_avx2.h"

#include "simd_networks.h"

#include "simd_choose.h"

#include "simd_rows.h"

#include "simd_interleaved.h"

#include "simd_select.h"

#include "simd_compress.h"

#include "simd_add_pruned.h"

#include "simd_votes.h"

#include "simd_table.h"

}  // namespace

Kernels avx2_kernels() { return simd_table("avx2"); }

}  // namespace nms

NMS_TARGET_REGION_END

#endif
