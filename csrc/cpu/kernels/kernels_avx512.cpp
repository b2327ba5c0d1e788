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
#include "../../core/select.h"
#include "kernels.h"
#include "target_region.h"

// GCC 12's own intrinsics leave don't-care operands uninitialised, and warn about it (GCC bug 105593).
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "simd_pack_vbmi2.h"

NMS_TARGET_REGION(NMS_AVX512)

namespace nms {
namespace {

#include "simd_avx512.h"

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

Kernels avx512_kernels() {
  Kernels table = simd_table("avx512");
  if (!__builtin_cpu_supports("avx512vbmi2")) {  // packing of narrow elements: without it AVX2's way is as fast
    const Kernels avx2 = avx2_kernels();
    for (DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kInt8, DType::kFloat8E4M3})
      table.compress[static_cast<int>(dtype)] = avx2.compress[static_cast<int>(dtype)];
  }
  return table;
}

}  // namespace nms

NMS_TARGET_REGION_END

#endif
