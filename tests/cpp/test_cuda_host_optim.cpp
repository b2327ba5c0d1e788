// The CUDA optimizer step, run thread by thread on the CPU against naive loops: every layout, mask and type.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "check.h"
#include "core/dtype_switch.h"
#include "cuda/kernels/optim.cuh"
#include "cuda_host.h"

namespace {

template <class Body>
int64_t run_step(const Body& body, const typename Body::Step& step) {
  const auto shared = std::make_unique<Chunk[]>(kTileChunks);
  int64_t changed = 0;
  for (int64_t i = 0; i < body.count(); ++i) {
    std::memset(static_cast<void*>(shared.get()), 0xA5, kTileBytes);
    std::vector<uint8_t> old(Body::kMaskBytes, 0x5A);
    const Tile tile = tile_at(body.tiles, i);
    run_threads([&](int thread) { body.load_mask(tile, old.data(), thread); });
    run_threads([&](int thread) { body.update(tile, shared.get(), old.data(), step, thread); });
    if (body.at.sparse == nullptr) continue;
    run_threads([&](int thread) { body.choose(tile, shared.get(), old.data(), thread); });
    run_threads([&](int thread) { changed += body.write(tile, shared.get(), old.data(), thread); });
  }
  return changed;
}

// Numbers whose squares and quotients are ordinary ones.
template <DType D>
BitsOf<D> random_number(bool positive) {
  const double value = static_cast<double>(random_int(positive ? 0 : -2000, 2000)) / 512;
  return from_arithmetic<D>(static_cast<typename Arithmetic<D>::Type>(value));
}

template <DType D>
Buffer<BitsOf<D>> random_buffer(int64_t size, int64_t offset, bool positive = false) {
  Buffer<BitsOf<D>> buffer(size, offset);
  for (int64_t i = 0; i < size; ++i) buffer[i] = random_number<D>(positive);
  return buffer;
}

SgdOptions random_options(SgdOptions) {
  SgdOptions o;
  o.momentum = random_int(0, 2) ? 0.9 : 0;
  o.dampening = random_int(0, 1) ? 0.25 : 0;
  o.nesterov = random_int(0, 1);
  o.first = random_int(0, 2) == 0;
  return o;
}
AdamWOptions random_options(AdamWOptions) {
  AdamWOptions o;
  o.beta1 = 0.9;
  o.beta2 = 0.99;
  o.eps = 1e-8;
  o.amsgrad = random_int(0, 1);
  return o;
}

template <template <class> class StepOf, DType W, DType G, int M>
void check_step(const Shape& shape, int n, int m, bool with_pattern, bool force_strided) {
  using Body = StepTile<StepOf, W, G, M>;
  using Step = typename Body::Step;
  typename Step::Options options = random_options(typename Step::Options{});
  options.lr = 0.125;
  options.weight_decay = random_int(0, 1) ? 0.01 : 0;
  options.maximize = random_int(0, 1);
  options.term = static_cast<Term>(random_int(0, 3));
  options.lambda_w = 0.02;
  const float scale = 4, step_number = 3, lr = 0.5;
  StepScalars scalars;
  if (random_int(0, 1)) scalars.grad_scale = &scale;
  if (random_int(0, 1)) scalars.lr = &lr;
  const Step step = make_step<Step>(options, scalars, &step_number);

  const int64_t offset = random_int(0, 3) ? 0 : random_int(1, 3), span = shape.span();
  auto weight = random_buffer<W>(span, offset);
  auto grad = random_buffer<G>(span, offset);
  std::vector<Buffer<BitsOf<W>>> state;
  for (int s = 0; s < 3; ++s) state.push_back(random_buffer<W>(span, offset, s > 0));
  Buffer<BitsOf<G>> sparse(span, offset);
  const int64_t bits_row = divide_up(shape.k(), 8);
  Buffer<uint8_t> bits(shape.rows() * bits_row, 1);
  for (int64_t row = 0; row < shape.rows(); ++row)
    for (int64_t b = 0; b < bits_row; ++b) {
      const int used = static_cast<int>(std::min<int64_t>(8, shape.k() - 8 * b));
      bits[row * bits_row + b] = static_cast<uint8_t>(rng() & low_bits(used));
    }
  for (int64_t i = 0; i < span; ++i) sparse[i] = static_cast<BitsOf<G>>(0x77);

  // Expected.
  const bool keep = random_int(0, 4) == 0;
  std::vector<BitsOf<W>> want_weight(weight.data(), weight.data() + span), want_state[3];
  for (int s = 0; s < 3; ++s) want_state[s].assign(state[s].data(), state[s].data() + span);
  std::vector<BitsOf<G>> want_sparse(sparse.data(), sparse.data() + span);
  std::vector<uint8_t> want_bits(bits.data(), bits.data() + bits.size());
  int64_t want_changed = 0;
  for (int64_t row = 0; row < shape.rows(); ++row) {
    for (int64_t first = 0; first < shape.k(); first += m) {
      const int len = static_cast<int>(std::min<int64_t>(m, shape.k() - first));
      std::vector<int64_t> keys;
      uint64_t old_mask = 0;
      for (int i = 0; i < len; ++i) {
        const int64_t k = first + i, place = shape.offset(row, k);
        const bool kept = want_bits[row * bits_row + k / 8] >> (k % 8) & 1;
        old_mask |= uint64_t{kept} << i;
        BitsOf<W> held[3];
        for (int s = 0; s < 3; ++s) held[s] = want_state[s][place];
        update_element<W, G>(step, want_weight[place], grad[place], held, !with_pattern || kept);
        for (int s = 0; s < step.states(); ++s) want_state[s][place] = held[s];
        keys.push_back(magnitude_key<W>(want_weight[place]));
      }
      if (!with_pattern) continue;
      const uint64_t mask = keep ? old_mask : select_group(keys.data(), len, n);
      want_changed += popcount64(mask ^ old_mask);
      for (int i = 0; i < len; ++i) {
        const int64_t k = first + i, place = shape.offset(row, k);
        const bool kept = mask >> i & 1;
        want_sparse[place] = kept ? narrowed<W, G>(want_weight[place]) : BitsOf<G>{0};
        uint8_t& byte = want_bits[row * bits_row + k / 8];
        byte = static_cast<uint8_t>((byte & ~(1u << k % 8)) | unsigned{kept} << k % 8);
      }
    }
  }

  // The kernels.
  const Layout layout = make_layout(shape.sizes, shape.strides, &shape.strides, shape.dim, std::lcm(m, 8));
  int64_t changes = 0;
  StepOperands<W, G> at{weight.data(),          grad.data(), {},           nullptr,      nullptr,
                        divide_up(layout.k, 8), &changes,    &step_number, keep ? 0 : n, m};
  for (int s = 0; s < step.states(); ++s) at.state[s] = state[s].data();
  if (with_pattern) {
    at.sparse = sparse.data();
    at.bits = bits.data();
  }
  const int unit = Body::Select::unit_for(m);
  auto tiles = force_strided ? std::nullopt : make_tiles<BitsOf<W>>(layout, unit, weight.data(), nullptr);
  if (tiles) {
    tiles->aligned = tiles->aligned && is_aligned(grad.data(), kChunkBytes) && is_aligned(sparse.data(), kChunkBytes);
    for (int s = 0; s < 3; ++s) tiles->aligned = tiles->aligned && is_aligned(state[s].data(), kChunkBytes);
    changes = run_step(Body{*tiles, at, unit}, step);
  } else {
    const StepStrided<StepOf, W, G> body{make_spans(layout, std::lcm(m, 8)), at};
    for (int64_t i = 0; i < body.count(); ++i) changes += body(i, step);
  }
  CHECK_EQ(changes, want_changed);
  for (int64_t i = 0; i < bits.size(); ++i) CHECK_EQ(bits[i], want_bits[i]);
  for (int64_t row = 0; row < shape.rows(); ++row)
    for (int64_t k = 0; k < shape.k(); ++k) {
      const int64_t place = shape.offset(row, k);
      CHECK_EQ(weight[place], want_weight[place]);
      CHECK_EQ(sparse[place], want_sparse[place]);
      for (int s = 0; s < 3; ++s) CHECK_EQ(state[s][place], want_state[s][place]);
    }
}

template <template <class> class StepOf>
void test_steps() {
  for (int trial = 0; trial < 1200; ++trial) {
    const Shape shape = random_shape(trial % 20 == 0 ? 20000 : 1500);
    const bool with_pattern = random_int(0, 4) != 0, strided = random_int(0, 4) == 0;
    for_random_pattern([&](int n, int m) {
      switch_m(m, [&](auto fixed) {
        switch (trial % 6) {
          case 0:
            return check_step<StepOf, DType::kFloat64, DType::kFloat64, 0>(shape, n, m, with_pattern, strided);
          case 1:
            return check_step<StepOf, DType::kFloat32, DType::kBFloat16, fixed>(shape, n, m, with_pattern, strided);
          case 2:
            return check_step<StepOf, DType::kFloat32, DType::kFloat16, fixed>(shape, n, m, with_pattern, strided);
          case 3:
            return check_step<StepOf, DType::kBFloat16, DType::kBFloat16, 0>(shape, n, m, with_pattern, strided);
          default:
            return check_step<StepOf, DType::kFloat32, DType::kFloat32, fixed>(shape, n, m, with_pattern, strided);
        }
      });
    });
  }
}

void test_table() {
  using Body = StepTile<Sgd, DType::kFloat32, DType::kFloat32, 4>;
  static_assert(sizeof(StepTable<Body>) < 32000);
  auto table = std::make_unique<StepTable<Body>>();
  std::vector<int> owners;
  for (int i = 0; i < StepTable<Body>::kMaxWeights; ++i) {
    const Shape shape{{1, random_int(1, 9000)}, {9000, 1}, 1};
    Body body{};
    body.tiles =
        *make_tiles<uint32_t>(make_layout(shape.sizes, shape.strides, &shape.strides, 1, 8), 8, nullptr, nullptr);
    table->append(body);
    owners.insert(owners.end(), static_cast<size_t>(body.count()), i);
  }
  CHECK_EQ(table->first_tile[table->weights], static_cast<int64_t>(owners.size()));
  for (size_t tile = 0; tile < owners.size(); ++tile)
    CHECK_EQ(table->weight_of(static_cast<int64_t>(tile)), owners[tile]);
}

}  // namespace

int main() {
  test_table();
  test_steps<Sgd>();
  test_steps<AdamW>();
  std::puts("CUDA optimizer steps on the host: all checks passed");
}
