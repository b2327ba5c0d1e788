// What surrounds the inner loop: rows of x to packed tiles, sums to rows of y.
//
// These are plain loops over sixteen numbers; the compiler makes vectors of them, for each instruction set in turn.
// Note    Included inside a target region (or none, for the scalar kernels), before linear_table.h.
#pragma once

// ---- x ----

template <DType D, class Packed>
NMS_INLINE void pack_window(const typename Element<D>::Bits* x, int64_t x_k, int count, Packed* packed) {
  using Bits = typename Element<D>::Bits;
  if (count < kWindowInputs || x_k != 1) {
    Bits gathered[kWindowInputs] = {};
    for (int i = 0; i < count; ++i) gathered[i] = x[i * x_k];
    pack_window<D, Packed>(gathered, 1, kWindowInputs, packed);
  } else if constexpr (std::is_same_v<Packed, Bits> || D == DType::kFloat32 || D == DType::kFloat64) {
    std::memcpy(packed, x, kWindowInputs * sizeof(Packed));
  } else {
    Conversion<D>::widen(x, packed);
  }
}

// Packed is the element of packed tiles: float, double, or the 16 bits of a bfloat16.
//
// Step by step: what is written is one stream, and what is read are whole cache lines of as many streams as rows.
template <DType D, class Packed>
void pack_input(const PackInput& p) {
  using Bits = typename Element<D>::Bits;
  const int window = p.layout->window, halves = p.layout->halves;
  const Bits* x = static_cast<const Bits*>(p.x);
  Packed* packed = static_cast<Packed*>(p.packed);
  // Up to here steps are full windows of whole vectors, which lie side by side.
  int64_t step = p.first_step;
  const int64_t whole_steps =
      std::min(p.last_step, window == kWindowInputs && p.x_k == 1 ? p.k / (halves * window) : 0);
  for (; step < whole_steps; ++step) {
    const Bits* inputs = x + step * halves * kWindowInputs;
    for (int64_t row = 0; row < p.rows; ++row, inputs += p.x_row)
      for (int half = 0; half < halves; ++half, packed += kWindowInputs)
        pack_window<D, Packed>(inputs + half * kWindowInputs, 1, kWindowInputs, packed);
    const int64_t missing = (p.tile_rows - p.rows) * halves * kWindowInputs;
    std::memset(packed, 0, static_cast<size_t>(missing) * sizeof(Packed));
    packed += missing;
  }
  for (; step < p.last_step; ++step) {
    for (int64_t row = 0; row < p.tile_rows; ++row) {
      for (int half = 0; half < halves; ++half, packed += kWindowInputs) {
        const int64_t first = (step * halves + half) * window;
        const int64_t left = row < p.rows ? p.k - first : 0;
        const int count = static_cast<int>(left < 0 ? 0 : left < window ? left : window);
        pack_window<D, Packed>(count > 0 ? x + row * p.x_row + first * p.x_k : x, p.x_k, count, packed);
      }
    }
  }
}

// ---- y ----

// e^x to within 2 units in the last place; 0 and infinity beyond the range of float.
NMS_INLINE float exponential(float x) {
  x = x > 89.0f ? 89.0f : x;
  x = x < -104.0f ? -104.0f : x;
  const float shifted = x * 1.44269504088896341f + 12582912.0f;  // + 1.5 * 2^23 rounds to an integer
  const float power = shifted - 12582912.0f;
  const float rest = (x - power * 0.693359375f) + power * 2.12194440e-4f;  // ln 2 in two parts
  float e = 1.9875691500e-4f;
  e = e * rest + 1.3981999507e-3f;
  e = e * rest + 8.3334519073e-3f;
  e = e * rest + 4.1665795894e-2f;
  e = e * rest + 1.6666665459e-1f;
  e = e * rest + 5.0000001201e-1f;
  e = e * rest * rest + rest + 1.0f;
  // 2^power in two factors, each of which is a normal number.
  const int32_t exponent = static_cast<int32_t>(power);
  const int32_t half = exponent / 2;
  return e * bit_cast<float>((half + 127) << 23) * bit_cast<float>((exponent - half + 127) << 23);
}

// Error function by Abramowitz and Stegun 7.1.26: absolute error below 1.5e-7.
NMS_INLINE float error_function(float x) {
  const float magnitude = x < 0 ? -x : x;
  const float t = 1.0f / (1.0f + 0.3275911f * magnitude);
  float sum = 1.061405429f;
  sum = sum * t - 1.453152027f;
  sum = sum * t + 1.421413741f;
  sum = sum * t - 0.284496736f;
  sum = sum * t + 0.254829592f;
  const float y = 1.0f - sum * t * exponential(-magnitude * magnitude);
  return x < 0 ? -y : y;
}

NMS_INLINE double exponential(double x) { return std::exp(x); }
NMS_INLINE double error_function(double x) { return std::erf(x); }

template <Activation A, class Sum>
NMS_INLINE Sum activate(Sum v) {
  if constexpr (A == Activation::kRelu) return v < 0 ? Sum{0} : v;  // NaN passes
  if constexpr (A == Activation::kGelu)
    return v * Sum{0.5} * (Sum{1} + error_function(v * Sum{0.70710678118654752440}));
  if constexpr (A == Activation::kSilu) return v / (Sum{1} + exponential(-v));
  return v;
}

template <DType D>
NMS_INLINE void write_outputs(const typename Arithmetic<D>::Type* out, int outputs, typename Element<D>::Bits* y) {
  using Bits = typename Element<D>::Bits;
  if (outputs == kPanelRows) {
    Conversion<D>::narrow(out, y);
  } else {
    Bits some[kPanelRows];
    Conversion<D>::narrow(out, some);
    std::memcpy(y, some, static_cast<size_t>(outputs) * sizeof(Bits));
  }
}

template <DType D>
NMS_INLINE void add_outputs(const typename Element<D>::Bits* more, int outputs, typename Arithmetic<D>::Type* out) {
  if (outputs == kPanelRows) {
    NMS_VECTORIZE
    for (int i = 0; i < kPanelRows; ++i) out[i] += to_arithmetic<D>(more[i]);
  } else {
    for (int i = 0; i < outputs; ++i) out[i] += to_arithmetic<D>(more[i]);
  }
}

template <DType D, Activation A>
NMS_INLINE void store_rows(const StoreSums& s) {
  using Bits = typename Element<D>::Bits;
  using Sum = typename Arithmetic<D>::Type;
  Sum bias[kPanelRows] = {};
  if (s.bias)
    for (int i = 0; i < s.outputs; ++i) bias[i] = to_arithmetic<D>(static_cast<const Bits*>(s.bias)[i]);
  for (int64_t row = 0; row < s.rows; ++row) {
    const Sum* sums = static_cast<const Sum*>(s.sums) + row * kPanelRows;
    Bits* y = static_cast<Bits*>(s.y) + row * s.y_row;
    Sum out[kPanelRows];
    NMS_VECTORIZE
    for (int i = 0; i < kPanelRows; ++i) out[i] = sums[i] + bias[i];
    if (s.residual) add_outputs<D>(static_cast<const Bits*>(s.residual) + row * s.y_row, s.outputs, out);
    NMS_VECTORIZE
    for (int i = 0; i < kPanelRows; ++i) out[i] = activate<A>(out[i]);
    write_outputs<D>(out, s.outputs, y);
  }
}

template <DType D>
void store_sums(const StoreSums& s) {
  switch (s.activation) {
    case Activation::kNone:
      return store_rows<D, Activation::kNone>(s);
    case Activation::kRelu:
      return store_rows<D, Activation::kRelu>(s);
    case Activation::kGelu:
      return store_rows<D, Activation::kGelu>(s);
    case Activation::kSilu:
      return store_rows<D, Activation::kSilu>(s);
  }
}
