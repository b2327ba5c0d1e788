// The product with packed weights along their rows, with AVX2.
#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../../core/convert.h"
#include "../../core/dtype.h"
#include "kernels.h"
#include "linear.h"
#include "matmul.h"
#include "target_region.h"

NMS_TARGET_REGION("avx2,fma,f16c")

namespace nms {
namespace {

#include "convert_lanes.h"

#include "convert_avx2.h"

#include "linear_rows.h"

#include "linear_avx2.h"

#include "matmul_rows.h"

struct Products256 {
  static constexpr int kLanes = 8, kVectors = 2;
  using Vec = __m256;
  using Numbers = __m256;
  static NMS_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static NMS_INLINE void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
  static NMS_INLINE Numbers numbers(const uint8_t* p) { return load(reinterpret_cast<const float*>(p)); }
  static NMS_INLINE Numbers spread(const uint8_t* p) { return _mm256_broadcast_ss(reinterpret_cast<const float*>(p)); }
  static NMS_INLINE Vec multiply_add(Numbers a, Numbers b, Vec sum) { return _mm256_fmadd_ps(a, b, sum); }
};

// Eight lanes of a slot as float32, and of index words with the window's fields at the bottom.
template <DType D>
NMS_INLINE __m256 slot_values(const uint8_t* slot, int lane, int half) {
  if constexpr (D == DType::kFloat32) return _mm256_loadu_ps(reinterpret_cast<const float*>(slot) + lane);
  if constexpr (D == DType::kFloat16)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(slot + lane * 2)));
  const __m256i both = load_integers(slot + lane * 4);
  return _mm256_castsi256_ps(half == 0 ? _mm256_slli_epi32(both, 16)
                                       : _mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}

// v[row] lane column -> v[column] lane row.
NMS_INLINE void transpose(__m256 (&v)[8]) {
  __m256 t[8];
  NMS_UNROLL
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
  }
  NMS_UNROLL
  for (int i = 0; i < 8; i += 4) {
    v[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    v[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
    v[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    v[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
  }
  NMS_UNROLL
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(v[i], v[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(v[i], v[i + 4], 0x31);
  }
  NMS_UNROLL
  for (int i = 0; i < 8; ++i) v[i] = t[i];
}

// Eight columns of a window for eight lanes: where a slot's field names the column, its values are taken.
template <DType D>
NMS_INLINE void dense_eight(const DenseRows& d, int64_t step, int half, int lane, int first_column, float* rows) {
  const PanelLayout& layout = *d.layout;
  const int slot_bytes = static_cast<int>(layout.slot_values()) * static_cast<int>(sizeof(typename Element<D>::Bits));
  const uint8_t* values = static_cast<const uint8_t*>(d.values) + step * layout.slots * slot_bytes;
  const __m256i mask = _mm256_set1_epi32((1 << layout.index_bits) - 1);
  // Slots of the groups that reach into these columns.
  const int first = first_column / layout.m * layout.n;
  const int last = std::min(layout.slots, (first_column + 7) / layout.m * layout.n + layout.n);
  __m256 columns[8];
  NMS_UNROLL
  for (int i = 0; i < 8; ++i) columns[i] = _mm256_setzero_ps();
  for (int slot = first; slot < last; ++slot) {
    const int64_t position = (d.first_step + step) * layout.slots + slot;
    const __m256i word = load_integers(d.indices + layout.word_of(position) * kPanelRows + lane);
    __m256i place = _mm256_and_si256(_mm256_srl_epi32(word, _mm_cvtsi32_si128(layout.shift_of(position, half))), mask);
    const int start = layout.index_bits == 2 ? layout.group_start(slot) : 0;
    place = _mm256_add_epi32(place, _mm256_set1_epi32(start - first_column));
    const __m256 value = slot_values<D>(values + slot * slot_bytes, lane, half);
    NMS_UNROLL
    for (int i = 0; i < 8; ++i) {
      const __m256i here = _mm256_cmpeq_epi32(place, _mm256_set1_epi32(i));
      columns[i] = _mm256_blendv_ps(columns[i], value, _mm256_castsi256_ps(here));
    }
  }
  transpose(columns);
  NMS_UNROLL
  for (int i = 0; i < 8; ++i) _mm256_storeu_ps(rows + (lane + i) * kTileStride + first_column, columns[i]);
}

template <DType D>
void dense_rows(const DenseRows& d) {
  const PanelLayout& layout = *d.layout;
  float* rows = static_cast<float*>(d.rows);
  for (int64_t step = 0; step < d.steps; ++step) {
    for (int half = 0; half < layout.halves; ++half, rows += layout.window) {
      for (int lane = 0; lane < kPanelRows; lane += 8)
        for (int column = 0; column < kWindowInputs; column += 8) dense_eight<D>(d, step, half, lane, column, rows);
    }
  }
}

template <DType D>
MatmulKernels kernels_of() {
  return {4,
          1,
          [](const PanelLayout&) -> DenseRowsFn { return &dense_rows<D>; },
          &block_product<Products256>,
          &pack_units<D, float>,
          &store_strip<D>};
}

}  // namespace

void use_avx2_matmul(MatmulTable& table) {
  table.of[static_cast<int>(DType::kFloat32)] = kernels_of<DType::kFloat32>();
  table.of[static_cast<int>(DType::kFloat16)] = kernels_of<DType::kFloat16>();
  table.of[static_cast<int>(DType::kBFloat16)] = kernels_of<DType::kBFloat16>();
}

}  // namespace nms

NMS_TARGET_REGION_END

#endif
