// The CPU optimizer steps: every instruction set of this host against plain loops, bit for bit, under the sanitizers.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "check.h"
#include "core/convert.h"
#include "core/dtype_switch.h"
#include "cpu/kernels/kernels.h"

namespace nms {
namespace reference {
#include "core/optim_step.h"
}  // namespace reference
}  // namespace nms

namespace {

using namespace nms;

std::mt19937_64 rng(0);

int64_t random_int(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(rng); }

template <DType D>
using BitsOf = typename Element<D>::Bits;

// [outer, stride] numbers, ending where the last row ends.
template <DType D>
std::unique_ptr<BitsOf<D>[]> numbers(int64_t count, bool positive) {
  std::unique_ptr<BitsOf<D>[]> found(new BitsOf<D>[static_cast<size_t>(count)]);
  using Real = typename Arithmetic<D>::Type;
  for (int64_t i = 0; i < count; ++i) {
    Real value = static_cast<Real>(random_int(positive ? 0 : -3000, 3000)) / 512;
    if (random_int(0, 40) == 0) value = std::numeric_limits<Real>::infinity();
    if (random_int(0, 40) == 0) value = static_cast<Real>(1e-30);
    if (!positive && random_int(0, 20) == 0) value = static_cast<Real>(-0.0);
    found[static_cast<size_t>(i)] = from_arithmetic<D>(value);
  }
  return found;
}

// NaNs count as equal, whatever their payload.
template <DType D>
bool same(BitsOf<D> a, BitsOf<D> b) {
  const auto x = to_arithmetic<D>(a), y = to_arithmetic<D>(b);
  return a == b || (std::isnan(x) && std::isnan(y));
}

void fill(SgdOptions& o) {
  o.momentum = random_int(0, 2) ? 0.9 : 0;
  o.dampening = random_int(0, 1) ? 0.25 : 0;
  o.nesterov = random_int(0, 1);
  o.first = random_int(0, 2) == 0;
}
void fill(AdamWOptions& o) {
  o.beta1 = 0.9;
  o.beta2 = 0.99;
  o.eps = 1e-8;
  o.correction1 = 1 - std::pow(o.beta1, 3);
  o.correction2 = 1 - std::pow(o.beta2, 3);
  o.amsgrad = random_int(0, 1);
}

template <template <class> class StepOf, DType W, DType G, class Run>
void check_update(Run run) {
  using Number = Rounded<typename Arithmetic<W>::Type>;
  typename StepOf<Number>::Options options;
  fill(options);
  options.lr = 0.1;
  options.weight_decay = random_int(0, 1) ? 0.01 : 0;
  options.maximize = random_int(0, 1);
  options.term = static_cast<Term>(random_int(0, 3));
  options.lambda_w = 0.02;
  options.grad_scale = random_int(0, 1) ? 3 : 1;
  const StepOf<Number> step(options);

  const int64_t outer = random_int(1, 4), inner = random_int(1, 90), stride = inner + random_int(0, 20);
  const int64_t count = (outer - 1) * stride + inner;
  auto weight = numbers<W>(count, false);
  auto grad = numbers<G>(count, false);
  std::unique_ptr<BitsOf<W>[]> state[3];
  for (int s = 0; s < 3; ++s) state[s] = numbers<W>(count, s > 0);
  const int64_t bits_row = (inner + 7) / 8 + random_int(0, 3), bits_size = (outer - 1) * bits_row + (inner + 7) / 8;
  std::unique_ptr<uint8_t[]> bits(new uint8_t[static_cast<size_t>(bits_size)]);
  for (int64_t i = 0; i < bits_size; ++i) bits[static_cast<size_t>(i)] = static_cast<uint8_t>(rng());
  std::unique_ptr<uint32_t[]> words(new uint32_t[static_cast<size_t>(outer * inner)]);
  const auto bit = [&](int64_t row, int64_t i) {
    return bits[static_cast<size_t>(row * bits_row + i / 8)] >> (i % 8) & 1;
  };
  for (int64_t row = 0; row < outer; ++row)
    for (int64_t i = 0; i < inner; ++i) words[static_cast<size_t>(row * inner + i)] = bit(row, i) ? ~0u : 0;
  const int kind = static_cast<int>(random_int(0, 2));  // bits, words, no mask

  std::vector<BitsOf<W>> want(weight.get(), weight.get() + count), want_state[3];
  for (int s = 0; s < 3; ++s) want_state[s].assign(state[s].get(), state[s].get() + count);
  for (int64_t row = 0; row < outer; ++row)
    for (int64_t i = 0; i < inner; ++i) {
      const size_t at = static_cast<size_t>(row * stride + i);
      Number w{to_arithmetic<W>(want[at])}, held[3];
      for (int s = 0; s < 3; ++s) held[s] = {to_arithmetic<W>(want_state[s][at])};
      step(w, Number{static_cast<typename Arithmetic<W>::Type>(to_arithmetic<G>(grad[at]))}, held,
           kind == 2 || bit(row, i));
      want[at] = from_arithmetic<W>(w.value);
      for (int s = 0; s < step.states(); ++s) want_state[s][at] = from_arithmetic<W>(held[s].value);
    }

  UpdatePanel panel{};
  panel.weight = weight.get();
  panel.grad = grad.get();
  for (int s = 0; s < step.states(); ++s) panel.state[s] = state[s].get();
  panel.stride = stride;
  panel.outer = outer;
  panel.inner = inner;
  if (kind == 0) {
    panel.bits = bits.get();
    panel.bits_row = bits_row;
  }
  if (kind == 1) panel.words = words.get();
  run(W, G, panel, options);
  for (int64_t i = 0; i < count; ++i) {
    CHECK(same<W>(weight[static_cast<size_t>(i)], want[static_cast<size_t>(i)]));
    for (int s = 0; s < 3; ++s) CHECK(same<W>(state[s][static_cast<size_t>(i)], want_state[s][static_cast<size_t>(i)]));
  }
}

template <template <class> class StepOf, class Run>
void check_types(Run run) {
  for (int trial = 0; trial < 150; ++trial) {
    check_update<StepOf, DType::kFloat64, DType::kFloat64>(run);
    check_update<StepOf, DType::kFloat32, DType::kFloat32>(run);
    check_update<StepOf, DType::kFloat32, DType::kBFloat16>(run);
    check_update<StepOf, DType::kFloat32, DType::kFloat16>(run);
    check_update<StepOf, DType::kBFloat16, DType::kBFloat16>(run);
    check_update<StepOf, DType::kFloat16, DType::kFloat16>(run);
  }
}

void check_narrow(const OptimTable& table) {
  for (int64_t count = 0; count < 70; ++count) {
    const auto from = numbers<DType::kFloat32>(count, false);
    std::unique_ptr<uint16_t[]> to(new uint16_t[static_cast<size_t>(count)]);
    const auto check = [&](auto d) {
      table.narrow(d, reinterpret_cast<const float*>(from.get()), to.get(), count);
      for (int64_t i = 0; i < count; ++i)
        CHECK(same<d>(to[static_cast<size_t>(i)], from_arithmetic<d>(bit_cast<float>(from[static_cast<size_t>(i)]))));
    };
    check(DTypeConstant<DType::kBFloat16>{});
    check(DTypeConstant<DType::kFloat16>{});
  }
}

}  // namespace

int main() {
  for (const char* isa : cpu_isas()) {
    CHECK(set_cpu_isa(isa));
    const OptimTable& table = kernels().optim;
    check_types<reference::Sgd>(
        [&](DType w, DType g, const UpdatePanel& p, const SgdOptions& o) { table.sgd(w, g, p, o); });
    check_types<reference::AdamW>(
        [&](DType w, DType g, const UpdatePanel& p, const AdamWOptions& o) { table.adamw(w, g, p, o); });
    check_narrow(table);
    std::printf("optimizer steps, %s: all checks passed\n", isa);
  }
}
