// What may follow a product, in float32.
#pragma once

#include <cmath>

#include "hd.h"

namespace nms {

enum class Activation : int { kNone, kRelu, kGelu, kSilu };

// relu keeps NaN, as PyTorch's does; gelu is the exact one.
NMS_HD float activate(Activation activation, float v) {
  switch (activation) {
    case Activation::kRelu:
      return v < 0.0f ? 0.0f : v;
    case Activation::kGelu:
      return 0.5f * v * (1.0f + erff(v * 0.70710678f));
    case Activation::kSilu:
      return v / (1.0f + expf(-v));
    default:
      return v;
  }
}

}  // namespace nms
