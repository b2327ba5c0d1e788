// The AVX-512 kernels: everything of simd_*.h, compiled for that instruction set.
#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../../core/bits.h"
#include "../../core/dtype.h"
#include "../../core/packed.h"
#include "kernels.h"
#include "target_region.h"

// GCC 12's own intrinsics leave don't-care operands uninitialised, and warn about it (GCC bug 105593).
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

NMS_TARGET_REGION("avx512f,avx512bw,avx512dq,avx512vl,avx2,bmi,bmi2,popcnt")

namespace nms {
namespace {

#include "simd_avx512.h"

#include "simd_networks.h"

#include "simd_choose.h"

#include "simd_rows.h"

#include "simd_interleaved.h"

#include "simd_select.h"

#include "simd_compress.h"

#include "simd_table.h"

}  // namespace

Kernels avx512_kernels() { return simd_table("avx512"); }

}  // namespace nms

NMS_TARGET_REGION_END

#endif
