// What    Working with packed masks: to and from bool, masking a weight, the SR-STE term on what a mask prunes.
// Layout  bits: [rows, ceil(k / 8)] bytes in the order of row numbers, bit k % 8 of byte k / 8. A thread takes eight
//         weights of a row, one byte of the mask; rows of stride 1 are read and written in wide aligned words.
// Launch  One thread per byte of the mask (map_kernel); ApplyStaged: tiles in shared memory (staged.h).
#pragma once

#include "../../core/bits.h"
#include "../../core/convert.h"
#include "../../core/dtype.h"
#include "launch.cuh"
#include "layout.h"
#include "staged.h"

namespace nms {

// Bit i of the result: byte i of the word is not zero.
NMS_HD uint8_t pack_bytes(uint64_t bytes) {
  bytes |= bytes >> 4;
  bytes |= bytes >> 2;
  bytes |= bytes >> 1;
  bytes &= 0x0101010101010101ull;                                    // 0 or 1 each
  return static_cast<uint8_t>(bytes * 0x0102040810204080ull >> 56);  // byte i contributes 2^(8 i) * 2^(56 - 7 i)
}

// Byte i of the result is bit i, as 0 or 1.
NMS_HD uint64_t unpack_bytes(uint8_t bits) {
  const uint64_t spread = bits * 0x0101010101010101ull & 0x8040201008040201ull;  // byte i: bit i, in its place
  return (spread + 0x7f7f7f7f7f7f7f7full) >> 7 & 0x0101010101010101ull;
}

// Eight neighbouring elements can be accessed as aligned words.
inline bool whole_bytes_aligned(const Layout& layout, const void* a, int64_t a_element, const void* b,
                                int64_t b_element) {
  const auto fits = [](const void* data, int64_t element, int64_t k_stride, const int64_t* strides, int dims) {
    const int64_t bytes = 8 * element < kChunkBytes ? 8 * element : kChunkBytes;
    bool fits = k_stride == 1 && is_aligned(data, bytes);
    for (int d = 0; d < dims; ++d) fits = fits && strides[d] * element % bytes == 0;
    return fits;
  };
  return fits(a, a_element, layout.a_k, layout.rows.a, layout.rows.dims) &&
         (b == nullptr || fits(b, b_element, layout.b_k, layout.rows.b, layout.rows.dims));
}

struct PackBits {
  Spans spans;          // of 8
  const uint8_t* mask;  // a byte that is not zero is true
  uint8_t* bits;
  int64_t bits_row;
  bool aligned;

  NMS_HD int64_t count() const { return spans.count(); }

  NMS_HD void operator()(int64_t thread) const {
    const Spans::At at = spans.at(thread);
    const uint8_t* in = mask + at.a;
    uint64_t bytes = 0;
    if (aligned && at.len == 8)
      bytes = *reinterpret_cast<const uint64_t*>(in);
    else
      for (int i = 0; i < static_cast<int>(at.len); ++i)
        bytes |= static_cast<uint64_t>(in[i * spans.layout.a_k]) << (8 * i);
    bits[at.row * bits_row + at.index] = pack_bytes(bytes);
  }
};

struct UnpackBits {
  Spans spans;  // of 8
  const uint8_t* bits;
  int64_t bits_row;
  uint8_t* mask;
  bool aligned;

  NMS_HD int64_t count() const { return spans.count(); }

  NMS_HD void operator()(int64_t thread) const {
    const Spans::At at = spans.at(thread);
    const uint64_t bytes = unpack_bytes(bits[at.row * bits_row + at.index]);
    uint8_t* out = mask + at.a;
    if (aligned && at.len == 8)
      *reinterpret_cast<uint64_t*>(out) = bytes;
    else
      for (int i = 0; i < static_cast<int>(at.len); ++i)
        out[i * spans.layout.a_k] = static_cast<uint8_t>(bytes >> (8 * i));
  }
};

// dst = where(bit, src, +0), through tiles in shared memory.
template <class Bits>
struct ApplyStaged {
  static constexpr int kUnit = kChunkElements<Bits> < 8 ? 8 : kChunkElements<Bits>;
  static constexpr int kMinBlocks = 8;

  Tiles tiles;
  const Bits* src;
  Bits* dst;  // may be src
  const uint8_t* bits;
  int64_t bits_row;

  NMS_HD int64_t count() const { return tiles.count(); }
  NMS_HD bool writes_tile() const { return true; }

  NMS_HD void copy_in(const Tile& tile, Chunk* shared, int thread) const {
    nms::copy_in(tiles, tile, src, kUnit, shared, thread);
  }
  NMS_HD void copy_out(const Tile& tile, Chunk* shared, int thread) const {
    nms::copy_out(tiles, tile, dst, shared, thread);
  }

  NMS_HD void work(const Tile& tile, Chunk* shared, int thread) const {
    constexpr int kPerChunk = kChunkElements<Bits>;
    const SharedTile<Bits> to(tiles, shared);
    const int units = unit_count(tile, kUnit);
    for (int u = thread; u < units; u += kStagedThreads) {
      const Unit at = unit_at(tiles, tile, kUnit, u);
      const uint8_t* in = bits + at.row * bits_row + (tile.first_k + at.k) / 8;
      const uint32_t mask = static_cast<uint32_t>(in[0]) | (at.len > 8 ? static_cast<uint32_t>(in[1]) << 8 : 0);
      if (tiles.pitch == 1) {
        NMS_UNROLL
        for (int c = 0; c < kUnit / kPerChunk; ++c) {
          Chunk& chunk = to.chunk(at.first / kPerChunk + c);
          chunk = masked<Bits>(chunk, mask >> (c * kPerChunk));
        }
      } else {
        Bits* const elements = to.elements() + at.first;
        for (int i = 0; i < at.len; ++i)
          if (!(mask >> i & 1)) elements[i * tiles.pitch] = 0;
      }
    }
  }
};

// The same, weight by weight.
template <class Bits>
struct ApplyStrided {
  Spans spans;  // of 8
  const Bits* src;
  Bits* dst;  // may be src
  const uint8_t* bits;
  int64_t bits_row;

  NMS_HD int64_t count() const { return spans.count(); }

  NMS_HD void operator()(int64_t thread) const {
    const Spans::At at = spans.at(thread);
    const uint8_t byte = bits[at.row * bits_row + at.index];
    for (int i = 0; i < static_cast<int>(at.len); ++i)
      dst[at.b + i * spans.layout.b_k] = byte >> i & 1 ? src[at.a + i * spans.layout.a_k] : Bits{0};
  }
};

NMS_HD float multiply_add(float a, float b, float c) {  // rounded twice, as on the CPU: not a fused multiply-add
#if defined(__CUDA_ARCH__)
  return __fadd_rn(__fmul_rn(a, b), c);
#else
  return a * b + c;
#endif
}
NMS_HD double multiply_add(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return __dadd_rn(__dmul_rn(a, b), c);
#else
  return a * b + c;
#endif
}

// sum + factor * weight. G, W: the types of sum and weight.
template <DType G, DType W>
NMS_HD typename Element<G>::Bits add_multiple(typename Element<G>::Bits sum, typename Element<W>::Bits weight,
                                              typename Arithmetic<G>::Type factor) {
  using Sum = typename Arithmetic<G>::Type;
  return from_arithmetic<G>(multiply_add(factor, static_cast<Sum>(to_arithmetic<W>(weight)), to_arithmetic<G>(sum)));
}

// Eight elements, in whole chunks where they fill one.
template <class Bits>
struct alignas(sizeof(Bits) * 8 < kChunkBytes ? sizeof(Bits) * 8 : kChunkBytes) Eight {
  Bits element[8];
};

// grad += alpha * scale * w where the bit is 0. G, W: their element types.
template <DType G, DType W>
struct AddPruned {
  using GradBits = typename Element<G>::Bits;
  using WeightBits = typename Element<W>::Bits;
  using Sum = typename Arithmetic<G>::Type;

  Spans spans;  // of 8; a: grad, b: w
  GradBits* grad;
  const WeightBits* w;
  const uint8_t* bits;
  int64_t bits_row;
  double alpha;
  const float* scale;  // on the device; may be null
  bool aligned;

  NMS_HD int64_t count() const { return spans.count(); }

  NMS_HD void operator()(int64_t thread) const {
    const Spans::At at = spans.at(thread);
    const uint8_t byte = bits[at.row * bits_row + at.index];
    const Sum factor = static_cast<Sum>(scale ? alpha * static_cast<double>(*scale) : alpha);
    if (aligned && at.len == 8) {
      add_whole(grad + at.a, w + at.b, byte, factor);
    } else {
      for (int i = 0; i < static_cast<int>(at.len); ++i) {
        if (byte >> i & 1) continue;
        GradBits& sum = grad[at.a + i * spans.layout.a_k];
        sum = add_multiple<G, W>(sum, w[at.b + i * spans.layout.b_k], factor);
      }
    }
  }

 private:
  NMS_HD static void add_whole(GradBits* grad, const WeightBits* w, uint8_t byte, Sum factor) {
    auto sums = *reinterpret_cast<const Eight<GradBits>*>(grad);
    const auto weights = *reinterpret_cast<const Eight<WeightBits>*>(w);
    NMS_UNROLL
    for (int i = 0; i < 8; ++i)
      if (!(byte >> i & 1)) sums.element[i] = add_multiple<G, W>(sums.element[i], weights.element[i], factor);
    *reinterpret_cast<Eight<GradBits>*>(grad) = sums;
  }
};

}  // namespace nms
