// The CUDA kernels for packed weights and packed masks, run thread by thread on the CPU against naive loops. See
// test_cuda_host.cpp.
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "check.h"
#include "core/bits.h"
#include "core/convert.h"
#include "core/dtype.h"
#include "core/packed.h"
#include "core/select.h"
#include "core/transposable.h"
#include "core/dtype_switch.h"
#include "cuda/kernels/bits.cuh"
#include "cuda/kernels/compress.cuh"
#include "cuda/kernels/decompress.cuh"
#include "cuda/kernels/reduce.cuh"
#include "cuda/kernels/transposable.cuh"
#include "cuda_host.h"

namespace {

template <class Body>
uint64_t run_minimum(const Body& body) {
  uint64_t least = kNone;
  for (int64_t i = 0; i < body.count(); ++i) least = std::min(least, body(i));
  return least;
}

template <class Bits>
void fill(Buffer<Bits>& buffer, uint8_t byte) {
  std::memset(static_cast<void*>(buffer.data()), byte, buffer.size() * sizeof(Bits));
}

// ---- compress, decompress, checks of indices ----

template <DType D, int M>
void check_packed(const Shape& shape, int n, int m, bool force_strided) {
  using Bits = BitsOf<D>;
  const PackedFormat format = packed_format(n, m);
  const int64_t groups = divide_up(shape.k(), m), rows = shape.rows();
  const int64_t values_row = groups * n, index_row = index_row_bytes(format, groups);
  Buffer<Bits> src(shape.span(), random_int(0, 3) ? 0 : random_int(1, 15));
  fill_random(src);

  // Expected, from the definition.
  std::vector<Bits> want_values;
  std::vector<uint8_t> want_indices(rows * index_row, 0);
  for (int64_t row = 0; row < rows; ++row) {
    BitWriter writer(want_indices.data() + row * index_row);
    for (int64_t group = 0; group < groups; ++group) {
      const int len = static_cast<int>(std::min<int64_t>(m, shape.k() - group * m));
      std::vector<int64_t> keys;
      for (int i = 0; i < len; ++i) keys.push_back(magnitude_key<D>(src[shape.offset(row, group * m + i)]));
      const uint64_t mask = fill_short_group(select_group(keys.data(), len, n), len, n);
      writer.put(encode_group(mask, format), format.group_bits);
      for (int i = 0; i < m; ++i)
        if (mask >> i & 1) want_values.push_back(i < len ? src[shape.offset(row, group * m + i)] : Bits{0});
    }
    writer.finish();
  }

  Buffer<Bits> values(rows * values_row, 0);
  Buffer<uint8_t> indices(rows * index_row, 1);
  fill(values, 0xEE);
  fill(indices, 0xEE);
  const bool whole_bytes = groups * format.group_bits % 8 == 0;
  const Layout layout = make_layout(shape.sizes, shape.strides, nullptr, shape.dim, whole_bytes ? m : shape.k() + 1);
  const int unit = CompressStaged<D, M>::unit_for(format);
  const auto tiles = force_strided ? std::nullopt : make_tiles<Bits>(layout, unit, src.data(), nullptr);
  if (tiles) {
    const auto out = packed_out(values.data(), indices.data(), format, layout.k, unit);
    run_staged(CompressStaged<D, M>{*tiles, src.data(), out, format, unit});
  } else {
    const int span = whole_byte_groups(format) * m;
    const auto out = packed_out(values.data(), indices.data(), format, layout.k, span);
    run_map(CompressStrided<D>{make_spans(layout, span), src.data(), out, format});
  }
  for (int64_t i = 0; i < values.size(); ++i) CHECK_EQ(values[i], want_values[i]);
  for (int64_t i = 0; i < indices.size(); ++i) CHECK_EQ(indices[i], want_indices[i]);
  CHECK_EQ(run_minimum(FindBadIndices{indices.data(), rows, Divisor(groups), format}), kNone);

  // Now and then codes that no encoder writes.
  const bool damaged = random_int(0, 2) == 0;
  if (damaged) fill_random(indices);
  std::vector<Bits> want_dense(rows * shape.k(), 0);
  uint64_t want_bad = kNone;
  for (int64_t row = rows - 1; row >= 0; --row) {
    const uint8_t* codes = indices.data() + row * index_row;
    const int64_t used = groups * format.group_bits;
    if (used % 8 != 0 && codes[used / 8] >> used % 8 != 0) want_bad = row * groups + groups - 1;
    for (int64_t group = groups - 1; group >= 0; --group) {
      const uint64_t code = read_bits(codes, group * format.group_bits, format.group_bits);
      if (!is_legal_code(code, format)) want_bad = row * groups + group;
      GroupDecoder decoder(code, format);
      for (int j = 0; j < n; ++j) {
        const int position = decoder.next();
        if (position >= 0 && group * m + position < shape.k())
          want_dense[row * shape.k() + group * m + position] = values[row * values_row + group * n + j];
      }
    }
  }
  CHECK_EQ(run_minimum(FindBadIndices{indices.data(), rows, Divisor(groups), format}), want_bad);

  Shape dense_shape = shape;  // contiguous
  std::vector<int> order(shape.sizes.size());
  std::iota(order.begin(), order.end(), 0);
  dense_shape.strides = strides_in_order(shape.sizes, order, 0);
  Buffer<Bits> dense(dense_shape.span(), 0);
  fill(dense, 0xEE);
  const Layout dense_layout =
      make_layout(dense_shape.sizes, dense_shape.strides, nullptr, shape.dim, whole_bytes ? m : shape.k() + 1);
  run_map(make_decompress<Bits>(dense_layout, values.data(), indices.data(), dense.data(), format));
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < shape.k(); ++i)
      CHECK_EQ(dense[dense_shape.offset(row, i)], want_dense[row * shape.k() + i]);
}

void test_packed() {
  for (int trial = 0; trial < 5000; ++trial) {
    const Shape shape = random_shape(trial % 20 == 0 ? 60000 : 3000);
    const DType dtype = static_cast<DType>(random_int(0, kNumDTypes - 1));
    for_random_pattern([&](int n, int m) {
      switch_dtype(dtype, [&](auto d) {
        switch_m(m, [&](auto fixed) { check_packed<d, fixed>(shape, n, m, random_int(0, 5) == 0); });
      });
    });
  }
}

void test_every_pattern() {
  for (int m = 1; m <= kMaxM; ++m) {
    for (int n = 1; n <= m; ++n) {
      switch_m(m, [&](auto fixed) {
        const int64_t k = random_int(1, 5 * m);
        check_packed<DType::kFloat16, fixed>(Shape{{3, k}, {k, 1}, 1}, n, m, false);
        check_packed<DType::kInt8, fixed>(Shape{{2, k, 9}, {9 * k, 9, 1}, 1}, n, m, false);
      });
    }
  }
}

// ---- Questions ----

template <DType D>
void check_violation(const Shape& shape, int n, int m) {
  using Bits = BitsOf<D>;
  Buffer<Bits> w(shape.span(), random_int(0, 7));
  const Bits negative_zero = D == DType::kInt8 ? Bits{0} : static_cast<Bits>(Bits{1} << (8 * sizeof(Bits) - 1));
  for (int64_t i = 0; i < w.size(); ++i)  // mostly zeros
    w[i] = random_int(0, 3) == 0 ? static_cast<Bits>(rng()) : random_int(0, 1) ? negative_zero : Bits{0};
  const int64_t groups = divide_up(shape.k(), m);
  int64_t want[2] = {-1, 0};
  for (int64_t group = shape.rows() * groups - 1; group >= 0; --group) {
    int nonzeros = 0;
    for (int64_t i = group % groups * m; i < std::min(shape.k(), (group % groups + 1) * m); ++i)
      nonzeros += magnitude_key<D>(w[shape.offset(group / groups, i)]) != 0;
    if (nonzeros > n) want[0] = group, want[1] = nonzeros;
  }
  const Layout layout = make_layout(shape.sizes, shape.strides, nullptr, shape.dim, m);
  int64_t got[2];
  split_violation(run_minimum(FindViolation<D>{make_spans(layout, m), w.data(), n}), got);
  CHECK_EQ(got[0], want[0]);
  CHECK_EQ(got[1], want[1]);
}

void test_violations() {
  for (int trial = 0; trial < 2000; ++trial) {
    const Shape shape = random_shape(500);
    const DType dtype = static_cast<DType>(random_int(0, kNumDTypes - 1));
    for_random_pattern([&](int n, int m) { switch_dtype(dtype, [&](auto d) { check_violation<d>(shape, n, m); }); });
  }
}

void test_differing() {
  for (int64_t bytes = 0; bytes < 200; ++bytes) {
    const int64_t offset = random_int(0, 1) * random_int(0, 15);
    Buffer<uint8_t> x(bytes, offset), y(bytes, offset);
    fill_random(x);
    fill_random(y);
    uint64_t want = 0, got = 0;
    for (int64_t i = 0; i < bytes; ++i) want += popcount64(static_cast<uint8_t>(x[i] ^ y[i]));
    const bool aligned = is_aligned(x.data(), kChunkBytes) && is_aligned(y.data(), kChunkBytes);
    const CountDiffering body{x.data(), y.data(), bytes, aligned};
    for (int64_t i = 0; i < body.count(); ++i) got += body(i);
    CHECK_EQ(got, want);
  }
}

// ---- Packed masks ----

void check_bits(const Shape& shape) {
  const int64_t bits_row = divide_up(shape.k(), 8);
  Buffer<uint8_t> mask(shape.span(), random_int(0, 2) ? 0 : random_int(1, 15));
  for (int64_t i = 0; i < mask.size(); ++i) mask[i] = random_int(0, 1) ? 0 : random_int(0, 3) ? 1 : 0x80;
  std::vector<uint8_t> want(shape.rows() * bits_row, 0);
  for (int64_t row = 0; row < shape.rows(); ++row)
    for (int64_t i = 0; i < shape.k(); ++i)
      want[row * bits_row + i / 8] |= static_cast<uint8_t>((mask[shape.offset(row, i)] != 0) << i % 8);

  const Layout layout = make_layout(shape.sizes, shape.strides, nullptr, shape.dim, 8);
  const int64_t layout_bits_row = divide_up(layout.k, 8);
  const bool aligned = whole_bytes_aligned(layout, mask.data(), 1, nullptr, 0);
  Buffer<uint8_t> bits(static_cast<int64_t>(want.size()), 1);
  run_map(PackBits{make_spans(layout, 8), mask.data(), bits.data(), layout_bits_row, aligned});
  for (int64_t i = 0; i < bits.size(); ++i) CHECK_EQ(bits[i], want[i]);

  for (int64_t i = 0; i < mask.size(); ++i) mask[i] = 0x77;
  run_map(UnpackBits{make_spans(layout, 8), bits.data(), layout_bits_row, mask.data(), aligned});
  for (int64_t row = 0; row < shape.rows(); ++row)
    for (int64_t i = 0; i < shape.k(); ++i)
      CHECK_EQ(mask[shape.offset(row, i)], want[row * bits_row + i / 8] >> i % 8 & 1);
}

template <class Bits>
void check_apply(const Shape& shape, const Shape& out_shape) {
  const int64_t bits_row = divide_up(shape.k(), 8);
  const int64_t offset = random_int(0, 3) ? 0 : random_int(1, 15);
  Buffer<Bits> src(shape.span(), offset), dst(out_shape.span(), offset);
  Buffer<uint8_t> bits(shape.rows() * bits_row, 1);
  fill_random(src);
  fill_random(bits);
  fill(dst, 0x77);
  const Layout layout = make_layout(shape.sizes, shape.strides, &out_shape.strides, shape.dim, 8);
  const int64_t layout_bits_row = divide_up(layout.k, 8);
  const auto tiles =
      random_int(0, 4) ? make_tiles<Bits>(layout, ApplyStaged<Bits>::kUnit, src.data(), dst.data()) : std::nullopt;
  if (tiles)
    run_staged(ApplyStaged<Bits>{*tiles, src.data(), dst.data(), bits.data(), layout_bits_row});
  else
    run_map(ApplyStrided<Bits>{make_spans(layout, 8), src.data(), dst.data(), bits.data(), layout_bits_row});
  for (int64_t row = 0; row < shape.rows(); ++row) {
    for (int64_t i = 0; i < shape.k(); ++i) {
      const bool kept = bits[row * bits_row + i / 8] >> i % 8 & 1;
      CHECK_EQ(dst[out_shape.offset(row, i)], kept ? src[shape.offset(row, i)] : Bits{0});
    }
  }
}

template <DType G, DType W>
void check_add_pruned(const Shape& grad_shape, const Shape& w_shape) {
  using Sum = typename Arithmetic<G>::Type;
  const int64_t bits_row = divide_up(w_shape.k(), 8);
  Buffer<BitsOf<G>> grad(grad_shape.span(), random_int(0, 3) ? 0 : random_int(1, 7));
  Buffer<BitsOf<W>> w(w_shape.span(), random_int(0, 3) ? 0 : random_int(1, 7));
  Buffer<uint8_t> bits(w_shape.rows() * bits_row, 1);
  // Finite: small exponents only, so that equal bits mean equal numbers.
  const auto finite = [](auto& buffer, auto dtype) {
    for (int64_t i = 0; i < buffer.size(); ++i) {
      if constexpr (dtype == DType::kFloat64)
        buffer[i] = std::bit_cast<uint64_t>(std::ldexp(static_cast<double>(random_int(-999, 999)), -7));
      else
        buffer[i] = from_arithmetic<dtype>(std::ldexp(static_cast<float>(random_int(-999, 999)), -7));
    }
  };
  finite(grad, DTypeConstant<G>{});
  finite(w, DTypeConstant<W>{});
  fill_random(bits);
  const double alpha = 0.1;
  const float scale = 3.0f;
  const bool scaled = random_int(0, 1);
  const Sum factor = static_cast<Sum>(scaled ? alpha * static_cast<double>(scale) : alpha);
  std::vector<BitsOf<G>> want;
  for (int64_t row = 0; row < w_shape.rows(); ++row) {
    for (int64_t i = 0; i < w_shape.k(); ++i) {
      const BitsOf<G> sum = grad[grad_shape.offset(row, i)];
      const Sum term = factor * static_cast<Sum>(to_arithmetic<W>(w[w_shape.offset(row, i)]));
      const bool kept = bits[row * bits_row + i / 8] >> i % 8 & 1;
      want.push_back(kept ? sum : from_arithmetic<G>(to_arithmetic<G>(sum) + term));
    }
  }
  const Layout layout = make_layout(grad_shape.sizes, grad_shape.strides, &w_shape.strides, grad_shape.dim, 8);
  const bool aligned = whole_bytes_aligned(layout, grad.data(), sizeof(BitsOf<G>), w.data(), sizeof(BitsOf<W>));
  run_map(AddPruned<G, W>{make_spans(layout, 8), grad.data(), w.data(), bits.data(), divide_up(layout.k, 8), alpha,
                          scaled ? &scale : nullptr, aligned});
  for (int64_t row = 0; row < w_shape.rows(); ++row)
    for (int64_t i = 0; i < w_shape.k(); ++i) CHECK_EQ(grad[grad_shape.offset(row, i)], want[row * w_shape.k() + i]);
}

void test_bits() {
  for (int value = 0; value < 256; ++value) {
    const uint64_t bytes = unpack_bytes(static_cast<uint8_t>(value));
    for (int i = 0; i < 8; ++i) CHECK_EQ(bytes >> (8 * i) & 0xFF, static_cast<uint64_t>(value >> i & 1));
    for (const uint64_t truth : {0x01ull, 0x80ull, 0xFFull, 0x10ull})
      CHECK_EQ(pack_bytes(bytes * truth), value);  // no byte of 0 or 1 times it overflows into the next
  }
  for (int trial = 0; trial < 3000; ++trial) {
    const Shape shape = random_shape(trial % 20 == 0 ? 60000 : 2000);
    const Shape other = another_layout(shape);
    check_bits(shape);
    switch (random_int(0, 3)) {
      case 0:
        check_apply<uint8_t>(shape, other);
        break;
      case 1:
        check_apply<uint16_t>(shape, other);
        break;
      case 2:
        check_apply<uint32_t>(shape, other);
        break;
      default:
        check_apply<uint64_t>(shape, other);
        break;
    }
    switch_gradient_dtype(static_cast<DType>(random_int(0, 3)), [&](auto g) {
      switch_gradient_dtype(static_cast<DType>(random_int(0, 3)),
                            [&](auto w) { check_add_pruned<g, w>(other, shape); });
    });
  }
}

// ---- Transposable masks ----

template <DType D>
void check_transposable(int64_t rows, int64_t cols, int64_t src_row, int64_t src_col) {
  using Bits = BitsOf<D>;
  Buffer<Bits> src((rows - 1) * src_row + (cols - 1) * src_col + 1, random_int(0, 2) ? 0 : random_int(1, 15));
  fill_random(src);
  Buffer<uint8_t> bits(rows * divide_up(cols, 8), 1);
  std::vector<uint8_t> want(bits.size(), 0);
  for (int64_t row = 0; row < rows; row += 4) {
    for (int64_t col = 0; col < cols; col += 4) {
      double scores[16];
      for (int i = 0; i < 16; ++i)
        scores[i] = tile_score(to_arithmetic<D>(src[(row + i / 4) * src_row + (col + i % 4) * src_col]));
      const uint32_t mask = select_transposable(scores);
      for (int i = 0; i < 4; ++i)
        want[(row + i) * divide_up(cols, 8) + col / 8] |= static_cast<uint8_t>((mask >> (4 * i) & 0xF) << col % 8);
    }
  }
  run_map(make_select_transposable<D>(src.data(), src_row, src_col, rows, cols, bits.data()));
  for (int64_t i = 0; i < bits.size(); ++i) CHECK_EQ(bits[i], want[i]);
}

void test_transposable() {
  for (int trial = 0; trial < 1500; ++trial) {
    const int64_t rows = 4 * random_int(1, 6), cols = 4 * random_int(1, 6), gap = random_int(0, 1) * random_int(0, 9);
    switch_dtype(static_cast<DType>(random_int(0, kNumDTypes - 1)), [&](auto d) {
      check_transposable<d>(rows, cols, cols + gap, 1);
      check_transposable<d>(rows, cols, 1, rows + gap);
      check_transposable<d>(rows, cols, 2 * cols, 2);
    });
  }
}

}  // namespace

int main() {
  test_bits();
  test_differing();
  test_violations();
  test_every_pattern();
  test_packed();
  test_transposable();
  std::puts("CUDA kernels for packed weights on the host: all checks passed");
}
