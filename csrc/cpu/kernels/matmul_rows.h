// What surrounds the dense blocks: x to packed units, sums to columns of y, and the product of a block.
//
// Note    Included inside a target region (or none, for the scalar kernels), after convert_lanes.h and linear_rows.h.
#pragma once

// Packed is the element of packed x: float, double, or the 16 bits of a bfloat16, of which a unit takes two.
template <DType D, class Packed, int kUnitRows = 1>
void pack_units(const PackUnits& p) {
  using Bits = typename Element<D>::Bits;
  constexpr int kRows = kBlockUnits * kUnitRows;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Bits* x = static_cast<const Bits*>(p.x) + b * p.x_row;
    Packed* packed = static_cast<Packed*>(p.packed) + b * kRows;
    for (int row = 0; row < kRows; row += kWindowInputs) {
      const int count = std::clamp(p.count - row, 0, kWindowInputs);
      pack_window<D, Packed>(count > 0 ? x + row * p.x_r : x, p.x_r, count, packed + row);
    }
  }
}

template <DType D>
void store_strip(const StoreStrip& s) {
  using Bits = typename Element<D>::Bits;
  using Sum = typename Arithmetic<D>::Type;
  for (int64_t b = 0; b < s.batch; ++b) {
    const Sum* sums = static_cast<const Sum*>(s.sums) + b * kStripInputs;
    Bits* y = static_cast<Bits*>(s.y) + b * s.y_row;
    for (int column = 0; column < s.columns; column += kPanelRows)
      write_outputs<D>(sums + column, std::min(kPanelRows, s.columns - column), y + column);
  }
}

// kRows rows of x times a block. A Format has vectors of kLanes sums, kVectors of which go together, and
//   spread        one number of x in all lanes
//   numbers       some units of one row of the block
//   multiply_add
template <class Format, int kRows>
NMS_INLINE void multiply_rows(const uint8_t* x, const uint8_t* block, int64_t units, float* sums) {
  constexpr int kVectors = Format::kVectors, kLanes = Format::kLanes;
  for (int column = 0; column < kStripInputs; column += kLanes * kVectors) {
    typename Format::Vec sum[kRows][kVectors];
    NMS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      NMS_UNROLL
      for (int v = 0; v < kVectors; ++v) sum[r][v] = Format::load(sums + r * kStripInputs + column + v * kLanes);
    }
    for (int64_t unit = 0; unit < units; ++unit) {
      typename Format::Numbers numbers[kVectors];
      NMS_UNROLL
      for (int v = 0; v < kVectors; ++v)
        numbers[v] = Format::numbers(block + (unit * kTileStride + column + v * kLanes) * 4);
      NMS_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const typename Format::Numbers factor = Format::spread(x + (r * kBlockUnits + unit) * 4);
        NMS_UNROLL
        for (int v = 0; v < kVectors; ++v) sum[r][v] = Format::multiply_add(factor, numbers[v], sum[r][v]);
      }
    }
    NMS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      NMS_UNROLL
      for (int v = 0; v < kVectors; ++v) Format::store(sums + r * kStripInputs + column + v * kLanes, sum[r][v]);
    }
  }
}

// An output's sum does not depend on how many rows go together.
template <class Format>
void block_product(const BlockProduct& b) {
  const uint8_t* x = static_cast<const uint8_t*>(b.x);
  const uint8_t* block = static_cast<const uint8_t*>(b.block);
  float* sums = static_cast<float*>(b.sums);
  int64_t left = b.batch;
  for (; left >= 6; left -= 6, x += 6 * kBlockUnits * 4, sums += 6 * kStripInputs)
    multiply_rows<Format, 6>(x, block, b.units, sums);
  switch (left) {
    case 5:
      return multiply_rows<Format, 5>(x, block, b.units, sums);
    case 4:
      return multiply_rows<Format, 4>(x, block, b.units, sums);
    case 3:
      return multiply_rows<Format, 3>(x, block, b.units, sums);
    case 2:
      return multiply_rows<Format, 2>(x, block, b.units, sums);
    case 1:
      return multiply_rows<Format, 1>(x, block, b.units, sums);
    default:
      return;
  }
}
