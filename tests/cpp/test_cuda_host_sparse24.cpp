// The CUDA kernels around sparse tensor cores (blobs, transposable weights, epilogues), run thread by thread on the CPU
// against naive loops. See test_cuda_host.cpp.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "check.h"
#include "core/convert.h"
#include "core/dtype_switch.h"
#include "core/packed.h"
#include "core/select.h"
#include "core/sparse24.h"
#include "core/transposable.h"
#include "cpu/kernels/sparse24.h"
#include "cuda/kernels/epilogue.cuh"
#include "cuda/kernels/sparse24.cuh"
#include "cuda/kernels/transposable_pack.cuh"
#include "cuda_host.h"

namespace {

// ---- Layouts ----

constexpr MetadataLayout kLayouts[] = {MetadataLayout::kCutlass, MetadataLayout::kSm80, MetadataLayout::kSm90};

// A thread's nibbles lie side by side, from a multiple of their bytes on; and all together everywhere, once.
void check_units(MetadataLayout layout, int bytes, int64_t rows, int64_t groups) {
  const int unit = unit_groups(bytes);
  std::vector<int> seen(rows * groups, 0);
  for (int64_t r = 0; r < rows; ++r) {
    if (r % 16 >= 8) continue;
    for (int64_t q = 0; q < groups; q += unit) {
      const int64_t first = nibble_place(layout, bytes, rows, groups, r, q);
      CHECK_EQ(first % (2 * unit), 0);
      for (int second = 0; second < 2; ++second)
        for (int g = 0; g < unit; ++g) {
          const int64_t place = nibble_place(layout, bytes, rows, groups, r + 8 * second, q + g);
          CHECK_EQ(place, first + unit_nibble(layout, bytes, second, g));
          ++seen[place];
        }
    }
  }
  for (int times : seen) CHECK_EQ(times, 1);
}

// ---- Blobs ----

// Pruning and packing at once, and packing what was pruned, against compress' rule and the CPU's loop. Every group of
// `w` is random; kinds of content include zeros, ties and NaN.
template <DType D>
void check_blob(MetadataLayout layout, int64_t rows, int64_t k) {
  using Bits = BitsOf<D>;
  constexpr int kBytes = static_cast<int>(sizeof(Bits)), kM = kBytes == 4 ? 2 : 4;
  const PackedFormat format = packed_format(kM / 2, kM);
  const int64_t groups = k / kM, index_row = index_row_bytes(format, groups);
  Buffer<Bits> w(rows * k), values(rows * k / 2);
  Buffer<uint8_t> indices(rows * index_row);
  fill_random(w);
  for (int64_t r = 0; r < rows; ++r) {
    BitWriter writer(indices.data() + r * index_row);
    for (int64_t q = 0; q < groups; ++q) {
      int64_t keys[kM];
      for (int i = 0; i < kM; ++i) keys[i] = magnitude_key<D>(w[r * k + q * kM + i]);
      uint64_t mask = select_group(keys, kM, kM / 2);
      writer.put(encode_group(mask, format), format.group_bits);
      for (int j = 0; j < kM / 2; ++j, mask &= mask - 1)
        values[r * k / 2 + q * (kM / 2) + j] = w[r * k + q * kM + lowest_bit(mask)];
    }
    writer.finish();
  }
  const int64_t value_bytes = rows * k / 2 * kBytes, bytes = value_bytes + rows * groups / 2;
  std::vector<uint8_t> want(bytes);
  std::memcpy(want.data(), values.data(), value_bytes);
  write_metadata(layout, kBytes, indices.data(), rows, k, want.data() + value_bytes);

  Buffer<uint8_t> blob(bytes);
  const Divisor row_units(k * kBytes / kPackBytes);
  const auto* dense = reinterpret_cast<const uint8_t*>(w.data());
  const auto* packed = reinterpret_cast<const uint8_t*>(values.data());
  std::memset(blob.data(), 0xEE, bytes);
  run_map(PackSparse24<D, true>{layout, dense, nullptr, rows, k, row_units, blob.data()});
  for (int64_t i = 0; i < bytes; ++i) CHECK_EQ(blob[i], want[i]);
  std::memset(blob.data(), 0xEE, bytes);
  run_map(PackSparse24<D, false>{layout, packed, indices.data(), rows, k, row_units, blob.data()});
  for (int64_t i = 0; i < bytes; ++i) CHECK_EQ(blob[i], want[i]);
}

void test_blobs() {
  for (MetadataLayout layout : kLayouts) {
    for (int bytes : {1, 2, 4}) {
      const MetadataMultiples need = metadata_multiples(layout, bytes);
      if (need.rows == 0) continue;
      for (int rows = 1; rows <= 3; ++rows)
        for (int groups = 1; groups <= 3; ++groups) check_units(layout, bytes, rows * need.rows, groups * need.groups);
    }
    for (int type = 1; type < kNumDTypes; ++type) {  // all but float64
      switch_dtype(static_cast<DType>(type), [&](auto d) {
        if constexpr (d != DType::kFloat64) {
          const int bytes = static_cast<int>(sizeof(BitsOf<d>));
          const MetadataMultiples need = metadata_multiples(layout, bytes);
          if (need.rows == 0) return;
          for (int trial = 0; trial < 4; ++trial)
            check_blob<d>(layout, need.rows * random_int(1, 2), need.groups * (bytes == 4 ? 2 : 4) * random_int(1, 3));
        }
      });
    }
  }
}

// ---- Transposable weights, packed both ways ----

template <class Bits>
void check_one_way(Buffer<Bits>& values, Buffer<uint8_t>& indices, int64_t rows, int64_t k,
                   const std::vector<uint8_t>& kept /* [rows, k] */, const std::vector<Bits>& w) {
  const PackedFormat format = packed_format(2, 4);
  const int64_t index_row = index_row_bytes(format, k / 4);
  CHECK_EQ(indices.size(), rows * index_row);
  for (int64_t r = 0; r < rows; ++r) {
    std::vector<uint8_t> want(index_row, 0);
    BitWriter writer(want.data());
    int64_t at = r * k / 2;
    for (int64_t g = 0; g < k / 4; ++g) {
      uint64_t mask = 0;
      for (int i = 0; i < 4; ++i) mask |= uint64_t{kept[r * k + g * 4 + i]} << i;
      CHECK_EQ(popcount64(mask), 2);
      writer.put(encode_group(mask, format), format.group_bits);
      for (; mask != 0; mask &= mask - 1) CHECK_EQ(values[at++], w[r * k + g * 4 + lowest_bit(mask)]);
    }
    writer.finish();
    for (int64_t i = 0; i < index_row; ++i) CHECK_EQ(indices[r * index_row + i], want[i]);
  }
}

template <DType D>
void check_transposable_pack(int64_t rows, int64_t cols, int64_t src_row, int64_t src_col) {
  using Bits = BitsOf<D>;
  Buffer<Bits> src((rows - 1) * src_row + (cols - 1) * src_col + 1, random_int(0, 2) ? 0 : random_int(1, 15));
  fill_random(src);
  Buffer<uint8_t> bits(rows * divide_up(cols, 8)), want_bits(bits.size());
  run_map(make_select_transposable<D>(src.data(), src_row, src_col, rows, cols, want_bits.data()));
  Buffer<Bits> values(rows * cols / 2), values_t(rows * cols / 2);
  Buffer<uint8_t> indices(rows * divide_up(cols, 8)), indices_t(cols * divide_up(rows, 8));
  const auto tiles = make_select_transposable<D>(src.data(), src_row, src_col, rows, cols, bits.data());
  run_map(make_pack_transposable<D>(tiles, values.data(), indices.data(), values_t.data(), indices_t.data()));
  std::vector<uint8_t> kept(rows * cols), kept_t(rows * cols);
  std::vector<Bits> w(rows * cols), w_t(rows * cols);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) {
      const uint8_t byte = want_bits[r * divide_up(cols, 8) + c / 8];
      CHECK_EQ(bits[r * divide_up(cols, 8) + c / 8], byte);
      kept[r * cols + c] = kept_t[c * rows + r] = byte >> c % 8 & 1;
      w[r * cols + c] = w_t[c * rows + r] = src[r * src_row + c * src_col];
    }
  check_one_way(values, indices, rows, cols, kept, w);
  check_one_way(values_t, indices_t, cols, rows, kept_t, w_t);
}

void test_transposable_pack() {
  for (int trial = 0; trial < 200; ++trial) {
    const int64_t rows = 4 * random_int(1, 20), cols = 4 * random_int(1, 40), gap = random_int(0, 1) * random_int(0, 9);
    switch_dtype(static_cast<DType>(random_int(0, kNumDTypes - 1)), [&](auto d) {
      check_transposable_pack<d>(rows, cols, cols + gap, 1);
      check_transposable_pack<d>(rows, cols, 1, rows + gap);
    });
  }
}

// ---- Epilogues ----

template <DType D>
void check_epilogue(int64_t tokens, int64_t rows, int64_t offset, bool in_place) {
  using Bits = BitsOf<D>;
  Buffer<Bits> x(tokens * rows, offset), y(tokens * rows, offset), bias(rows, offset);
  std::vector<float> scales(rows);
  for (int64_t i = 0; i < x.size(); ++i) x[i] = from_arithmetic<D>(static_cast<float>(random_int(-400, 400)) / 64);
  for (int64_t i = 0; i < rows; ++i) bias[i] = from_arithmetic<D>(static_cast<float>(random_int(-9, 9)) / 4);
  for (float& scale : scales) scale = static_cast<float>(random_int(1, 9)) / 8;
  const auto activation = static_cast<Activation>(random_int(0, 3));
  const bool scaled = random_int(0, 1), biased = random_int(0, 1);
  std::vector<float> want(x.size());
  for (int64_t i = 0; i < x.size(); ++i) {
    float v = to_arithmetic<D>(x[i]);
    if (scaled) v *= scales[i % rows];
    if (biased) v += to_arithmetic<D>(bias[i % rows]);
    const double d = v;
    want[i] = static_cast<float>(activation == Activation::kRelu   ? std::max(0.0, d)
                                 : activation == Activation::kGelu ? 0.5 * d * (1 + std::erf(d / std::sqrt(2.0)))
                                 : activation == Activation::kSilu ? d / (1 + std::exp(-d))
                                                                   : d);
  }
  Bits* to = in_place ? x.data() : y.data();
  with_epilogue<D>(x.data(), to, tokens, rows, scaled ? scales.data() : nullptr, biased ? bias.data() : nullptr,
                   activation, [](const auto& body) { run_map(body); });
  const float precision = D == DType::kFloat32 ? 1e-6f : D == DType::kFloat16 ? 6e-4f : 5e-3f;
  for (int64_t i = 0; i < x.size(); ++i)
    CHECK(std::fabs(to_arithmetic<D>(to[i]) - want[i]) <= precision * std::max(0.25f, std::fabs(want[i])));
}

void test_epilogues() {
  for (int trial = 0; trial < 400; ++trial) {
    const int64_t tokens = random_int(1, 9), rows = random_int(0, 1) ? 8 * random_int(1, 9) : random_int(1, 70);
    const int64_t offset = random_int(0, 1) * random_int(0, 9);
    const bool in_place = random_int(0, 1);
    check_epilogue<DType::kFloat32>(tokens, rows, offset, in_place);
    check_epilogue<DType::kBFloat16>(tokens, rows, offset, in_place);
    check_epilogue<DType::kFloat16>(tokens, rows, offset, in_place);
  }
}

}  // namespace

int main() {
  test_blobs();
  test_transposable_pack();
  test_epilogues();
  return 0;
}
