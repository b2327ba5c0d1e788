// The CUDA kernels' own index and bit arithmetic, run thread by thread on the CPU against naive loops: choosing what is
// kept, and the pieces that all kernels are made of. Whatever needs no GPU to go wrong goes wrong here, under the
// address and undefined-behaviour sanitizers: every buffer is exactly as large as the kernel may touch.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "check.h"
#include "core/dtype.h"
#include "core/select.h"
#include "core/dtype_switch.h"
#include "cuda/kernels/select.cuh"
#include "cuda_host.h"

namespace {

// ---- The rule, weight by weight ----

template <DType D>
uint64_t naive_group(Buffer<BitsOf<D>>& w, const Shape& shape, int64_t row, int64_t first, int len, int n) {
  std::vector<int64_t> keys;
  for (int i = 0; i < len; ++i) keys.push_back(magnitude_key<D>(w[shape.offset(row, first + i)]));
  return select_group(keys.data(), len, n);
}

template <DType D, int M>
void check_select(const Shape& shape, const Shape& out_shape, int n, int m, bool force_strided) {
  using Bits = BitsOf<D>;
  const int64_t offset = random_int(0, 3) ? 0 : random_int(1, 15);
  Buffer<Bits> src(shape.span(), offset), dst(out_shape.span(), offset);
  fill_random(src);
  const bool with_out = random_int(0, 4) != 0, with_bits = !with_out || random_int(0, 3) != 0;
  const bool in_place = with_out && shape.strides == out_shape.strides && random_int(0, 1);
  const int64_t bits_row = divide_up(shape.k(), 8);
  Buffer<uint8_t> bits(shape.rows() * bits_row, 1);
  std::memset(bits.data(), 0xEE, bits.size());

  // Expected.
  std::vector<uint8_t> want_bits(bits.size(), 0);
  Buffer<Bits> want(out_shape.span(), 0);
  for (int64_t i = 0; i < dst.size(); ++i) want[i] = dst[i] = static_cast<Bits>(0x77);
  if (in_place)
    for (int64_t i = 0; i < src.size(); ++i) want[i] = src[i];
  for (int64_t row = 0; row < shape.rows(); ++row) {
    for (int64_t first = 0; first < shape.k(); first += m) {
      const int len = static_cast<int>(std::min<int64_t>(m, shape.k() - first));
      const uint64_t mask = naive_group<D>(src, shape, row, first, len, n);
      for (int i = 0; i < len; ++i) {
        const bool kept = mask >> i & 1;
        want[out_shape.offset(row, first + i)] = kept ? src[shape.offset(row, first + i)] : Bits{0};
        want_bits[row * bits_row + (first + i) / 8] |= static_cast<uint8_t>(kept << (first + i) % 8);
      }
    }
  }

  // The kernels.
  const Layout layout =
      make_layout(shape.sizes, shape.strides, with_out ? &out_shape.strides : nullptr, shape.dim, std::lcm(m, 8));
  Bits* out = with_out ? in_place ? src.data() : dst.data() : nullptr;
  uint8_t* mask = with_bits ? bits.data() : nullptr;
  const int64_t layout_bits_row = divide_up(layout.k, 8);
  const int unit = SelectStaged<D, M>::unit_for(m);
  const auto tiles = force_strided ? std::nullopt : make_tiles<Bits>(layout, unit, src.data(), out);
  if (tiles) {
    run_staged(SelectStaged<D, M>{*tiles, src.data(), out, mask, layout_bits_row, n, m, unit});
  } else {
    run_map(SelectStrided<D>{make_spans(layout, std::lcm(m, 8)), src.data(), out, mask, layout_bits_row, n, m});
  }
  if (with_bits)
    for (int64_t i = 0; i < bits.size(); ++i) CHECK_EQ(bits[i], want_bits[i]);
  if (with_out)
    for (int64_t i = 0; i < want.size(); ++i) CHECK_EQ((in_place ? src : dst)[i], want[i]);
}

void test_select() {
  for (int trial = 0; trial < 6000; ++trial) {
    Shape shape = random_shape(trial % 20 == 0 ? 60000 : 3000);
    const Shape out_shape = another_layout(shape);
    if (random_int(0, 5) == 0) shape.strides[random_int(0, shape.strides.size() - 1)] = 0;  // an expanded tensor
    const DType dtype = static_cast<DType>(random_int(0, kNumDTypes - 1));
    for_random_pattern([&](int n, int m) {
      switch_dtype(dtype, [&](auto d) {
        switch_m(m, [&](auto fixed) { check_select<d, fixed>(shape, out_shape, n, m, random_int(0, 5) == 0); });
      });
    });
  }
}

// The layouts for which the tiles were made, with every tail.
void test_select_layouts() {
  const auto check = [](const Shape& shape, int n, int m) {
    switch_m(m, [&](auto fixed) {
      check_select<DType::kFloat32, fixed>(shape, shape, n, m, false);
      check_select<DType::kBFloat16, fixed>(shape, shape, n, m, false);
      check_select<DType::kFloat8E4M3, fixed>(shape, shape, n, m, false);
    });
  };
  for (const int m : {1, 2, 4, 5, 8, 12, 16, 32, 64}) {
    const int n = std::max(1, m / 2);
    for (int64_t k = 1; k <= 130; k += k < 70 ? 1 : 17) {
      check(Shape{{3, k}, {k, 1}, 1}, n, m);                  // rows
      check(Shape{{k, 70}, {70, 1}, 0}, n, m);                // columns
      check(Shape{{2, k, 3, 3}, {9 * k, 9, 3, 1}, 1}, n, m);  // OIHW along I
    }
    check(Shape{{1, 20000}, {20000, 1}, 1}, n, m);
    check(Shape{{300, 300}, {1, 300}, 1}, n, m);
    check(Shape{{2, 1100, 3, 3}, {9900, 9, 3, 1}, 1}, n, m);
    check(Shape{{4, 64, 7, 7}, {64 * 49, 49, 7, 1}, 1}, n, m);
    check(Shape{{2, 100, 3, 3}, {900, 1, 300, 100}, 1}, n, m);  // channels_last
  }
}

// ---- Pieces ----

void test_divisor() {
  for (int trial = 0; trial < 200000; ++trial) {
    const int64_t d = trial < 3000 ? trial + 1 : static_cast<int64_t>(rng() >> random_int(1, 62)) | 1;
    const int64_t n = static_cast<int64_t>(rng() >> random_int(1, 63));
    const Divisor divisor(d);
    for (const int64_t value : {n, n / d * d, std::max<int64_t>(0, n / d * d - 1), INT64_MAX, INT64_MAX / d * d})
      CHECK_EQ(divisor.quotient(value), value / d);
  }
}

void test_slots() {
  std::vector<bool> seen(kTileChunks);
  for (int i = 0; i < kTileChunks; ++i) {
    CHECK(slot(i) / 8 == i / 8 && !seen[slot(i)]);
    seen[slot(i)] = true;
  }
  // Eight threads that read chunk j of their groups at once hit eight different banks of 16 bytes.
  for (const int group_chunks : {1, 2, 4, 8}) {
    for (int j = 0; j < group_chunks; ++j) {
      int banks = 0;
      for (int thread = 0; thread < 8; ++thread) banks |= 1 << slot(thread * group_chunks + j) % 8;
      CHECK_EQ(banks, 0xFF);
    }
  }
}

template <DType D, int M>
void test_fixed() {
  for (int trial = 0; trial < 1500; ++trial) {
    RegisterKey<D> keys[M];
    for (auto& key : keys) {
      const auto bits = static_cast<BitsOf<D>>(rng() & (trial % 2 ? 3 : ~uint64_t{0}));
      key = magnitude_key<D, RegisterKey<D>>(bits);
      CHECK_EQ(key, static_cast<RegisterKey<D>>(magnitude_key<D>(bits)));
    }
    for (int n = 1; n <= M; ++n) CHECK_EQ(select_fixed<D>(keys, n), select_group(keys, M, n));
  }
}

template <class Bits>
void test_masked() {
  constexpr int kElements = kChunkElements<Bits>;
  for (uint32_t mask = 0; mask < 1u << kElements; ++mask) {
    Chunk chunk{};
    for (int i = 0; i < kElements; ++i) set_chunk_element(&chunk, i, static_cast<Bits>(~uint64_t{0} - i));
    const Chunk out = masked<Bits>(chunk, mask | 0xFFFFFFFFu << (kElements - 1) << 1);  // higher bits do not matter
    for (int i = 0; i < kElements; ++i) {
      const Bits want = mask >> i & 1 ? static_cast<Bits>(~uint64_t{0} - i) : Bits{0};
      CHECK_EQ(chunk_element<Bits>(&out, i), want);
    }
  }
}

}  // namespace

int main() {
  test_divisor();
  test_slots();
  const auto test_all_fixed = [](auto m) {
    test_fixed<DType::kFloat64, m>();
    test_fixed<DType::kFloat32, m>();
    test_fixed<DType::kBFloat16, m>();
    test_fixed<DType::kInt8, m>();
    test_fixed<DType::kFloat8E4M3, m>();
  };
  test_all_fixed(std::integral_constant<int, 2>{});
  test_all_fixed(std::integral_constant<int, 4>{});
  test_all_fixed(std::integral_constant<int, 8>{});
  test_all_fixed(std::integral_constant<int, 16>{});
  test_all_fixed(std::integral_constant<int, 32>{});
  test_masked<uint8_t>();
  test_masked<uint16_t>();
  test_masked<uint32_t>();
  test_masked<uint64_t>();
  test_select_layouts();
  test_select();
  std::puts("CUDA selection on the host: all checks passed");
}
