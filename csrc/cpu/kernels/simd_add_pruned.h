// The gradients that SR-STE and DominoSearch hand to the optimizer: the sum of a gradient and a multiple of the pruned,
// or of the kept weights.
//
// Note    Included inside a target region, after simd_rows.h.
#pragma once

// Sum: PrunedSum or KeptSum.
template <class Sum, bool kStream>
void add_row(const AddPrunedRow& row) {
  constexpr int kFloats = Sum::kFloats;
  const Sum sum(row.factor);
  int64_t i = 0;
  for (; i + kFloats <= row.k; i += kFloats) {
    const Vec v = sum.of(row.grad + i, row.w + i, row.bits + i / 8);
    if constexpr (kStream)
      stream(row.out + i, v);
    else
      store(row.out + i, v);
  }
  if (i < row.k) {  // by way of whole vectors: the compiler must not fuse what is rounded twice elsewhere
    const size_t rest = static_cast<size_t>(row.k - i);
    alignas(kVectorBytes) float grad[kFloats] = {}, w[kFloats] = {}, out[kFloats];
    uint8_t bits[(kFloats + 7) / 8] = {};
    std::memcpy(grad, row.grad + i, rest * sizeof(float));
    std::memcpy(w, row.w + i, rest * sizeof(float));
    std::memcpy(bits, row.bits + i / 8, (rest + 7) / 8);
    store(out, sum.of(grad, w, bits));
    std::memcpy(row.out + i, out, rest * sizeof(float));
  }
}

template <class Sum>
void add_row(const AddPrunedRow& row) {
  if (row.stream && is_aligned(row.out, kVectorBytes))
    add_row<Sum, true>(row);
  else
    add_row<Sum, false>(row);
}
