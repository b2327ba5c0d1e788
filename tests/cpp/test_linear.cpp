// The packed product: every instruction set that this host has against sums in double, for all element types that are
// computed with, patterns, ragged sizes and batches; and the panel form there and back.
//
// Inputs end where their allocation ends, so that the address sanitizer sees any read too far.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "core/bits.h"
#include "core/convert.h"
#include "core/packed.h"
#include "core/panel_layout.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/linear.h"
#include "cpu/kernels/linear_pack.h"

namespace {

using nms::DType;
using nms::PanelLayout;

std::mt19937 rng(1);

int random_int(int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); }

// ---- Numbers of any element type ----

int size_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

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
double random_number() { return random_int(-8, 8) / 4.0; }

// ---- A random packed weight in all its forms ----

struct Weight {
  Weight(DType dtype, int n, int m, int64_t rows, int64_t k)
      : layout(nms::panel_layout(n, m, k, dtype == DType::kBFloat16)),
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
constexpr Pattern kPatterns[] = {{1, 2},  {2, 4},  {1, 4}, {3, 4}, {1, 8}, {2, 8},  {4, 8},  {1, 16}, {2, 16},
                                 {4, 16}, {8, 16}, {1, 1}, {2, 3}, {5, 7}, {3, 10}, {7, 13}, {16, 16}};
constexpr DType kTypes[] = {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16};

// ---- Tests ----

void test_layout() {
  for (const Pattern p : kPatterns) {
    for (const bool paired : {false, true}) {
      for (int64_t k : {0, 1, 15, 16, 17, 100, 4096}) {
        const PanelLayout layout = nms::panel_layout(p.n, p.m, k, paired);
        CHECK(layout.window <= nms::kWindowInputs && layout.window % p.m == 0);
        CHECK(layout.steps * layout.step_inputs() >= k);
        CHECK(layout.steps % layout.unroll == 0);
        CHECK(layout.words * layout.fields >= layout.steps * layout.slots);
        for (int slot = 0; slot < layout.slots; ++slot) {
          for (int place = layout.group_start(slot); place < layout.group_start(slot) + p.m; ++place) {
            const uint32_t field = layout.field_of(place, slot);
            CHECK(field < 1u << layout.index_bits);
            CHECK_EQ(layout.place_of(field, slot), place);
          }
        }
      }
    }
  }
}

void test_unpack() {
  for (const Pattern p : kPatterns) {
    for (const DType dtype : kTypes) {
      for (const auto& [rows, k] : {std::pair<int, int>{1, 1}, {16, 64}, {5, 33}, {40, 31}, {17, 96}}) {
        Weight w(dtype, p.n, p.m, rows, k);
        Array dense(dtype, rows * k);
        nms::unpack_panels(w.form(dtype, rows, k), dense.data(), 0, nms::panel_count(rows));
        CHECK(std::memcmp(dense.data(), w.dense.data(), rows * k * size_of(dtype)) == 0);
      }
    }
  }
}

void test_restore() {
  for (const Pattern p : kPatterns) {
    for (const DType dtype : kTypes) {
      for (const auto& [rows, k] : {std::pair<int, int>{1, 1}, {16, 64}, {5, 33}, {40, 31}, {17, 96}}) {
        Weight w(dtype, p.n, p.m, rows, k);
        const int64_t kept = rows * w.groups * p.n;
        Array values(dtype, kept);
        std::vector<uint8_t> indices(static_cast<size_t>(rows * w.index_bytes));
        nms::restore_panels(w.form(dtype, rows, k), values.data(), indices.data(), 0, nms::panel_count(rows));
        CHECK(std::memcmp(values.data(), w.values.data(), kept * size_of(dtype)) == 0);
        CHECK(std::memcmp(indices.data(), w.indices.get(), indices.size()) == 0);
      }
    }
  }
}

const char* kernels_name = "";
nms::LinearTable table;  // under test

// The whole product, as linear_cpu.cpp does it, with one thread.
void multiply(DType dtype, Weight& w, int64_t rows, int64_t k, const Array& x, int64_t x_row, int64_t x_k,
              int64_t batch, const Array* bias, nms::Activation activation, Array& y) {
  nms::LinearProblem problem;
  problem.kernels = &table.of[static_cast<int>(dtype)];
  problem.layout = w.layout;
  problem.values = w.panel_values.data();
  problem.indices = w.panel_words.data();
  problem.rows = rows;
  problem.panels = nms::panel_count(rows);
  problem.batch = batch;
  problem.bias = bias ? bias->data() : nullptr;
  problem.y = y.data();
  problem.element_size = size_of(dtype);
  problem.activation = activation;
  nms::choose_blocks(problem, 1);

  const int64_t row_bytes = nms::packed_row_bytes(*problem.kernels, w.layout);
  const nms::BatchTiles tiles(batch, problem.kernels->max_tile_rows(w.layout));
  const int64_t last = tiles.count() - 1;
  std::unique_ptr<uint8_t[]> packed(new uint8_t[(tiles.first_row(last) + tiles.tile_rows(last)) * row_bytes]);
  for (int64_t tile = 0; tile < tiles.count(); ++tile) {
    nms::PackInput p;
    p.x = static_cast<const uint8_t*>(x.data()) + tiles.first_row(tile) * x_row * size_of(dtype);
    p.x_row = x_row;
    p.x_k = x_k;
    p.rows = tiles.rows(tile);
    p.k = k;
    p.tile_rows = tiles.tile_rows(tile);
    p.first_step = 0;
    p.last_step = w.layout.steps;
    p.packed = packed.get() + tiles.first_row(tile) * row_bytes;
    p.layout = &w.layout;
    problem.kernels->pack_input(p);
  }
  problem.packed_x = packed.get();
  std::unique_ptr<uint8_t[]> sums(new uint8_t[nms::block_sum_bytes(problem)]);
  for (int64_t i = 0; i < nms::block_count(problem); ++i) nms::multiply_block(problem, i, sums.get());
}

double activated(nms::Activation activation, double v) {
  switch (activation) {
    case nms::Activation::kRelu:
      return v < 0 ? 0 : v;
    case nms::Activation::kGelu:
      return 0.5 * v * (1 + std::erf(v / std::sqrt(2.0)));
    case nms::Activation::kSilu:
      return v / (1 + std::exp(-v));
    default:
      return v;
  }
}

void check_product(DType dtype, Pattern p, int64_t rows, int64_t k, int64_t batch, bool transposed,
                   nms::Activation activation) {
  Weight w(dtype, p.n, p.m, rows, k);
  Array x(dtype, batch * k), bias(dtype, rows), y(dtype, batch * rows);
  for (int64_t i = 0; i < batch * k; ++i) x.set(i, random_number());
  for (int64_t i = 0; i < rows; ++i) bias.set(i, random_number());
  const int64_t x_row = transposed ? 1 : k, x_k = transposed ? batch : 1;
  multiply(dtype, w, rows, k, x, x_row, x_k, batch, &bias, activation, y);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t r = 0; r < rows; ++r) {
      double sum = bias.get(r);
      for (int64_t i = 0; i < k; ++i) sum += x.get(b * x_row + i * x_k) * w.dense.get(r * k + i);
      Array wanted(dtype, 1);
      wanted.set(0, activated(activation, sum));
      const double got = y.get(b * rows + r);
      const bool exact = activation == nms::Activation::kNone || activation == nms::Activation::kRelu;
      // One unit in the last place of the 16-bit types where an approximation falls near a tie.
      const double tolerance = exact ? 0 : (size_of(dtype) == 2 ? 0x1p-7 : 2e-6) * (std::fabs(sum) + 0.1);
      if (!(std::fabs(got - wanted.get(0)) <= tolerance)) {
        std::fprintf(stderr, "%s: %d:%d rows %d of %d, batch %d, at %d, %d: got %g, want %g\n", kernels_name, p.n, p.m,
                     static_cast<int>(rows), static_cast<int>(k), static_cast<int>(batch), static_cast<int>(b),
                     static_cast<int>(r), got, wanted.get(0));
        std::exit(1);
      }
    }
  }
}

void test_products() {
  for (const Pattern p : kPatterns) {
    for (const DType dtype : kTypes) {
      for (const int batch : {1, 2, 4, 7, 8, 15, 16, 17, 33})
        check_product(dtype, p, random_int(1, 40), random_int(1, 130), batch, batch % 3 == 0, nms::Activation::kNone);
      check_product(dtype, p, 32, 128, 5, false, nms::Activation::kNone);
    }
  }
}

// Several blocks of panels, of steps and of tiles.
void test_blocks() {
  for (const Pattern p : {Pattern{2, 4}, Pattern{1, 16}, Pattern{3, 4}, Pattern{5, 7}})
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16})
      for (const int batch : {3, 40}) check_product(dtype, p, 150, 2500, batch, false, nms::Activation::kNone);
}

void test_activations() {
  for (const DType dtype : kTypes)
    for (const auto activation : {nms::Activation::kRelu, nms::Activation::kGelu, nms::Activation::kSilu})
      check_product(dtype, {2, 4}, 37, 70, 5, false, activation);
}

void test_kernels(const char* name, const nms::LinearTable& kernels) {
  kernels_name = name;
  table = kernels;
  test_products();
  test_blocks();
  test_activations();
  std::printf("%s: ok\n", name);
}

}  // namespace

int main() {
  test_layout();
  test_unpack();
  test_restore();
  for (const char* isa : nms::cpu_isas()) {
    CHECK(nms::set_cpu_isa(isa));
    test_kernels(isa, nms::kernels().linear);
  }
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512bf16")) {  // then the other kernels for bfloat16 are never chosen here
    nms::LinearTable older = nms::scalar_linear();
    nms::use_avx512_linear(older);
    test_kernels("avx512 without bfloat16", older);
  }
#endif
  return 0;
}
