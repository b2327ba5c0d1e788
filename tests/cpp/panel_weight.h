// Random weights in all their forms, and numbers of any element type, for the tests of packed products.
//
// Arrays end where their allocation ends, so that the address sanitizer sees any read too far.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "core/bits.h"
#include "core/convert.h"
#include "core/packed.h"
#include "core/panel_layout.h"
#include "cpu/kernels/linear_pack.h"

using nms::DType;
using nms::PanelLayout;

inline std::mt19937 rng(1);

inline int random_int(int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); }

// ---- Numbers of any element type ----

inline int size_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// Exactly `count` elements on the heap.
class Array {
 public:
  Array(DType dtype, int64_t count) : dtype_(dtype), bytes_(new uint8_t[count * size_of(dtype)]) {}

  void* data() { return bytes_.get(); }
  const void* data() const { return bytes_.get(); }

  double get(int64_t i) const {
    switch (dtype_) {
      case DType::kFloat64:
        return read<double>(i);
      case DType::kFloat32:
        return read<float>(i);
      case DType::kBFloat16:
        return nms::to_arithmetic<DType::kBFloat16>(read<uint16_t>(i));
      default:
        return nms::to_arithmetic<DType::kFloat16>(read<uint16_t>(i));
    }
  }
  void set(int64_t i, double value) {
    const float narrow = static_cast<float>(value);
    switch (dtype_) {
      case DType::kFloat64:
        return write(i, value);
      case DType::kFloat32:
        return write(i, narrow);
      case DType::kBFloat16:
        return write(i, nms::float_to_bfloat16(narrow));
      default:
        return write(i, nms::float_to_float16(narrow));
    }
  }

 private:
  template <class T>
  T read(int64_t i) const {
    T value;
    std::memcpy(&value, bytes_.get() + i * sizeof(T), sizeof(T));
    return value;
  }
  template <class T>
  void write(int64_t i, T value) {
    std::memcpy(bytes_.get() + i * sizeof(T), &value, sizeof(T));
  }

  DType dtype_;
  std::unique_ptr<uint8_t[]> bytes_;
};

// Small multiples of 1/4: exact in every type, and so are their products and sums here.
inline double random_number() { return random_int(-8, 8) / 4.0; }

// ---- A random packed weight in all its forms ----

struct Weight {
  Weight(DType dtype, int n, int m, int64_t rows, int64_t k)
      : layout(nms::panel_layout(n, m, k, dtype)),
        groups((k + m - 1) / m),
        index_bytes(nms::index_row_bytes(nms::packed_format(n, m), groups)),
        dense(dtype, rows * k),
        values(dtype, rows * groups * n),
        indices(new uint8_t[std::max<int64_t>(1, rows * index_bytes)]),
        panel_values(dtype, nms::panel_count(rows) * layout.panel_values()),
        panel_words(nms::panel_count(rows) * layout.panel_words()) {
    const nms::PackedFormat format = nms::packed_format(n, m);
    for (int64_t i = 0; i < rows * k; ++i) dense.set(i, 0);
    for (int64_t row = 0; row < rows; ++row) {
      nms::BitWriter writer(indices.get() + row * index_bytes);
      for (int64_t group = 0; group < groups; ++group) {
        const int length = static_cast<int>(std::min<int64_t>(m, k - group * m));
        uint64_t mask = 0;
        while (nms::popcount64(mask) < std::min(n, length)) mask |= uint64_t{1} << random_int(0, length - 1);
        mask = nms::fill_short_group(mask, length, n);
        writer.put(nms::encode_group(mask, format), format.group_bits);
        for (int j = 0; mask != 0; mask &= mask - 1, ++j) {
          const int place = nms::lowest_bit(mask);
          const double value = place < length ? random_number() : 0;
          values.set((row * groups + group) * n + j, value);
          if (place < length) dense.set(row * k + group * m + place, value);
        }
      }
      writer.finish();
    }
    nms::pack_panels(form(dtype, rows, k), values.data(), indices.get(), 0, nms::panel_count(rows));
  }

  nms::PanelForm form(DType dtype, int64_t rows, int64_t k) {
    return {panel_values.data(), panel_words.data(), size_of(dtype), rows, k, layout};
  }

  PanelLayout layout;
  int64_t groups, index_bytes;
  Array dense, values;
  std::unique_ptr<uint8_t[]> indices;
  Array panel_values;
  std::vector<uint32_t> panel_words;
};

struct Pattern {
  int n, m;
};
constexpr Pattern kPatterns[] = {{1, 2},  {2, 4},  {1, 4},  {1, 3}, {3, 4}, {1, 8}, {2, 8},  {4, 8},  {1, 16},
                                 {2, 16}, {4, 16}, {8, 16}, {1, 1}, {2, 3}, {5, 7}, {3, 10}, {7, 13}, {16, 16}};
constexpr DType kTypes[] = {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16};
