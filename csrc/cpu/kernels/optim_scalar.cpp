// Optimizer steps for every CPU, one weight at a time; the only kernels for float64.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../../core/convert.h"
#include "../../core/dtype_switch.h"
#include "../../core/optim.h"
#include "optim.h"
#include "target_region.h"

namespace nms {
namespace {

#include "../../core/optim_step.h"

template <DType W, DType G, class Step, class KeptAt>
void update_row(const Step& step, const UpdatePanel& p, int64_t at, KeptAt kept_at) {
  using Number = Rounded<typename Arithmetic<W>::Type>;
  using Bits = typename Element<W>::Bits;
  Bits* w = static_cast<Bits*>(p.weight) + at;
  const auto* g = static_cast<const typename Element<G>::Bits*>(p.grad) + at;
  const int states = step.states();
  for (int64_t i = 0; i < p.inner; ++i) {
    Number weight{to_arithmetic<W>(w[i])}, held[Step::kMaxStates] = {};
    for (int s = 0; s < states; ++s) held[s] = {to_arithmetic<W>(static_cast<Bits*>(p.state[s])[at + i])};
    step(weight, Number{static_cast<typename Arithmetic<W>::Type>(to_arithmetic<G>(g[i]))}, held, kept_at(i));
    w[i] = from_arithmetic<W>(weight.value);
    for (int s = 0; s < states; ++s) static_cast<Bits*>(p.state[s])[at + i] = from_arithmetic<W>(held[s].value);
  }
}

template <template <class> class Step, class Options>
void update(DType weight, DType grad, const UpdatePanel& p, const Options& options) {
  switch_gradient_dtype(weight, [&](auto w) {
    switch_gradient_dtype(grad, [&](auto g) {
      const Step<Rounded<typename Arithmetic<w>::Type>> step(options);
      for (int64_t row = 0; row < p.outer; ++row) {
        const uint8_t* bits = p.bits ? p.bits + row * p.bits_row : nullptr;
        const uint32_t* words = p.words ? p.words + row * p.inner : nullptr;
        update_row<w, g>(step, p, row * p.stride, [bits, words](int64_t i) -> bool {
          return bits ? bits[i / 8] >> (i % 8) & 1 : words ? words[i] != 0 : true;
        });
      }
    });
  });
}

void narrow(DType to_type, const float* from, void* to, int64_t count) {
  switch_gradient_dtype(to_type, [&](auto d) {
    if constexpr (sizeof(typename Element<d>::Bits) == 2)
      for (int64_t i = 0; i < count; ++i) static_cast<typename Element<d>::Bits*>(to)[i] = from_arithmetic<d>(from[i]);
  });
}

}  // namespace

OptimTable scalar_optim() { return {update<Sgd, SgdOptions>, update<AdamW, AdamWOptions>, narrow}; }

}  // namespace nms
