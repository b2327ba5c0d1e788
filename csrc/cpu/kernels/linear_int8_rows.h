// What surrounds the inner loop in integers: rows of x to packed tiles, sums to rows of y.
//
// A Rounding has
//   kOffset   what is added to the integers of packed x: 0, or 128 for unsigned bytes
//   quantize  sixteen numbers times `inverse`, rounded, as bytes
//
// Note    Included inside a target region (or none), after linear_rows.h.
#pragma once

// The largest magnitude of a row, as a number: bits of magnitudes are in the order of the numbers, NaN above all.
template <DType D>
float largest_magnitude(const typename Element<D>::Bits* x, int64_t x_k, int64_t k) {
  using Bits = typename Element<D>::Bits;
  Bits largest = 0;
  if (x_k == 1) {
    for (int64_t i = 0; i < k; ++i) {
      const Bits magnitude = x[i] & Element<D>::kMagnitude;
      largest = largest > magnitude ? largest : magnitude;
    }
  } else {
    for (int64_t i = 0; i < k; ++i) {
      const Bits magnitude = x[i * x_k] & Element<D>::kMagnitude;
      largest = largest > magnitude ? largest : magnitude;
    }
  }
  return to_arithmetic<D>(largest);
}

template <DType D, class Rounding>
void quantize_row(const QuantizeRow& q) {
  using Bits = typename Element<D>::Bits;
  const PanelLayout& layout = *q.layout;
  const Bits* x = static_cast<const Bits*>(q.x);
  uint8_t* packed = static_cast<uint8_t*>(q.packed) + int64_t{q.row} * layout.halves * kWindowInputs;
  const int64_t stride = int64_t{q.tile_rows} * layout.halves * kWindowInputs;
  const Int8Scale scale = int8_scale(largest_magnitude<D>(x, q.x_k, q.k));
  if (q.k > 0) *q.scale = scale.scale;
  int64_t first = 0;
  for (int64_t step = 0; step < layout.steps; ++step, packed += stride) {
    for (int window = 0; window < layout.halves; ++window, first += layout.window) {
      uint8_t* out = packed + window * kWindowInputs;
      const int64_t left = q.k - first;
      if (scale.inverse == 0.0f || left <= 0) {
        std::memset(out, Rounding::kOffset, kWindowInputs);
        continue;
      }
      float numbers[kWindowInputs];
      pack_window<D, float>(x + first * q.x_k, q.x_k, static_cast<int>(left < layout.window ? left : layout.window),
                            numbers);
      Rounding::quantize(numbers, scale.inverse, out);
    }
  }
}

template <DType D, Activation A, int kOffset>
NMS_INLINE void store_int8_rows(const StoreSums& s) {
  using Bits = typename Element<D>::Bits;
  float bias[kPanelRows] = {};
  if (s.bias)
    for (int i = 0; i < s.outputs; ++i) bias[i] = to_arithmetic<D>(static_cast<const Bits*>(s.bias)[i]);
  uint32_t offsets[kPanelRows];
  for (int i = 0; i < kPanelRows; ++i) offsets[i] = uint32_t{kOffset} * static_cast<uint32_t>(s.int8.weight_sums[i]);
  for (int64_t row = 0; row < s.rows; ++row) {
    const uint32_t* sums = static_cast<const uint32_t*>(s.sums) + row * kPanelRows;
    Bits* y = static_cast<Bits*>(s.y) + row * s.y_row;
    float out[kPanelRows];
    for (int i = 0; i < kPanelRows; ++i)
      out[i] = dequantize(static_cast<int32_t>(sums[i] - offsets[i]), s.int8.x_scales[row], s.int8.weight_scales[i]);
    asm("" : "+m"(out));  // compilers would make one multiply-add of this product and the next sum
    for (int i = 0; i < kPanelRows; ++i) out[i] = activate<A>(out[i] + bias[i]);
    write_outputs<D>(out, s.outputs, y);
  }
}

template <DType D, int kOffset>
void store_int8(const StoreSums& s) {
  switch (s.activation) {
    case Activation::kNone:
      return store_int8_rows<D, Activation::kNone, kOffset>(s);
    case Activation::kRelu:
      return store_int8_rows<D, Activation::kRelu, kOffset>(s);
    case Activation::kGelu:
      return store_int8_rows<D, Activation::kGelu, kOffset>(s);
    case Activation::kSilu:
      return store_int8_rows<D, Activation::kSilu, kOffset>(s);
  }
}

template <DType D, class Rounding>
Int8Kernels int8_kernels_of(int (*max_tile_rows)(const PanelLayout&),
                            LinearTileKernel (*tile)(const PanelLayout&, int, int64_t)) {
  Int8Kernels kernels = {};
  kernels.linear.input_bytes = 1;
  kernels.linear.max_tile_rows = max_tile_rows;
  kernels.linear.tile = tile;
  kernels.linear.store = &store_int8<D, Rounding::kOffset>;
  kernels.quantize = &quantize_row<D, Rounding>;
  return kernels;
}

template <class Rounding>
void use_int8_kernels(Int8Table& table, int (*max_tile_rows)(const PanelLayout&),
                      LinearTileKernel (*tile)(const PanelLayout&, int, int64_t)) {
  table.of[static_cast<int>(DType::kFloat32)] = int8_kernels_of<DType::kFloat32, Rounding>(max_tile_rows, tile);
  table.of[static_cast<int>(DType::kBFloat16)] = int8_kernels_of<DType::kBFloat16, Rounding>(max_tile_rows, tile);
  table.of[static_cast<int>(DType::kFloat16)] = int8_kernels_of<DType::kFloat16, Rounding>(max_tile_rows, tile);
}
