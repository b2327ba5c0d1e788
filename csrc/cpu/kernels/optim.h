// The element-wise half of a one-pass optimizer step on the CPU: see core/optim.h for the arithmetic.
//
// The other half, choosing the mask and writing the masked copy, is SelectPanel's, on the same panel while it is in
// the cache.
#pragma once

#include <cstdint>

#include "../../core/dtype.h"
#include "../../core/optim.h"

namespace nms {

// All operands have the same strides; `inner` is contiguous.
struct UpdatePanel {
  void* weight;      // [outer, inner]: what the optimizer updates
  const void* grad;  // [outer, inner]
  void* state[3];    // [outer, inner] each, of the weight's type; as many as the optimizer has
  int64_t stride;    // of outer, in elements
  int64_t outer, inner;
  const uint8_t* bits;  // the mask, packed along inner: [outer, bits_row] bytes; or null
  int64_t bits_row;
  const uint32_t* words;  // else, where it is packed along outer, spread: [outer, inner], all ones or zero; or null
};

// Types: weight and grad are the same, or weight is float32 and grad bfloat16 or float16.
struct OptimTable {
  void (*sgd)(DType weight, DType grad, const UpdatePanel&, const SgdOptions&);
  void (*adamw)(DType weight, DType grad, const UpdatePanel&, const AdamWOptions&);
  // to[0..count) = from, rounded to bfloat16 or float16.
  void (*narrow)(DType to_type, const float* from, void* to, int64_t count);
};

OptimTable scalar_optim();
OptimTable avx2_optim();  // x86-64 only
OptimTable avx512_optim();

}  // namespace nms
