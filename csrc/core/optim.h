// What an optimizer step is made with, and numbers that are rounded after every operation. optim_step.h has the
// arithmetic.
#pragma once

#include <cmath>
#include <cstdint>

#include "hd.h"

namespace nms {

// What N:M training adds for weights that the mask prunes.
enum class Term : int {
  kNone,       // straight-through: nothing
  kGradient,   // gradient += lambda * w
  kDecoupled,  // w -= lr * lambda * w, before anything else
  kMasked,     // gradient = 0
};

// A number whose operations are never contracted to a fused multiply-add.
template <class T>
struct Rounded {
  T value;

  NMS_HD static Rounded of(double x) { return {static_cast<T>(x)}; }
};

#if defined(__CUDA_ARCH__)
NMS_HD float multiply(float a, float b) { return __fmul_rn(a, b); }
NMS_HD float add(float a, float b) { return __fadd_rn(a, b); }
NMS_HD float divide(float a, float b) { return __fdiv_rn(a, b); }
NMS_HD float root(float a) { return __fsqrt_rn(a); }
NMS_HD double multiply(double a, double b) { return __dmul_rn(a, b); }
NMS_HD double add(double a, double b) { return __dadd_rn(a, b); }
NMS_HD double divide(double a, double b) { return __ddiv_rn(a, b); }
NMS_HD double root(double a) { return __dsqrt_rn(a); }
#else
template <class T>
NMS_HD T multiply(T a, T b) {
  return a * b;
}
template <class T>
NMS_HD T add(T a, T b) {
  return a + b;
}
template <class T>
NMS_HD T divide(T a, T b) {
  return a / b;
}
template <class T>
NMS_HD T root(T a) {
  return std::sqrt(a);
}
#endif

template <class T>
NMS_HD Rounded<T> operator*(Rounded<T> a, Rounded<T> b) {
  return {multiply(a.value, b.value)};
}
template <class T>
NMS_HD Rounded<T> operator+(Rounded<T> a, Rounded<T> b) {
  return {add(a.value, b.value)};
}
template <class T>
NMS_HD Rounded<T> operator-(Rounded<T> a) {
  return {-a.value};
}
template <class T>
NMS_HD Rounded<T> operator-(Rounded<T> a, Rounded<T> b) {
  return {add(a.value, -b.value)};
}
template <class T>
NMS_HD Rounded<T> operator/(Rounded<T> a, Rounded<T> b) {
  return {divide(a.value, b.value)};
}
template <class T>
NMS_HD Rounded<T> square_root(Rounded<T> a) {
  return {root(a.value)};
}
template <class T>
NMS_HD Rounded<T> choose(bool kept, Rounded<T> a, Rounded<T> b) {
  return kept ? a : b;
}
// The larger one; NaN if b is.
template <class T>
NMS_HD Rounded<T> larger(Rounded<T> a, Rounded<T> b) {
  return b.value <= a.value ? a : b;
}

// ---- What a step is made with, as the caller says it ----

struct StepOptions {
  double lr = 0, weight_decay = 0;
  bool maximize = false;
  Term term = Term::kNone;
  double lambda_w = 0;
  double grad_scale = 1;  // gradients are divided by it
};

struct SgdOptions : StepOptions {
  double momentum = 0, dampening = 0;
  bool nesterov = false;
  bool first = false;  // there is no momentum yet: it becomes the gradient
};

struct AdamWOptions : StepOptions {
  double beta1 = 0, beta2 = 0, eps = 0;
  double correction1 = 1, correction2 = 1;  // 1 - beta^step
  bool amsgrad = false;
};

}  // namespace nms
