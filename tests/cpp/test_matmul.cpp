// x @ W from panels: every instruction set that this host has against sums in double, for all element types that are
// computed with, patterns, ragged sizes and batches.
//
// Inputs end where their allocation ends, so that the address sanitizer sees any read too far.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <new>

#include "check.h"
#include "core/panel_layout.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/matmul.h"
#include "panel_weight.h"

namespace {

const char* kernels_name = "";
nms::MatmulTable table;  // under test

// As matmul_cpu.cpp does it, with one thread.
void multiply(DType dtype, Weight& w, int64_t rows, int64_t k, const Array& x, int64_t x_row, int64_t x_r,
              int64_t batch, Array& y) {
  nms::MatmulProblem problem;
  problem.kernels = &table.of[static_cast<int>(dtype)];
  problem.layout = w.layout;
  problem.values = w.panel_values.data();
  problem.indices = w.panel_words.data();
  problem.rows = rows;
  problem.k = k;
  problem.batch = batch;
  problem.x = x.data();
  problem.x_row = x_row;
  problem.x_r = x_r;
  problem.y = y.data();
  problem.element_size = size_of(dtype);

  const auto aligned = [](int64_t bytes) {
    const auto align = std::align_val_t{nms::kTileAlignment};
    const auto free = [align](uint8_t* p) { ::operator delete(p, align); };
    return std::unique_ptr<uint8_t, decltype(free)>(
        static_cast<uint8_t*>(::operator new(static_cast<size_t>(bytes), align)), free);
  };
  const auto packed = aligned(problem.blocks() * problem.packed_block_bytes());
  const auto memory = aligned(nms::strip_memory(problem));
  // Each half as if by a thread of its own.
  const int64_t blocks = problem.blocks(), strips = problem.strips();
  nms::pack_matmul_input(problem, 0, blocks / 2, packed.get());
  nms::pack_matmul_input(problem, blocks / 2, blocks, packed.get());
  nms::multiply_strips(problem, packed.get(), 0, strips / 2, memory.get());
  nms::multiply_strips(problem, packed.get(), strips / 2, strips, memory.get());
}

void check_product(DType dtype, Pattern p, int64_t rows, int64_t k, int64_t batch, bool transposed) {
  Weight w(dtype, p.n, p.m, rows, k);
  Array x(dtype, batch * rows), y(dtype, batch * k);
  for (int64_t i = 0; i < batch * rows; ++i) x.set(i, random_number());
  const int64_t x_row = transposed ? 1 : rows, x_r = transposed ? batch : 1;
  multiply(dtype, w, rows, k, x, x_row, x_r, batch, y);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < k; ++i) {
      double sum = 0;
      for (int64_t r = 0; r < rows; ++r) sum += x.get(b * x_row + r * x_r) * w.dense.get(r * k + i);
      Array wanted(dtype, 1);
      wanted.set(0, sum);
      if (y.get(b * k + i) != wanted.get(0)) {
        std::fprintf(stderr, "%s: %d:%d, rows %d of %d, batch %d, at %d, %d: got %g, want %g\n", kernels_name, p.n, p.m,
                     static_cast<int>(rows), static_cast<int>(k), static_cast<int>(batch), static_cast<int>(b),
                     static_cast<int>(i), y.get(b * k + i), wanted.get(0));
        std::exit(1);
      }
    }
  }
}

void test_kernels(const char* name, const nms::MatmulTable& kernels) {
  kernels_name = name;
  table = kernels;
  for (const Pattern p : kPatterns) {
    for (const DType dtype : kTypes) {
      for (const int batch : {1, 2, 3, 4, 5, 6, 7, 13})
        check_product(dtype, p, random_int(1, 150), random_int(1, 130), batch, batch % 3 == 0);
      check_product(dtype, p, 128, 128, 6, false);
    }
  }
  check_product(DType::kFloat32, {2, 4}, 33, 70, 300, false);  // more than share a dense block
  std::printf("%s: ok\n", name);
}

}  // namespace

int main() {
  for (const char* isa : nms::cpu_isas()) {
    CHECK(nms::set_cpu_isa(isa));
    test_kernels(isa, nms::kernels().matmul);
  }
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512bf16")) {  // then the other kernels for bfloat16 are never chosen here
    nms::MatmulTable older = nms::scalar_matmul();
    nms::use_avx512_matmul(older);
    test_kernels("avx512 without bfloat16", older);
  }
#endif
  return 0;
}
