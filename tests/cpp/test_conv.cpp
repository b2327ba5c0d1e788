// The packed convolution: every instruction set that this host has against sums in double, for all element types,
// patterns, and geometries at random; by lines and by tiles.
//
// Inputs end where their allocation ends, so that the address sanitizer sees any read too far.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <new>

#include "check.h"
#include "core/conv_shape.h"
#include "cpu/kernels/conv.h"
#include "cpu/kernels/conv_tiles.h"
#include "cpu/kernels/kernels.h"
#include "panel_weight.h"

namespace {

using nms::ConvProblem;
using nms::ConvShape;

void test_tap_inputs() {
  for (const Pattern p : kPatterns) {
    for (const bool paired : {false, true}) {
      const int step = nms::panel_layout(p.n, p.m, 0, paired ? DType::kBFloat16 : DType::kFloat32).step_inputs();
      CHECK_EQ(nms::tap_inputs(p.n, p.m, 17, 1, paired), 17);
      for (const int64_t inputs : {1, 16, 40, 64}) {
        const int64_t tap = nms::tap_inputs(p.n, p.m, inputs, 9, paired);
        CHECK(tap >= inputs && tap % step == 0);
        CHECK_EQ(tap / p.m * nms::packed_format(p.n, p.m).group_bits % 8, 0);
      }
      if (p.n == 2 && p.m == 4) CHECK_EQ(nms::tap_inputs(2, 4, 64, 9, paired), 64);
    }
  }
}

void test_output_size() {
  CHECK_EQ(nms::conv_output_size(56, 3, 1, 1, 1, 1), 56);
  CHECK_EQ(nms::conv_output_size(56, 3, 2, 1, 1, 1), 28);
  CHECK_EQ(nms::conv_output_size(5, 3, 1, 2, 0, 0), 1);
  CHECK_EQ(nms::conv_output_size(4, 3, 1, 2, 0, 0), 0);
  CHECK_EQ(nms::conv_output_size(4, 2, 1, 1, 0, 1), 4);
}

struct Free {
  void operator()(uint8_t* p) const { ::operator delete(p, std::align_val_t{64}); }
};

nms::Kernels table;  // under test

// Small geometries of any kind; `wide`: such as go by lines.
ConvShape random_shape(bool wide) {
  ConvShape shape;
  shape.batch = random_int(1, 2);
  const int dims = random_int(1, 3);
  for (int d = 0; d < 3; ++d) {
    const bool missing = d < 3 - dims;
    shape.kernel[d] = missing ? 1 : random_int(1, 3);
    shape.stride[d] = missing ? 1 : random_int(1, 3);
    shape.dilation[d] = missing ? 1 : random_int(1, 2);
    shape.padding[d] = missing ? 0 : random_int(0, 2);
    shape.out[d] = missing ? 1 : random_int(1, d == 2 && wide ? 40 : 4);
    const int64_t seen = (shape.out[d] - 1) * shape.stride[d] + (shape.kernel[d] - 1) * shape.dilation[d] + 1;
    shape.in[d] = std::max<int64_t>(1, seen - 2 * shape.padding[d] + random_int(0, 1));
    shape.out[d] = nms::conv_output_size(shape.in[d], shape.kernel[d], shape.stride[d], shape.dilation[d],
                                         shape.padding[d], shape.padding[d]);
  }
  return shape;
}

struct Counts {
  int by_lines = 0, by_tiles = 0;
} counts;

void check_conv(DType dtype, Pattern p, const ConvShape& shape, int64_t groups, int64_t inputs, int64_t outputs,
                int threads) {
  const int64_t taps = shape.taps();
  const int64_t tap = nms::tap_inputs(p.n, p.m, inputs, taps, dtype == DType::kBFloat16);
  Weight w(dtype, p.n, p.m, outputs, taps * tap);
  const int64_t channels = groups * inputs, places = shape.in[0] * shape.in[1] * shape.in[2];
  Array x(dtype, shape.batch * places * channels), bias(dtype, outputs), y(dtype, shape.pixels() * outputs);
  for (int64_t i = 0; i < shape.batch * places * channels; ++i) x.set(i, random_number());
  const bool has_bias = random_int(0, 2) > 0, adds = random_int(0, 1) == 1, relu = random_int(0, 1) == 1;
  for (int64_t i = 0; i < outputs; ++i) bias.set(i, has_bias ? random_number() : 0);
  Array residual(dtype, shape.pixels() * outputs);
  for (int64_t i = 0; i < shape.pixels() * outputs; ++i) residual.set(i, adds ? random_number() : 0);

  ConvProblem problem;
  problem.kernels = &table.linear.of[static_cast<int>(dtype)];
  const nms::ConvKernels& conv = table.conv.of[static_cast<int>(dtype)];
  problem.layout = w.layout;
  problem.tile = conv.tile;
  problem.decoded = conv.indices(w.layout);
  problem.values = w.panel_values.data();
  problem.indices = w.panel_words.data();
  problem.shape = shape;
  problem.groups = groups;
  problem.inputs = inputs;
  problem.outputs = outputs;
  problem.x = x.data();
  problem.x_place[2] = channels;
  problem.x_place[1] = shape.in[2] * channels;
  problem.x_place[0] = shape.in[1] * problem.x_place[1];
  problem.x_image = places * channels;
  problem.bias = has_bias ? bias.data() : nullptr;
  problem.residual = adds ? residual.data() : nullptr;
  problem.y = y.data();
  problem.element_size = size_of(dtype);
  problem.activation = relu ? nms::Activation::kRelu : nms::Activation::kNone;
  nms::choose_conv_blocks(problem, threads);
  ++(problem.by_lines ? counts.by_lines : counts.by_tiles);
  const int64_t bytes = nms::conv_block_memory(problem);
  std::unique_ptr<uint8_t, Free> memory(static_cast<uint8_t*>(::operator new(bytes, std::align_val_t{64})));
  for (int64_t i = 0; i < nms::conv_block_count(problem); ++i) nms::conv_block(problem, i, memory.get());

  const int64_t group_outputs = outputs / groups;
  for (int64_t pixel = 0; pixel < shape.pixels(); ++pixel) {
    const int64_t ox = pixel % shape.out[2], oy = pixel / shape.out[2] % shape.out[1];
    const int64_t oz = pixel / shape.out[2] / shape.out[1] % shape.out[0],
                  image = pixel / (shape.pixels() / shape.batch);
    for (int64_t o = 0; o < outputs; ++o) {
      double sum = bias.get(o) + residual.get(pixel * outputs + o);
      for (int64_t t = 0; t < taps; ++t) {
        const int64_t at[3] = {
            oz * shape.stride[0] + t / shape.kernel[2] / shape.kernel[1] * shape.dilation[0] - shape.padding[0],
            oy * shape.stride[1] + t / shape.kernel[2] % shape.kernel[1] * shape.dilation[1] - shape.padding[1],
            ox * shape.stride[2] + t % shape.kernel[2] * shape.dilation[2] - shape.padding[2]};
        bool inside = true;
        for (int d = 0; d < 3; ++d) inside = inside && 0 <= at[d] && at[d] < shape.in[d];
        if (!inside) continue;
        const int64_t place = ((image * shape.in[0] + at[0]) * shape.in[1] + at[1]) * shape.in[2] + at[2];
        for (int64_t c = 0; c < inputs; ++c)
          sum += x.get(place * channels + o / group_outputs * inputs + c) * w.dense.get((o * taps + t) * tap + c);
      }
      Array wanted(dtype, 1);
      wanted.set(0, relu ? std::max(sum, 0.0) : sum);
      if (y.get(pixel * outputs + o) == wanted.get(0)) continue;
      std::fprintf(stderr, "%s: %d:%d, %d to %d channels, pixel %d, output %d: got %g, want %g\n", table.isa, p.n, p.m,
                   static_cast<int>(inputs), static_cast<int>(outputs), static_cast<int>(pixel), static_cast<int>(o),
                   y.get(pixel * outputs + o), wanted.get(0));
      std::exit(1);
    }
  }
}

void test_splits() {
  ConvProblem problem;
  for (const Pattern p : {Pattern{2, 4}, Pattern{1, 8}, Pattern{3, 4}}) {
    problem.layout = nms::panel_layout(p.n, p.m, 64, DType::kFloat32);
    problem.tile = table.conv.of[static_cast<int>(DType::kFloat32)].tile;
    for (int64_t count = 0; count < 300; ++count) {
      const nms::TileSplit split(problem, count);
      int64_t before = 0;
      for (int64_t i = 0; i < split.count(); ++i) {
        CHECK(before < count);
        CHECK(problem.tile(problem.layout, split.rows(i), 1).run != nullptr);
        before += split.rows(i);
      }
      CHECK(before >= count);
      CHECK_EQ(before, split.total_rows());
    }
  }
}

void test_kernels() {
  test_splits();
  for (const Pattern p : kPatterns) {
    for (const DType dtype : kTypes) {
      for (int i = 0; i < 6; ++i) {
        const int groups = random_int(0, 3) == 0 ? 2 : 1;
        const int outputs = groups == 1 ? random_int(1, 40) : 32;
        check_conv(dtype, p, random_shape(i % 2 == 0), groups, random_int(1, 40), outputs, 1 + i % 3);
      }
    }
  }
  // Several blocks of steps, lines, tiles and panels.
  const ConvShape lines{1, {1, 9, 30}, {1, 9, 30}, {1, 3, 3}, {1, 1, 1}, {1, 1, 1}, {0, 1, 1}};
  const ConvShape tiles{2, {1, 7, 7}, {1, 7, 7}, {1, 3, 3}, {1, 1, 1}, {1, 1, 1}, {0, 1, 1}};
  for (const Pattern p : {Pattern{2, 4}, Pattern{1, 16}, Pattern{3, 4}})
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16})
      for (const ConvShape& shape : {lines, tiles}) check_conv(dtype, p, shape, 1, 130, 200, 2);
  std::printf("%s: ok, %d by lines, %d by tiles\n", table.isa, counts.by_lines, counts.by_tiles);
  CHECK(counts.by_lines > 0 && counts.by_tiles > 0);
}

}  // namespace

int main() {
  test_tap_inputs();
  test_output_size();
  for (const char* isa : nms::cpu_isas()) {
    CHECK(nms::set_cpu_isa(isa));
    table = nms::kernels();
    test_kernels();
  }
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512bf16")) {  // then the other kernels for bfloat16 are never chosen here
    nms::use_avx512_linear(table.linear);
    nms::use_avx512_conv(table.conv);
    test_kernels();
  }
#endif
  return 0;
}
