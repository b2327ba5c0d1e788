// The packed product in integers: every instruction set that this host has gives, to the bit, what core/quantize.h says
// of sums of whole numbers; for all types of x, patterns, ragged sizes and batches.
//
// Inputs end where their allocation ends, so that the address sanitizer sees any read too far.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "activated.h"
#include "check.h"
#include "core/bits.h"
#include "core/convert.h"
#include "core/packed.h"
#include "core/panel_layout.h"
#include "core/quantize.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/linear_int8.h"
#include "cpu/kernels/linear_pack.h"

namespace {

using nms::DType;

std::mt19937 rng(1);

int random_int(int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); }

struct Pattern {
  int n, m;
};
constexpr Pattern kPatterns[] = {{1, 2},  {2, 4},  {1, 4},  {1, 3}, {3, 4}, {1, 8}, {2, 8},  {4, 8},  {1, 16},
                                 {2, 16}, {4, 16}, {8, 16}, {1, 1}, {2, 3}, {5, 7}, {3, 10}, {7, 13}, {16, 16}};
constexpr DType kTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

// ---- A random packed int8 weight, dense and in panels ----

struct Weight {
  Weight(int n, int m, int64_t rows, int64_t k)
      : layout(nms::panel_layout(n, m, k, DType::kInt8)),
        dense(rows * k),
        panel_values(nms::panel_count(rows) * layout.panel_values()),
        panel_words(nms::panel_count(rows) * layout.panel_words()),
        scales(nms::panel_count(rows) * nms::kPanelRows),
        sums(scales.size()) {
    const nms::PackedFormat format = nms::packed_format(n, m);
    const int64_t groups = (k + m - 1) / m, index_bytes = nms::index_row_bytes(format, groups);
    std::vector<int8_t> values(rows * groups * n);
    std::vector<uint8_t> indices(rows * index_bytes);
    for (int64_t row = 0; row < rows; ++row) {
      nms::BitWriter writer(indices.data() + row * index_bytes);
      for (int64_t group = 0; group < groups; ++group) {
        const int length = static_cast<int>(std::min<int64_t>(m, k - group * m));
        uint64_t mask = 0;
        while (nms::popcount64(mask) < std::min(n, length)) mask |= uint64_t{1} << random_int(0, length - 1);
        mask = nms::fill_short_group(mask, length, n);
        writer.put(nms::encode_group(mask, format), format.group_bits);
        for (int j = 0; mask != 0; mask &= mask - 1, ++j) {
          const int place = nms::lowest_bit(mask);
          if (place >= length) continue;
          // The most that there can be, now and then: nothing may be clipped on the way.
          const int8_t value = static_cast<int8_t>(random_int(0, 3) == 0 ? -128 : random_int(-128, 127));
          values[(row * groups + group) * n + j] = value;
          dense[row * k + group * m + place] = value;
          sums[row] += value;
        }
      }
      writer.finish();
      scales[row] = static_cast<float>(random_int(1, 1000)) / 1024;
    }
    form = {panel_values.data(), panel_words.data(), 1, rows, k, layout};
    nms::pack_panels(form, values.data(), indices.data(), 0, nms::panel_count(rows));

    std::vector<int8_t> restored(values.size());
    std::vector<uint8_t> codes(indices.size());
    nms::restore_panels(form, restored.data(), codes.data(), 0, nms::panel_count(rows));
    CHECK(restored == values);
    CHECK(codes == indices);
    std::vector<int8_t> unpacked(dense.size());
    nms::unpack_panels(form, unpacked.data(), 0, nms::panel_count(rows));
    CHECK(unpacked == dense);
  }

  nms::PanelLayout layout;
  std::vector<int8_t> dense, panel_values;
  std::vector<uint32_t> panel_words;
  std::vector<float> scales;
  std::vector<int32_t> sums;
  nms::PanelForm form;
};

// ---- Numbers of any type of x ----

int size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

float get(DType dtype, const uint8_t* bytes, int64_t i) {
  uint16_t bits;
  if (dtype == DType::kFloat32) {
    float value;
    std::memcpy(&value, bytes + i * 4, 4);
    return value;
  }
  std::memcpy(&bits, bytes + i * 2, 2);
  return dtype == DType::kBFloat16 ? nms::to_arithmetic<DType::kBFloat16>(bits)
                                   : nms::to_arithmetic<DType::kFloat16>(bits);
}

void set(DType dtype, uint8_t* bytes, int64_t i, float value) {
  if (dtype == DType::kFloat32) {
    std::memcpy(bytes + i * 4, &value, 4);
    return;
  }
  const uint16_t bits = dtype == DType::kBFloat16 ? nms::float_to_bfloat16(value) : nms::float_to_float16(value);
  std::memcpy(bytes + i * 2, &bits, 2);
}

using Bytes = std::unique_ptr<uint8_t[]>;

const char* kernels_name = "";
nms::Int8Table table;  // under test

// The whole product, as linear_int8_cpu.cpp does it, with one thread.
void multiply(DType dtype, const Weight& w, int64_t rows, int64_t k, const uint8_t* x, int64_t x_row, int64_t x_k,
              int64_t batch, const uint8_t* bias, nms::Activation activation, uint8_t* y) {
  const nms::Int8Kernels& kernels = table.of[static_cast<int>(dtype)];
  nms::LinearProblem problem;
  problem.kernels = &kernels.linear;
  problem.layout = w.layout;
  problem.values = w.panel_values.data();
  problem.indices = w.panel_words.data();
  problem.rows = rows;
  problem.panels = nms::panel_count(rows);
  problem.batch = batch;
  problem.k = k;
  problem.x = x;
  problem.x_row = x_row;
  problem.x_k = x_k;
  problem.bias = bias;
  problem.y = y;
  problem.element_size = size_of(dtype);
  problem.activation = activation;
  problem.int8.weight_scales = w.scales.data();
  problem.int8.weight_sums = w.sums.data();
  nms::choose_blocks(problem, 1);

  const int64_t row_bytes = nms::packed_row_bytes(problem);
  const nms::BatchTiles tiles(batch, kernels.linear.max_tile_rows(w.layout));
  const int64_t last = tiles.count() - 1;
  Bytes packed(new uint8_t[(tiles.first_row(last) + tiles.tile_rows(last)) * row_bytes]);
  std::unique_ptr<float[]> x_scales(new float[batch]);
  for (int64_t tile = 0; tile < tiles.count(); ++tile) {
    for (int row = 0; row < tiles.tile_rows(tile); ++row) {
      const bool fills = row >= tiles.rows(tile);
      const int64_t at = tiles.first_row(tile) + row;
      nms::QuantizeRow q;
      q.x = fills ? nullptr : x + at * x_row * size_of(dtype);
      q.x_k = x_k;
      q.k = fills ? 0 : k;
      q.row = row;
      q.tile_rows = tiles.tile_rows(tile);
      q.packed = packed.get() + tiles.first_row(tile) * row_bytes;
      q.scale = fills ? nullptr : x_scales.get() + at;
      q.layout = &w.layout;
      kernels.quantize(q);
    }
  }
  problem.packed_x = packed.get();
  problem.int8.x_scales = x_scales.get();
  Bytes memory(new uint8_t[nms::block_memory(problem)]);
  nms::multiply_blocks(problem, 0, nms::block_count(problem), memory.get());
}

void check_product(DType dtype, Pattern p, int64_t rows, int64_t k, int64_t batch, bool transposed,
                   nms::Activation activation) {
  const Weight w(p.n, p.m, rows, k);
  const int size = size_of(dtype);
  Bytes x(new uint8_t[batch * k * size]), bias(new uint8_t[rows * size]), y(new uint8_t[batch * rows * size]);
  for (int64_t i = 0; i < batch * k; ++i)
    set(dtype, x.get(), i, std::ldexp(static_cast<float>(random_int(-999, 999)), random_int(-12, -8)));
  for (int64_t i = 0; i < rows; ++i) set(dtype, bias.get(), i, static_cast<float>(random_int(-64, 64)) / 16);
  const int64_t x_row = transposed ? 1 : k, x_k = transposed ? batch : 1;
  // One row that cannot be rounded, and one of zeros.
  if (batch > 2) {
    set(dtype, x.get(), x_row + k / 2 * x_k, std::numeric_limits<float>::infinity());
    for (int64_t i = 0; i < k; ++i) set(dtype, x.get(), 2 * x_row + i * x_k, 0);
  }
  multiply(dtype, w, rows, k, x.get(), x_row, x_k, batch, bias.get(), activation, y.get());
  for (int64_t b = 0; b < batch; ++b) {
    float amax = 0;
    for (int64_t i = 0; i < k; ++i) amax = std::max(amax, std::fabs(get(dtype, x.get(), b * x_row + i * x_k)));
    const nms::Int8Scale scale = nms::int8_scale(amax);
    std::vector<int> integers(k);
    if (scale.inverse != 0)
      for (int64_t i = 0; i < k; ++i)
        integers[i] = nms::quantize(get(dtype, x.get(), b * x_row + i * x_k), scale.inverse);
    for (int64_t r = 0; r < rows; ++r) {
      int32_t sum = 0;
      for (int64_t i = 0; i < k; ++i) sum += integers[i] * w.dense[r * k + i];
      volatile float scaled = nms::dequantize(sum, scale.scale, w.scales[r]);  // rounded before the bias comes
      const float before = scaled + get(dtype, bias.get(), r);
      uint8_t wanted[4];
      set(dtype, wanted, 0, static_cast<float>(activated(activation, before)));
      const float want = get(dtype, wanted, 0), got = get(dtype, y.get(), b * rows + r);
      if (std::isnan(want) && std::isnan(got)) continue;
      const bool exact = activation == nms::Activation::kNone || activation == nms::Activation::kRelu;
      const float tolerance = exact ? 0 : (size == 2 ? 0x1p-7f : 2e-6f) * (std::fabs(before) + 0.1f);
      if (!(std::fabs(got - want) <= tolerance)) {
        std::fprintf(stderr, "%s: %d:%d rows %d of %d, batch %d, at %d, %d: got %.9g, want %.9g\n", kernels_name, p.n,
                     p.m, static_cast<int>(rows), static_cast<int>(k), static_cast<int>(batch), static_cast<int>(b),
                     static_cast<int>(r), got, want);
        std::exit(1);
      }
    }
  }
}

void test_rule() {
  CHECK_EQ(nms::int8_scale(127.0f).scale, 1.0f);
  CHECK_EQ(nms::int8_scale(0.0f).scale, 0.0f);
  CHECK_EQ(nms::int8_scale(0x1p-101f).inverse, 0.0f);
  CHECK(nms::int8_scale(0x1p-100f).inverse > 0);
  CHECK(nms::int8_scale(std::numeric_limits<float>::max()).inverse > 0);
  CHECK(std::isnan(nms::int8_scale(std::numeric_limits<float>::infinity()).scale));
  CHECK(std::isnan(nms::int8_scale(std::numeric_limits<float>::quiet_NaN()).scale));
  CHECK_EQ(nms::quantize(2.5f, 1.0f), 2);
  CHECK_EQ(nms::quantize(-3.5f, 1.0f), -4);
  for (int i = 0; i < 10000; ++i) {  // the largest number is always 127, never more
    const float amax = std::ldexp(1.0f + static_cast<float>(random_int(0, (1 << 23) - 1)) * 0x1p-23f, i % 220 - 99);
    CHECK_EQ(nms::quantize(amax, nms::int8_scale(amax).inverse), 127);
  }
}

void test_kernels(const char* name, const nms::Int8Table& kernels) {
  kernels_name = name;
  table = kernels;
  for (const Pattern p : kPatterns) {
    for (const DType dtype : kTypes) {
      for (const int batch : {1, 2, 4, 7, 8, 15, 16, 17, 33})
        check_product(dtype, p, random_int(1, 40), random_int(1, 150), batch, batch % 3 == 0, nms::Activation::kNone);
      check_product(dtype, p, 32, 128, 5, false, nms::Activation::kRelu);
    }
  }
  // Several blocks of panels, of steps and of tiles.
  for (const Pattern p : {Pattern{2, 4}, Pattern{1, 16}, Pattern{3, 4}, Pattern{5, 7}})
    for (const int batch : {3, 40}) check_product(DType::kFloat32, p, 150, 2500, batch, false, nms::Activation::kNone);
  for (const DType dtype : kTypes)
    for (const auto activation : {nms::Activation::kGelu, nms::Activation::kSilu})
      check_product(dtype, {2, 4}, 37, 70, 5, false, activation);
  std::printf("%s: ok\n", name);
}

}  // namespace

int main() {
  test_rule();
  for (const char* isa : nms::cpu_isas()) {
    CHECK(nms::set_cpu_isa(isa));
    test_kernels(isa, nms::kernels().int8);
  }
  return 0;
}
