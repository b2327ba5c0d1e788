// The arithmetic of csrc/core against slower statements of the same rule.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "check.h"
#include "core/bits.h"
#include "core/dtype.h"
#include "core/packed.h"
#include "core/select.h"
#include "core/transposable.h"

namespace {

std::mt19937 rng(0);

int random_int(int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); }

// The rule as a sort: largest first, the lower index first among equals; the first n are kept.
uint64_t select_by_sorting(const std::vector<int>& keys, int n) {
  std::vector<int> order(keys.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return keys[a] > keys[b]; });
  uint64_t mask = 0;
  for (int i = 0; i < std::min<int>(n, order.size()); ++i) mask |= uint64_t{1} << order[i];
  return mask;
}

template <int M>
void test_select_fixed() {
  for (int n = 1; n <= M; ++n) {
    for (int trial = 0; trial < 200; ++trial) {
      int keys[M];
      for (int& key : keys) key = random_int(0, 3);  // many ties
      CHECK_EQ(nms::select_group<M>(keys, n), select_by_sorting({keys, keys + M}, n));
    }
  }
}

void test_select() {
  for (int m = 1; m <= nms::kMaxM; ++m) {
    for (int n = 1; n <= m; ++n) {
      std::vector<int> keys(random_int(1, m));  // a short group now and then
      for (int& key : keys) key = random_int(0, m / 2);
      CHECK_EQ(nms::select_group(keys.data(), static_cast<int>(keys.size()), n), select_by_sorting(keys, n));
    }
  }
  test_select_fixed<2>();
  test_select_fixed<4>();
  test_select_fixed<8>();
  test_select_fixed<16>();
}

void test_keys() {
  using nms::DType;
  using nms::magnitude_key;
  const auto f32 = [](float value) { return magnitude_key<DType::kFloat32>(std::bit_cast<uint32_t>(value)); };
  const float inf = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  CHECK_EQ(f32(-0.0f), f32(0.0f));
  CHECK_EQ(f32(-nan), f32(nan));
  CHECK_EQ(magnitude_key<DType::kFloat32>(0x7f800001u), magnitude_key<DType::kFloat32>(0xffffffffu));  // every NaN ties
  CHECK(f32(nan) > f32(-inf) && f32(-inf) > f32(std::numeric_limits<float>::max()));
  CHECK(f32(std::numeric_limits<float>::denorm_min()) > f32(0.0f));
  CHECK_EQ(f32(-2.5f), f32(2.5f));
  CHECK_EQ(magnitude_key<DType::kInt8>(0x80), 128);
  CHECK_EQ(magnitude_key<DType::kInt8>(0xff), 1);
  CHECK_EQ(magnitude_key<DType::kFloat8E4M3>(0xff), 0x7f);
  CHECK(magnitude_key<DType::kFloat8E4M3>(0xfe) < magnitude_key<DType::kFloat8E4M3>(0x7f));
}

void test_bit_stream() {
  for (int width = 1; width <= 64; ++width) {
    const int count = 37;
    std::vector<uint64_t> fields(count);
    for (uint64_t& field : fields) field = (uint64_t{rng()} << 32 | rng()) & nms::low_bits(width);
    std::vector<uint8_t> stream((count * width + 7) / 8);  // exact, so that the address sanitizer sees an overrun
    nms::BitWriter writer(stream.data());
    for (const uint64_t field : fields) writer.put(field, width);
    writer.finish();
    for (int i = 0; i < count; ++i) CHECK_EQ(nms::read_bits(stream.data(), int64_t{i} * width, width), fields[i]);
    const int used = count * width % 8;
    if (used != 0) CHECK_EQ(stream.back() >> used, 0);
  }
}

void test_hardware_nibbles() {
  const nms::PackedFormat format = nms::packed_format(2, 4);
  CHECK_EQ(format.group_bits, 4);
  const std::array<std::array<int, 2>, 6> table = {
      {{0x3, 0x4}, {0x5, 0x8}, {0x9, 0xC}, {0x6, 0x9}, {0xA, 0xD}, {0xC, 0xE}}};
  for (const auto& [mask, nibble] : table) CHECK_EQ(static_cast<int>(nms::encode_group(mask, format)), nibble);
}

void test_codes() {
  for (int m = 1; m <= nms::kMaxM; ++m) {
    for (int n = 1; n <= m; ++n) {
      const nms::PackedFormat format = nms::packed_format(n, m);
      std::vector<int> positions(m);
      std::iota(positions.begin(), positions.end(), 0);
      std::shuffle(positions.begin(), positions.end(), rng);
      std::sort(positions.begin(), positions.begin() + n);
      uint64_t mask = 0;
      for (int j = 0; j < n; ++j) mask |= uint64_t{1} << positions[j];

      const uint64_t code = nms::encode_group(mask, format);
      CHECK(format.group_bits == 64 || code >> format.group_bits == 0);
      CHECK(nms::is_legal_code(code, format));
      nms::GroupDecoder decoder(code, format);
      for (int j = 0; j < n; ++j) CHECK_EQ(decoder.next(), positions[j]);

      const int len = random_int(1, m);
      const uint64_t real = nms::select_group(positions.data(), len, n);  // at most len bits
      const uint64_t filled = nms::fill_short_group(real, len, n);
      CHECK_EQ(nms::popcount64(filled), n);
      CHECK_EQ(filled & nms::low_bits(len), real);
      CHECK(nms::is_legal_code(nms::encode_group(filled, format), format));
    }
  }
  const nms::PackedFormat two_of_four = nms::packed_format(2, 4);
  CHECK(!nms::is_legal_code(0x1, two_of_four));  // 1, 0: descending
  CHECK(!nms::is_legal_code(0x5, two_of_four));  // 1, 1: twice the same
  const nms::PackedFormat bitmask = nms::packed_format(3, 4);
  CHECK_EQ(bitmask.index_bits, 0);
  CHECK(!nms::is_legal_code(0x3, bitmask));
}

// All 90 masks of a 4x4 tile with two kept in every row and column.
std::vector<uint32_t> all_transposable_masks() {
  std::vector<uint32_t> masks;
  for (uint32_t mask = 0; mask < 1u << 16; ++mask) {
    bool fits = true;
    for (int i = 0; i < 4; ++i) {
      fits = fits && std::popcount(mask >> (4 * i) & 0xFu) == 2 && std::popcount(mask >> i & 0x1111u) == 2;
    }
    if (fits) masks.push_back(mask);
  }
  return masks;
}

double mask_score(const std::array<double, 16>& scores, uint32_t mask) {
  double row[4];
  for (int r = 0; r < 4; ++r) {
    double kept[2];
    int count = 0;
    for (int c = 0; c < 4; ++c) {
      if (mask >> (4 * r + c) & 1) kept[count++] = scores[4 * r + c];
    }
    row[r] = kept[0] + kept[1];
  }
  return (row[0] + row[1]) + (row[2] + row[3]);
}

void test_transposable() {
  const std::vector<uint32_t> masks = all_transposable_masks();
  CHECK_EQ(static_cast<int>(masks.size()), 90);
  std::normal_distribution<double> normal;
  for (int trial = 0; trial < 5000; ++trial) {
    std::array<double, 16> scores;
    for (double& score : scores) {
      switch (trial % 4) {
        case 0:
          score = nms::tile_score(normal(rng));
          break;
        case 1:
          score = nms::tile_score(random_int(0, 2));
          break;  // ties
        case 2:
          score = nms::tile_score(std::ldexp(normal(rng), random_int(-60, 60)));
          break;  // rounding
        default:
          score = nms::tile_score(random_int(0, 5) == 0 ? std::nan("") : random_int(0, 5) == 0 ? -HUGE_VAL : 1e300);
      }
    }
    double best = 0;
    for (const uint32_t mask : masks) best = std::max(best, mask_score(scores, mask));
    const uint32_t chosen = nms::select_transposable(scores.data());
    CHECK(std::find(masks.begin(), masks.end(), chosen) != masks.end());
    CHECK_EQ(mask_score(scores, chosen), best);
  }
}

}  // namespace

int main() {
  test_select();
  test_keys();
  test_bit_stream();
  test_hardware_nibbles();
  test_codes();
  test_transposable();
  std::puts("core: all checks passed");
}
