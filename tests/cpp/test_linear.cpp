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

#include "activated.h"
#include "check.h"
#include "core/panel_layout.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/linear.h"
#include "cpu/kernels/linear_pack.h"
#include "panel_weight.h"

namespace {

// ---- Tests ----

void test_layout() {
  for (const Pattern p : kPatterns) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kInt8}) {
      for (int64_t k : {0, 1, 15, 16, 17, 100, 4096}) {
        const PanelLayout layout = nms::panel_layout(p.n, p.m, k, dtype);
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

// With the instruction set that is on; each half as if by a thread of its own.
void unpack(const nms::PanelForm& form, void* dense) {
  const int64_t panels = nms::panel_count(form.rows);
  nms::kernels().unpack_panels(form, dense, 0, panels / 2);
  nms::kernels().unpack_panels(form, dense, panels / 2, panels);
}

void check_unpack(DType dtype, Pattern p, int64_t rows, int64_t k) {
  Weight w(dtype, p.n, p.m, rows, k);
  Array dense(dtype, rows * k);
  unpack(w.form(dtype, rows, k), dense.data());
  CHECK(std::memcmp(dense.data(), w.dense.data(), rows * k * size_of(dtype)) == 0);
}

void test_unpack() {
  for (const DType dtype : kTypes) {
    for (const Pattern p : kPatterns)
      for (const auto& [rows, k] : {std::pair<int, int>{1, 1}, {16, 64}, {5, 33}, {40, 31}, {17, 96}})
        check_unpack(dtype, p, rows, k);
    for (int m = 1; m <= nms::kMaxPanelM; ++m)
      for (int n = 1; n <= m; ++n) check_unpack(dtype, {n, m}, random_int(1, 40), random_int(1, 300));
  }
  // Large enough to be written past the cache.
  check_unpack(DType::kFloat32, {1, 16}, 1030, 4096);
  check_unpack(DType::kFloat32, {1, 4}, 1030, 4100);
  check_unpack(DType::kBFloat16, {1, 8}, 2050, 4096);
  check_unpack(DType::kFloat16, {2, 16}, 2050, 4096);
}

// Fields that no packing writes: the same weight from every instruction set, and nothing written beside it.
void test_unpack_damaged() {
  for (int m = 1; m <= nms::kMaxPanelM; ++m) {
    for (int n = 1; n <= m; ++n) {
      for (const DType dtype : kTypes) {
        const int64_t rows = random_int(1, 40), k = random_int(1, 150);
        Weight w(dtype, n, m, rows, k);
        for (uint32_t& word : w.panel_words) word ^= static_cast<uint32_t>(rng());
        Array dense(dtype, rows * k), wanted(dtype, rows * k);
        unpack(w.form(dtype, rows, k), dense.data());
        nms::unpack_panels(w.form(dtype, rows, k), wanted.data(), 0, nms::panel_count(rows));
        CHECK(std::memcmp(dense.data(), wanted.data(), rows * k * size_of(dtype)) == 0);
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

// Panels of the instruction set that is on against those of the scalar one, bit for bit.
void test_pack() {
  for (int m = 1; m <= nms::kMaxPanelM; ++m) {
    for (int n = 1; n <= m; ++n) {
      for (const DType dtype : kTypes) {
        for (const int k : {random_int(1, 80), 256, random_int(300, 700)}) {
          const int rows = k == 256 ? 32 : random_int(1, 40);
          Weight w(dtype, n, m, rows, k);
          const int64_t values = nms::panel_count(rows) * w.layout.panel_values();
          Array again(dtype, values);
          std::unique_ptr<uint32_t[]> words(new uint32_t[w.panel_words.size()]);
          nms::PanelForm form = w.form(dtype, rows, k);
          if (random_int(0, 1) == 1) {  // groups without codes, as convolutions fill up windows with
            for (int row = 0; row < rows; ++row)
              std::fill_n(w.indices.get() + row * w.index_bytes + w.index_bytes / 2, w.index_bytes - w.index_bytes / 2,
                          0);
            nms::pack_panels(form, w.values.data(), w.indices.get(), 0, nms::panel_count(rows));
          }
          form.values = again.data();
          form.indices = words.get();
          // Each half as if by a thread of its own.
          const int64_t panels = nms::panel_count(rows);
          nms::kernels().pack_panels(form, w.values.data(), w.indices.get(), 0, panels / 2);
          nms::kernels().pack_panels(form, w.values.data(), w.indices.get(), panels / 2, panels);
          CHECK(std::memcmp(again.data(), w.panel_values.data(), values * size_of(dtype)) == 0);
          CHECK(std::equal(w.panel_words.begin(), w.panel_words.end(), words.get()));
        }
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
  problem.k = k;
  problem.x = x.data();
  problem.x_row = x_row;
  problem.x_k = x_k;
  problem.bias = bias ? bias->data() : nullptr;
  problem.y = y.data();
  problem.element_size = size_of(dtype);
  problem.activation = activation;
  nms::choose_blocks(problem, 1);

  // Each half as if by a thread of its own.
  const int64_t blocks = nms::block_count(problem), half = blocks / 2;
  std::unique_ptr<uint8_t[]> memory(new uint8_t[nms::block_memory(problem)]);
  nms::multiply_blocks(problem, 0, half, memory.get());
  nms::multiply_blocks(problem, half, blocks, memory.get());
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
  test_restore();
  for (const char* isa : nms::cpu_isas()) {
    CHECK(nms::set_cpu_isa(isa));
    test_pack();
    test_unpack();
    test_unpack_damaged();
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
