// What an activation does, in double precision: the truth that the kernels' are compared with.
#pragma once

#include <cmath>

#include "cpu/kernels/linear.h"

namespace {

double activated(nms::Activation activation, double v) {
  switch (activation) {
    case nms::Activation::kRelu:
      return v < 0 ? 0 : v;
    case nms::Activation::kGelu:
      return 0.5 * v * (1 + std::erf(v / std::sqrt(2.0)));
    case nms::Activation::kSilu:
      return v / (1 + std::exp(-v));
    default:
      return v;
  }
}

}  // namespace
