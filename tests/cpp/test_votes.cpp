// DominoSearch's kernels, of the CPU and of CUDA, against the formulas: thresholds, votes, and the pull on kept
// weights. Every buffer is exactly as large as a kernel may touch.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "check.h"
#include "core/dtype_switch.h"
#include "cpu/kernels/kernels.h"
#include "cuda/kernels/votes.cuh"
#include "cuda_host.h"

namespace {

template <DType D>
using BitsOf = typename Element<D>::Bits;

template <DType D>
Shape random_grouped(int64_t m) {
  Shape shape = random_shape(2000);
  shape.sizes[shape.dim] = round_up(shape.sizes[shape.dim], m);
  std::vector<int> order(shape.sizes.size());
  std::iota(order.begin(), order.end(), 0);
  if (random_int(0, 1)) std::shuffle(order.begin(), order.end(), rng);
  shape.strides = strides_in_order(shape.sizes, order, random_int(0, 2) ? 0 : random_int(1, 16));
  return shape;
}

template <DType D>
void fill_numbers(Buffer<BitsOf<D>>& buffer) {
  using Number = typename Arithmetic<D>::Type;
  for (int64_t i = 0; i < buffer.size(); ++i)
    buffer[i] = from_arithmetic<D>(std::ldexp(static_cast<Number>(random_int(-99, 99)), -5));
}

// The rows of a shape as a CPU kernel's panel of one row: what the ops' tiles are made of.
template <DType D>
void check_groups(int m) {
  using Bits = BitsOf<D>;
  const Shape shape = random_grouped<D>(m);
  const int64_t groups = shape.k() / m;
  Buffer<Bits> w(shape.span(), random_int(0, 3));
  if (random_int(0, 2))
    fill_numbers<D>(w);
  else
    fill_random(w);  // NaN and infinities among them
  const int n = static_cast<int>(random_int(1, m));

  // Expected, from the definitions.
  std::vector<Bits> means;
  int64_t votes = 0;
  Buffer<Bits> limits(shape.rows() * groups, random_int(0, 3));
  fill_numbers<D>(limits);
  for (int64_t row = 0; row < shape.rows(); ++row) {
    for (int64_t group = 0; group < groups; ++group) {
      std::vector<int64_t> keys;
      for (int i = 0; i < m; ++i) keys.push_back(magnitude_key<D>(w[shape.offset(row, group * m + i)]));
      const uint64_t kept = select_group(keys.data(), m, m - m / 2);
      double sum = 0;
      int above = 0;
      for (int i = 0; i < m; ++i) {
        if (!(kept >> i & 1))
          sum += std::fabs(static_cast<double>(to_arithmetic<D>(w[shape.offset(row, group * m + i)])));
        above += keys[i] > magnitude_key<D>(limits[row * groups + group]);
      }
      if (sum != sum) sum = NAN;
      means.push_back(from_arithmetic<D>(static_cast<typename Arithmetic<D>::Type>(sum / (m / 2))));
      votes += above < n;
    }
  }

  // CPU: row by row, on every instruction set.
  const DType dtype = D;
  for (const char* isa : cpu_isas()) {
    CHECK(set_cpu_isa(isa));
    int64_t counted = 0;
    for (int64_t row = 0; row < shape.rows(); ++row) {
      Buffer<Bits> thresholds(groups, 1);
      const Bits* first = w.data() + shape.offset(row, 0);
      nms::group_thresholds(dtype, first, 0, shape.strides[shape.dim], thresholds.data(), groups, 1, shape.k(), m);
      for (int64_t group = 0; group < groups; ++group) CHECK_EQ(thresholds[group], means[row * groups + group]);
      counted += kernels().vote[D == DType::kFloat64 ? 0 : 1](
          {first, 0, shape.strides[shape.dim], limits.data() + row * groups, groups, 1, shape.k(), n, m});
    }
    CHECK_EQ(counted, votes);
  }

  // CUDA.
  const Layout layout = make_layout(shape.sizes, shape.strides, nullptr, shape.dim, m);
  Buffer<Bits> thresholds(shape.rows() * groups, 1);
  run_map(GroupThresholds<D>{make_spans(layout, m), w.data(), thresholds.data(), m});
  for (size_t i = 0; i < means.size(); ++i) CHECK_EQ(thresholds[static_cast<int64_t>(i)], means[i]);
  const CountVotes<D> body{make_spans(layout, m), w.data(), limits.data(), n, m};
  uint64_t counted = 0;
  for (int64_t i = 0; i < body.count(); ++i) counted += body(i);
  CHECK_EQ(static_cast<int64_t>(counted), votes);
}

template <DType G, DType W>
void check_add_kept(const Shape& out_shape, const Shape& w_shape) {
  using Sum = typename Arithmetic<G>::Type;
  const int64_t bits_row = divide_up(w_shape.k(), 8);
  Buffer<BitsOf<G>> grad(out_shape.span(), random_int(0, 3)), out(out_shape.span(), random_int(0, 3));
  Buffer<BitsOf<W>> w(w_shape.span(), random_int(0, 3));
  Buffer<uint8_t> bits(w_shape.rows() * bits_row, 1);
  fill_numbers<G>(grad);
  fill_numbers<W>(w);
  fill_random(bits);
  const double alpha = 0.1;
  const float scale = 3.0f;
  const bool scaled = random_int(0, 1), in_place = random_int(0, 1);
  const double alpha_now = scaled ? alpha * static_cast<double>(scale) : alpha;
  const Sum factor = static_cast<Sum>(alpha_now);
  std::vector<BitsOf<G>> sums, want;
  for (int64_t row = 0; row < w_shape.rows(); ++row) {
    for (int64_t i = 0; i < w_shape.k(); ++i) {
      const volatile Sum term = factor * static_cast<Sum>(to_arithmetic<W>(w[w_shape.offset(row, i)]));
      const BitsOf<G> sum = from_arithmetic<G>(to_arithmetic<G>(grad[out_shape.offset(row, i)]) + term);
      sums.push_back(sum);
      want.push_back(bits[row * bits_row + i / 8] >> i % 8 & 1 ? sum : BitsOf<G>{0});
    }
  }
  const auto check = [&](Buffer<BitsOf<G>>& got, const std::vector<BitsOf<G>>& wanted) {
    for (int64_t row = 0; row < w_shape.rows(); ++row)
      for (int64_t i = 0; i < w_shape.k(); ++i) CHECK_EQ(got[out_shape.offset(row, i)], wanted[row * w_shape.k() + i]);
  };
  // The CPU's sum of any layout, row by row; masking is another kernel's.
  for (int64_t row = 0; row < w_shape.rows(); ++row) {
    const int64_t at = out_shape.offset(row, 0);
    add_scaled(G, W,
               {grad.data() + at, out.data() + at, 0, out_shape.strides[out_shape.dim],
                w.data() + w_shape.offset(row, 0), 0, w_shape.strides[w_shape.dim], 1, w_shape.k(), alpha_now});
  }
  check(out, sums);
  if constexpr (G == DType::kFloat32 && W == DType::kFloat32) {
    if (out_shape.strides[out_shape.dim] == 1 && w_shape.strides[w_shape.dim] == 1) {
      for (const char* isa : cpu_isas()) {
        CHECK(set_cpu_isa(isa));
        for (int64_t row = 0; row < w_shape.rows(); ++row) {
          const int64_t at = out_shape.offset(row, 0);
          kernels().add_kept({reinterpret_cast<const float*>(grad.data() + at),
                              reinterpret_cast<const float*>(w.data() + w_shape.offset(row, 0)),
                              reinterpret_cast<float*>(out.data() + at), bits.data() + row * bits_row, w_shape.k(),
                              factor, false});
        }
        check(out, want);
      }
    }
  }
  const Layout layout = make_layout(out_shape.sizes, out_shape.strides, &w_shape.strides, out_shape.dim, 8);
  Buffer<BitsOf<G>>& target = in_place ? grad : out;
  const bool aligned = whole_bytes_aligned(layout, grad.data(), sizeof(BitsOf<G>), w.data(), sizeof(BitsOf<W>)) &&
                       whole_bytes_aligned(layout, target.data(), sizeof(BitsOf<G>), nullptr, 0);
  run_map(AddKept<G, W>{make_spans(layout, 8), grad.data(), target.data(), w.data(), bits.data(),
                        divide_up(layout.k, 8), alpha, scaled ? &scale : nullptr, aligned});
  check(target, want);
}

}  // namespace

int main() {
  for (int trial = 0; trial < 1500; ++trial) {
    const int m = static_cast<int>(random_int(0, 2) ? int64_t{1} << random_int(1, 6) : random_int(2, 64));
    check_groups<DType::kFloat32>(m);
    if (trial % 3 == 0) check_groups<DType::kFloat64>(m);
    const Shape shape = random_shape(1000), other = another_layout(shape);
    check_add_kept<DType::kFloat32, DType::kFloat32>(other, shape);
    switch (trial % 4) {
      case 0:
        check_add_kept<DType::kFloat64, DType::kFloat64>(other, shape);
        break;
      case 1:
        check_add_kept<DType::kBFloat16, DType::kFloat32>(other, shape);
        break;
      case 2:
        check_add_kept<DType::kFloat32, DType::kFloat16>(other, shape);
        break;
      default:
        check_add_kept<DType::kFloat32, DType::kFloat32>(shape, shape);
    }
  }
  return 0;
}
