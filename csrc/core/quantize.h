// From numbers to int8 and back: one scale a row, symmetric.
//
//   amax     largest |x| of the row
//   scale    amax / 127                            the float32 that one unit of the integers stands for
//   q        x * (127 / amax), rounded to the nearest integer, ties to even: in [-127, 127]
//   x        is within scale / 2 of q * scale, but for the rounding of float32
//
// A row with amax below kSmallestAmax (zeros, and what no 127th of could be told from them) has scale 0 and zeros. A
// row that holds a NaN or an infinity has scale NaN and zeros: whatever is computed from it is NaN, never a plain
// number.
//
// All of it is float32 arithmetic in this order, so that every engine and PyTorch get the same integers.
#pragma once

#include <cmath>
#include <cstdint>

#include "hd.h"

namespace nms {

constexpr float kInt8Max = 127.0f;
constexpr float kSmallestAmax = 0x1p-100f;

// Weights that a row may keep for its sum of products to fit into 32 bits: 2^17 * 127 * 128 < 2^31.
constexpr int64_t kMaxInt8Kept = int64_t{1} << 17;

struct Int8Scale {
  float scale;
  float inverse;  // 0 where the integers are all 0
};

NMS_HD Int8Scale int8_scale(float amax) {
  if (!(amax <= 3.402823466e38f)) return {NAN, 0.0f};
  if (amax < kSmallestAmax) return {0.0f, 0.0f};
  return {amax / kInt8Max, kInt8Max / amax};
}

// `inverse` is not 0.
NMS_HD int8_t quantize(float x, float inverse) { return static_cast<int8_t>(nearbyintf(x * inverse)); }

// What a sum of products of integers stands for. The bias is added to it as a step of its own, with a rounding of its
// own: a fused multiply-add would give other bits.
NMS_HD float dequantize(int32_t sum, float x_scale, float weight_scale) {
  return static_cast<float>(sum) * (x_scale * weight_scale);
}

}  // namespace nms
