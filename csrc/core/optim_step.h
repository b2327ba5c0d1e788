// One optimizer step of one weight: gradient scale, weight decay, momentum or moments, and the sparse training term.
//
// Number is a number (Rounded<float>, Rounded<double>) or a vector of them with the same operators; Kept is bool or the
// vector's mask. Every operation is rounded on its own, in the order that stands here: vectors, scalars, the GPU and
// the PyTorch twin (nmsparse_ext/_reference_optim.py) give the same bits. Build without contraction
// (-ffp-contract=off).
//
// Note    Included inside namespace nms after optim.h; for vectors, inside their target region.
#pragma once

// What comes before the optimizer proper.
template <class Number>
struct Gradient {
  Number scale, pull;
  Term term;
  bool scaled, maximize;

  NMS_HD explicit Gradient(const StepOptions& o)
      : scale(Number::of(o.grad_scale)),
        pull(Number::of(o.term == Term::kDecoupled ? -o.lambda_w * o.lr : o.lambda_w)),
        term(o.term),
        scaled(o.grad_scale != 1),
        maximize(o.maximize) {}

  template <class Kept>
  NMS_HD void prepare(Number& w, Number& g, Kept kept) const {
    if (scaled) g = g / scale;
    if (term == Term::kMasked) g = choose(kept, g, Number::of(0));
    if (maximize) g = -g;  // the pull is towards zero either way
    if (term == Term::kGradient) g = choose(kept, g, g + pull * w);
    if (term == Term::kDecoupled) w = choose(kept, w, w + pull * w);
  }
};

template <class Number>
struct Sgd {
  using Options = SgdOptions;
  static constexpr int kMaxStates = 1;

  Gradient<Number> gradient;
  Number lr, weight_decay, momentum, fresh;
  bool decays, has_momentum, nesterov, first;

  NMS_HD explicit Sgd(const SgdOptions& o)
      : gradient(o),
        lr(Number::of(o.lr)),
        weight_decay(Number::of(o.weight_decay)),
        momentum(Number::of(o.momentum)),
        fresh(Number::of(1 - o.dampening)),
        decays(o.weight_decay != 0),
        has_momentum(o.momentum != 0),
        nesterov(o.nesterov),
        first(o.first) {}

  NMS_HD int states() const { return has_momentum ? 1 : 0; }

  template <class Kept>
  NMS_HD void operator()(Number& w, Number g, Number* state /* [1]: momentum */, Kept kept) const {
    gradient.prepare(w, g, kept);
    if (decays) g = g + weight_decay * w;
    if (has_momentum) {
      state[0] = first ? g : momentum * state[0] + fresh * g;
      g = nesterov ? g + momentum * state[0] : state[0];
    }
    w = w - lr * g;
  }
};

template <class Number>
struct AdamW {
  using Options = AdamWOptions;
  static constexpr int kMaxStates = 3;

  Gradient<Number> gradient;
  Number shrink, fresh1, beta2, fresh2, step_size, root2, eps;
  bool amsgrad;

  NMS_HD explicit AdamW(const AdamWOptions& o)
      : gradient(o),
        shrink(Number::of(1 - o.lr * o.weight_decay)),
        fresh1(Number::of(1 - o.beta1)),
        beta2(Number::of(o.beta2)),
        fresh2(Number::of(1 - o.beta2)),
        step_size(Number::of(o.lr / o.correction1)),
        root2(Number::of(sqrt(o.correction2))),
        eps(Number::of(o.eps)),
        amsgrad(o.amsgrad) {}

  NMS_HD int states() const { return amsgrad ? 3 : 2; }

  template <class Kept>
  NMS_HD void operator()(Number& w, Number g, Number* state /* [3]: m, v, largest v */, Kept kept) const {
    gradient.prepare(w, g, kept);
    w = w * shrink;
    state[0] = state[0] + fresh1 * (g - state[0]);
    state[1] = beta2 * state[1] + (fresh2 * g) * g;
    Number v = state[1];
    if (amsgrad) v = state[2] = larger(state[2], v);
    w = w - (step_size * state[0]) / (square_root(v) / root2 + eps);
  }
};
