// What    y = activation(x * scales + bias) along the last dim, in one pass, in place or not: what follows a product
//         where its library does not fuse it.
// Layout  x, y: [tokens, rows], contiguous; scales float32 [rows], bias [rows] of x's type, or null. Where rows is a
//         multiple of a chunk's elements, a thread takes 16 bytes of a row, else one element. The vectors are read
//         once per token, but from the first cache.
// Launch  One thread per chunk or element. Bytes moved: x and y, once. Two of them per element at most, 16 to 48 other
//         instructions where the activation is none or relu; erf and exp are about 30 more, for which there is time:
//         a multiprocessor of an H200 moves 5 float16 a clock in and out.
#pragma once

#include <cstdint>

#include "../../core/activation.h"
#include "../../core/convert.h"
#include "chunk.h"
#include "launch.cuh"
#include "layout.h"

namespace nms {

template <DType D, bool kChunks>
struct Epilogue {
  using Bits = typename Element<D>::Bits;
  static constexpr int kElements = kChunks ? kChunkElements<Bits> : 1;

  const Bits* x;
  Bits* y;
  int64_t spans;        // all of kElements
  Divisor row_spans;    // of one token
  const float* scales;  // or null
  const Bits* bias;     // or null
  Activation activation;

  NMS_HD int64_t count() const { return spans; }

  NMS_HD void operator()(int64_t index) const {
    const int64_t row = (index - row_spans.quotient(index) * row_spans.value()) * kElements;
    if constexpr (kChunks) {
      const Chunk in = load_chunk(x + index * kElements);
      Chunk added{}, out{};
      if (bias) added = load_chunk(bias + row);
      NMS_UNROLL
      for (int i = 0; i < kElements; ++i)
        set_chunk_element(&out, i, one(chunk_element<Bits>(&in, i), row + i, chunk_element<Bits>(&added, i)));
      store_chunk(y + index * kElements, out);
    } else {
      y[index] = one(x[index], row, bias ? bias[row] : Bits{0});
    }
  }

 private:
  NMS_HD Bits one(Bits in, int64_t row, Bits added) const {
    float v = to_arithmetic<D>(in);
    if (scales) v *= scales[row];
    if (bias) v += to_arithmetic<D>(added);
    return from_arithmetic<D>(activate(activation, v));
  }
};

// fn(body) of the kind that the pointers allow.
template <DType D, class Fn>
void with_epilogue(const typename Element<D>::Bits* x, typename Element<D>::Bits* y, int64_t tokens, int64_t rows,
                   const float* scales, const typename Element<D>::Bits* bias, Activation activation, const Fn& fn) {
  constexpr int64_t kElements = kChunkElements<typename Element<D>::Bits>;
  if (rows % kElements == 0 && is_aligned(x, kChunkBytes) && is_aligned(y, kChunkBytes) &&
      (!bias || is_aligned(bias, kChunkBytes)))
    fn(Epilogue<D, true>{x, y, tokens * rows / kElements, Divisor(rows / kElements), scales, bias, activation});
  else
    fn(Epilogue<D, false>{x, y, tokens * rows, Divisor(rows), scales, bias, activation});
}

}  // namespace nms
