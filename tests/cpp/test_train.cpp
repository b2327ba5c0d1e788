// The kernels of a training step: SR-STE's sum on every instruction set, and masked copies of another dtype, against
// the formula, bit for bit.
//
// Rows end where their allocations end, so that the address sanitizer sees any read or write too far.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "core/convert.h"
#include "cpu/kernels/kernels.h"

namespace {

std::mt19937 rng(1);

float random_float() {
  const int kind = std::uniform_int_distribution<int>(0, 19)(rng);
  if (kind == 0) return -0.0f;
  if (kind == 1) return std::numeric_limits<float>::infinity();
  if (kind == 2) return std::numeric_limits<float>::quiet_NaN();
  return std::normal_distribution<float>()(rng);
}

std::vector<float> random_row(int64_t k) {
  std::vector<float> row(static_cast<size_t>(k));
  for (float& value : row) value = random_float();
  return row;
}

std::vector<uint8_t> random_bits(int64_t k) {
  std::vector<uint8_t> bits(static_cast<size_t>((k + 7) / 8));
  for (uint8_t& byte : bits) byte = static_cast<uint8_t>(rng());
  return bits;
}

bool bit_at(const std::vector<uint8_t>& bits, int64_t i) { return bits[i >> 3] >> (i & 7) & 1; }

void check_same(float got, float want) {
  if (want != want)
    CHECK(got != got);
  else
    CHECK_EQ(nms::bit_cast<uint32_t>(got), nms::bit_cast<uint32_t>(want));
}

void test_add_pruned(int64_t k, bool stream) {
  const std::vector<float> grad = random_row(k), w = random_row(k);
  const std::vector<uint8_t> bits = random_bits(k);
  const float factor = 0.3f;
  for (const char* isa : nms::cpu_isas()) {
    CHECK(nms::set_cpu_isa(isa));
    // Aligned to a vector, as writes past the cache want it; the allocation is longer than the row then.
    const size_t bytes = (static_cast<size_t>(k) * sizeof(float) + 63) / 64 * 64 + 64;
    float* out = static_cast<float*>(std::aligned_alloc(64, bytes));
    std::memset(out, 0xA5, bytes);
    nms::kernels().add_pruned({grad.data(), w.data(), out, bits.data(), k, factor, stream});
    std::vector<float> in_place = grad;
    nms::kernels().add_pruned({in_place.data(), w.data(), in_place.data(), bits.data(), k, factor, false});
    for (int64_t i = 0; i < k; ++i) {
      const volatile float term = factor * w[i];  // rounded before it is added
      const float want = bit_at(bits, i) ? grad[i] : grad[i] + term;
      check_same(out[i], want);
      check_same(in_place[i], want);
    }
    const uint8_t* behind = reinterpret_cast<const uint8_t*>(out + k);
    for (const uint8_t* p = behind; p < reinterpret_cast<const uint8_t*>(out) + bytes; ++p) CHECK_EQ(*p, 0xA5);
    std::free(out);
  }
}

void test_apply_bits_rounded(int64_t rows, int64_t k, int64_t step) {
  const std::vector<float> src = random_row(rows * k);
  const std::vector<uint8_t> bits = random_bits(8 * ((k + 7) / 8) * rows);
  std::vector<uint16_t> dst(static_cast<size_t>(rows * k * step), 0xA5A5);
  nms::ApplyPanel p;
  p.src = src.data();
  p.src_row = k;
  p.src_k = 1;
  p.dst = dst.data();
  p.dst_row = k * step;
  p.dst_k = step;
  p.bits = bits.data();
  p.bits_row = (k + 7) / 8;
  p.rows = rows;
  p.k = k;
  nms::apply_bits_rounded(nms::DType::kFloat32, nms::DType::kBFloat16, p);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < k; ++i) {
      const bool kept = bits[r * p.bits_row + (i >> 3)] >> (i & 7) & 1;
      CHECK_EQ(dst[(r * k + i) * step], kept ? nms::float_to_bfloat16(src[r * k + i]) : uint16_t{0});
      for (int64_t s = 1; s < step; ++s) CHECK_EQ(dst[(r * k + i) * step + s], 0xA5A5);
    }
  }
}

}  // namespace

int main() {
  for (int64_t k = 0; k < 150; ++k) {
    test_add_pruned(k, false);
    test_add_pruned(k, true);
  }
  for (int64_t k : {1, 7, 8, 33})
    for (int64_t step : {1, 3}) test_apply_bits_rounded(3, k, step);
  return 0;
}
