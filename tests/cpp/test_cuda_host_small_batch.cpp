// The small-batch product of CUDA, run thread by thread on the CPU against a naive loop. See test_cuda_host.cpp.
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "check.h"
#include "core/convert.h"
#include "core/packed.h"
#include "cuda/kernels/small_batch_launch.cuh"
#include "cuda_host.h"

namespace {

// ---- A warp whose lanes run side by side ----

struct Lanes {
  std::array<float, 32> of{};
};

Lanes operator+(const Lanes& a, const Lanes& b) {
  Lanes sum;
  for (int i = 0; i < 32; ++i) sum.of[i] = a.of[i] + b.of[i];
  return sum;
}

struct HostWarp {
  Lanes exchange(const Lanes& v, int d) const {
    Lanes other;
    for (int i = 0; i < 32; ++i) other.of[i] = v.of[i ^ d];
    return other;
  }
  Lanes pick(int d, const Lanes& a, const Lanes& b) const {
    Lanes picked;
    for (int i = 0; i < 32; ++i) picked.of[i] = i & d ? a.of[i] : b.of[i];
    return picked;
  }
};

template <class Step>
void run_small_threads(const Step& step) {
  const bool forwards = random_int(0, 1);
  for (int i = 0; i < kSmallThreads; ++i) step(forwards ? i : kSmallThreads - 1 - i);
}

// mma.sp.m16n8k32 as PTX documents it: row r of A has the registers of lanes 4 (r % 8) + slot % 4, the metadata of a
// row are in the two lanes of its four that the selector names, 16 inputs each; B's column n is in lanes 4 n + ...
template <DType D>
void sparse_mma(std::array<std::array<float, 4>, 32>& sums, const std::array<SparseOperand, 32>& w,
                const std::array<Chunk, 32>& x, int selector) {
  for (int r = 0; r < 16; ++r)
    for (int n = 0; n < 8; ++n) {
      float& sum = sums[r % 8 * 4 + n / 2][r / 8 * 2 + n % 2];
      for (int slot = 0; slot < 8; ++slot) {
        const uint32_t meta = w[r % 8 * 4 + 2 * selector + slot / 4].metadata >> (r / 8 * 16);
        const uint32_t nibble = meta >> (slot % 4 * 4) & 0xF;
        const uint32_t values = w[r % 8 * 4 + slot % 4].a[r / 8 + slot / 4 * 2];
        for (int j = 0; j < 2; ++j) {
          const int input = 4 * slot + static_cast<int>(nibble >> (2 * j) & 3);
          const uint32_t word = x[n * 4 + input % 8 / 2].word[input / 8];
          sum += word_element<D>(values, j) * word_element<D>(word, input % 2);
        }
      }
    }
}

int sparse_core_runs = 0;

// What sparse_core_kernel does.
template <DType D, DType V, int NT>
void run_small(const SparseCoreBatch<D, V, NT>& body, int64_t tiles) {
  using Body = SparseCoreBatch<D, V, NT>;
  ++sparse_core_runs;
  const auto memory = std::make_unique<Chunk[]>(kSmallTileBytes / kChunkBytes);
  auto* shared = reinterpret_cast<uint8_t*>(memory.get());
  for (int64_t b = 0; b < tiles * body.plan.splits; ++b) {
    const int64_t tile_at = b / body.plan.splits, row_tile = body.token_tiles.quotient(tile_at);
    const SmallBlock block{row_tile, static_cast<int>(b % body.plan.splits),
                           static_cast<int>(tile_at - row_tile * body.token_tiles.value())};
    std::memset(shared, 0x7F, kSmallTileBytes);
    std::vector<std::array<std::array<std::array<float, 4>, 32>, NT>> sums(kSmallWarps);
    for (int tile = 0; body.tile_units(block, tile) > 0; ++tile) {
      run_small_threads([&](int thread) { body.fill(block, tile, shared, thread); });
      for (int warp = 0; warp < kSmallWarps; ++warp)
        for (int unit = warp % body.plan.parts; unit < body.tile_units(block, tile); unit += body.plan.parts) {
          std::array<typename Body::Read, 32> read;
          for (int lane = 0; lane < 32; ++lane)
            read[lane] = body.read(block, tile, unit, body.place(block, warp * 32 + lane), lane);
          for (int j = 0; j < Body::kMmas; ++j) {
            std::array<SparseOperand, 32> w;
            for (int lane = 0; lane < 32; ++lane) w[lane] = body.operand(read[lane], j, lane);
            for (int t = 0; t < NT; ++t) {
              std::array<Chunk, 32> x;
              for (int lane = 0; lane < 32; ++lane) x[lane] = *body.x_operand(shared, unit, t, j, lane);
              sparse_mma<D>(sums[warp][t], w, x, j % 2);
            }
          }
        }
    }
    auto* joined = reinterpret_cast<float*>(shared);
    run_small_threads([&](int thread) {
      std::array<float, Body::kSums> own;
      for (int i = 0; i < Body::kSums; ++i) own[i] = sums[thread / 32][i / 4][thread % 32][i % 4];
      body.publish(own.data(), joined, thread);
    });
    run_small_threads([&](int thread) { body.finish(block, joined, thread); });
  }
}

// What small_batch_kernel does, its blocks and threads one after the other.
template <class Body>
void run_small(const Body& body, int64_t tiles) {
  const auto memory = std::make_unique<Chunk[]>(kSmallTileBytes / kChunkBytes);
  auto* shared = reinterpret_cast<uint8_t*>(memory.get());
  for (int64_t b = 0; b < tiles * body.plan.splits; ++b) {
    const int64_t tile = b / body.plan.splits, row_tile = body.token_tiles.quotient(tile);
    const SmallBlock block{row_tile, static_cast<int>(b % body.plan.splits),
                           static_cast<int>(tile - row_tile * body.token_tiles.value())};
    std::memset(shared, 0x7F, kSmallTileBytes);  // NaN, wherever it is read unfilled
    std::vector<std::array<float, Body::kSums>> sums(kSmallThreads);
    for (int tile = 0; body.tile_units(block, tile) > 0; ++tile) {
      run_small_threads([&](int thread) { body.fill(block, tile, shared, thread); });
      run_small_threads([&](int thread) {
        const auto at = body.place(block, thread);
        body.prefetch(block, at);
        body.add(block, tile, at, shared, sums[thread].data());
      });
    }
    for (int warp = 0; warp < kSmallWarps; ++warp) {
      std::array<Lanes, Body::kSums> lanes;
      for (int i = 0; i < Body::kSums; ++i)
        for (int lane = 0; lane < 32; ++lane) lanes[i].of[lane] = sums[warp * 32 + lane][i];
      join_lanes<Body::kSums>(HostWarp{}, body.plan.lanes, lanes.data());
      for (int i = 0; i < Body::kSums; ++i)
        for (int lane = 0; lane < 32; ++lane) sums[warp * 32 + lane][i] = lanes[i].of[lane];
    }
    auto* joined = reinterpret_cast<float*>(shared);
    run_small_threads([&](int thread) { body.publish(sums[thread].data(), joined, thread); });
    run_small_threads([&](int thread) { body.finish(block, joined, thread); });
  }
}

// ---- One product ----

struct Case {
  int n, m;
  int64_t rows, k, tokens;
  bool int8, vectors;       // scales (of int8) and bias
  int64_t x_offset, x_gap;  // elements
  int multiprocessors;
  bool damaged;
};

template <DType D>
void check_case(const Case& c) {
  const PackedFormat format = packed_format(c.n, c.m);
  const int64_t groups = divide_up(c.k, int64_t{c.m}), per_row = groups * c.n;
  const int64_t index_row = index_row_bytes(format, groups);
  const int element = c.int8 ? 1 : 2;

  // Small integers and their sums are exact in 16 bits and in every order.
  const auto small = [&] { return static_cast<float>(random_int(-3, 3)); };
  Buffer<uint16_t> x(c.tokens * (c.k + c.x_gap), c.x_offset);
  for (int64_t i = 0; i < x.size(); ++i) x[i] = from_arithmetic<D>(small());
  Buffer<uint8_t> values(c.rows * per_row * element), indices(c.rows * index_row);
  std::vector<float> dense(c.rows * c.k, 0.0f);
  for (int64_t r = 0; r < c.rows; ++r) {
    BitWriter writer(indices.data() + r * index_row);
    for (int64_t g = 0; g < groups; ++g) {
      uint64_t mask = 0;
      while (popcount64(mask) < c.n) mask |= uint64_t{1} << random_int(0, c.m - 1);
      writer.put(encode_group(mask, format), format.group_bits);
      for (int j = 0; j < c.n; ++j, mask &= mask - 1) {
        const int64_t to = g * c.m + lowest_bit(mask);
        const float value = to < c.k ? small() : 0.0f;
        const int64_t i = r * per_row + g * c.n + j;
        if (c.int8)
          values[i] = static_cast<uint8_t>(static_cast<int8_t>(value));
        else
          reinterpret_cast<uint16_t*>(values.data())[i] = from_arithmetic<D>(value);
        if (to < c.k) dense[r * c.k + to] = value;
      }
    }
    writer.finish();
  }
  if (c.damaged) fill_random(indices);
  std::vector<float> scales(c.rows);
  std::vector<uint16_t> bias(c.rows);
  for (int64_t r = 0; r < c.rows; ++r)
    scales[r] = 0.5f * static_cast<float>(random_int(1, 4)), bias[r] = from_arithmetic<D>(small());

  SmallProblem p{};
  p.x = x.data(), p.x_row = c.k + c.x_gap, p.tokens = c.tokens;
  p.values = values.data(), p.indices = indices.data(), p.rows = c.rows, p.k = c.k;
  p.format = format, p.int8 = c.int8, p.multiprocessors = c.multiprocessors;
  Buffer<uint16_t> y(c.tokens * c.rows);
  std::memset(y.data(), 0xEE, y.size() * 2);
  p.out = {c.int8 ? scales.data() : nullptr, c.vectors ? bias.data() : nullptr,
           c.vectors ? Activation::kRelu : Activation::kNone, y.data()};
  with_small_body<D>(p, [&](auto body) {
    using Body = decltype(body);
    body.plan = plan_small_batch(shape_of(body), c.multiprocessors);
    const int64_t row_tiles = divide_up(c.rows, body.plan.block_rows(Body::kWarpRows, Body::kMaxLanes));
    Buffer<float> workspace(body.plan.splits * c.tokens * c.rows);
    std::memset(workspace.data(), 0x7F, workspace.size() * 4);
    body.partial = body.plan.splits > 1 ? workspace.data() : nullptr;
    run_small(body, row_tiles * body.token_tiles.value());
    if (body.partial) run_map(SumSplits<D>{workspace.data(), body.plan.splits, c.tokens, Divisor(c.rows), p.out});
  });
  if (c.damaged) return;  // nothing outside was read, or the sanitizer would have said so
  for (int64_t t = 0; t < c.tokens; ++t)
    for (int64_t r = 0; r < c.rows; ++r) {
      float sum = 0;
      for (int64_t i = 0; i < c.k; ++i) sum += dense[r * c.k + i] * to_arithmetic<D>(x[t * (c.k + c.x_gap) + i]);
      if (c.int8) sum *= scales[r];
      if (c.vectors) sum = std::max(0.0f, sum + to_arithmetic<D>(bias[r]));
      CHECK_EQ(y[t * c.rows + r], from_arithmetic<D>(sum));
    }
}

void check_random_case() {
  static constexpr int kUsual[][2] = {{1, 2},  {2, 4},  {1, 4},  {4, 8},  {2, 8},  {1, 8},
                                      {8, 16}, {4, 16}, {2, 16}, {1, 16}, {4, 32}, {1, 32}};
  static constexpr int64_t kTokens[] = {1, 2, 3, 4, 5, 8, 9, 16, 17, 33};
  Case c{};
  if (random_int(0, 2)) {
    const auto& pattern = kUsual[random_int(0, 3) ? random_int(0, 11) : 1];
    c.n = pattern[0], c.m = pattern[1];
  } else {
    c.m = static_cast<int>(random_int(1, 64)), c.n = static_cast<int>(random_int(1, c.m));
  }
  c.tokens = kTokens[random_int(0, 9)];
  c.rows = random_int(0, 3) ? random_int(1, 9) : random_int(1, 70);
  c.k = random_int(1, random_int(0, 7) ? 400 : 9000);
  if (random_int(0, 3)) c.k = round_up(c.k, int64_t{c.m} * (16 / c.n + 1));
  if (random_int(0, 1)) c.k = round_up(c.k, int64_t{512});
  if (c.k > 4096) c.tokens = std::min<int64_t>(c.tokens, 9), c.rows = std::min<int64_t>(c.rows, 6);
  c.int8 = random_int(0, 2) == 0, c.vectors = random_int(0, 1);
  c.x_offset = random_int(0, 2) ? 0 : random_int(1, 7);
  c.x_gap = random_int(0, 2) ? 0 : random_int(1, 9);
  c.multiprocessors = random_int(0, 1) ? 132 : static_cast<int>(random_int(1, 8));
  c.damaged = random_int(0, 7) == 0;
  check_case<DType::kFloat16>(c);  // bfloat16 differs in word_element alone
}

// 2:4 on sparse tensor cores: tiles of 8, 16 and 32 tokens, ragged rows, parts, splits, several tiles of x.
void check_sparse_cores() {
  for (bool int8 : {false, true})
    for (int64_t tokens : {2, 8, 9, 16, 17, 33})
      for (int multiprocessors : {1, 132}) {
        Case c{2, 4, 37, 1152, tokens, int8, true, 0, 0, multiprocessors, false};
        const int before = sparse_core_runs;
        check_case<DType::kFloat16>(c);
        CHECK_EQ(sparse_core_runs, before + 1);
      }
}

void check_elements() {
  for (uint32_t i = 0; i < 1u << 16; ++i) {
    const uint32_t word = i | (i ^ 0x8421u) << 16;
    const auto low = static_cast<uint16_t>(i), high = static_cast<uint16_t>(i ^ 0x8421u);
    CHECK_EQ(bit_cast<uint32_t>(word_element<DType::kBFloat16>(word, 0)),
             bit_cast<uint32_t>(to_arithmetic<DType::kBFloat16>(low)));
    CHECK_EQ(bit_cast<uint32_t>(word_element<DType::kBFloat16>(word, 1)),
             bit_cast<uint32_t>(to_arithmetic<DType::kBFloat16>(high)));
    CHECK_EQ(bit_cast<uint32_t>(word_element<DType::kFloat16>(word, 1)),
             bit_cast<uint32_t>(to_arithmetic<DType::kFloat16>(high)));
    CHECK_EQ(word_element<DType::kInt8>(word, 2), static_cast<float>(static_cast<int8_t>(high)));
  }
}

// Every lane's sum arrives exactly once, for all numbers of lanes.
template <int N>
void check_join() {
  for (int lanes = 1; lanes <= 32; lanes *= 2) {
    std::array<Lanes, N> values;
    for (int i = 0; i < N; ++i)
      for (int lane = 0; lane < 32; ++lane) values[i].of[lane] = static_cast<float>(i * 37 + lane * lane);
    const auto before = values;
    join_lanes<N>(HostWarp{}, lanes, values.data());
    std::vector<int> seen(N * 32 / lanes, 0);
    for (int lane = 0; lane < 32; ++lane) {
      const Joined at = joined_at(N, lanes, lane % lanes);
      if (!at.owner) continue;
      for (int i = 0; i < at.count; ++i) {
        float want = 0;
        for (int other = 0; other < lanes; ++other) want += before[at.first + i].of[lane / lanes * lanes + other];
        CHECK_EQ(values[i].of[lane], want);
        ++seen[lane / lanes * N + at.first + i];
      }
    }
    for (int times : seen) CHECK_EQ(times, 1);
  }
}

// Plans cover all units, and only them.
void check_plans() {
  for (int i = 0; i < 20000; ++i) {
    SmallShape shape{};
    shape.rows = random_int(1, 50000);
    shape.units = static_cast<int>(random_int(1, 5000));
    shape.tile_units = static_cast<int>(random_int(1, 600));
    shape.warp_rows = random_int(0, 1) ? 16 : 4;
    shape.max_lanes = random_int(0, 1) ? 32 : 1;
    shape.row_bytes = random_int(10, 20000);
    shape.x_bytes = random_int(10, 60000);
    const SmallPlan plan = plan_small_batch(shape, static_cast<int>(random_int(1, 140)));
    CHECK(int64_t{plan.splits} * plan.split_units >= shape.units);
    CHECK(int64_t{plan.splits - 1} * plan.split_units < shape.units);
    CHECK(plan.tile_units >= 1 && plan.tile_units <= shape.tile_units);
    CHECK(plan.lanes >= 1 && plan.lanes <= shape.max_lanes && (plan.lanes & (plan.lanes - 1)) == 0);
    CHECK(plan.parts >= 1 && kSmallWarps % plan.parts == 0);
  }
}

}  // namespace

int main() {
  check_join<4>();
  check_join<8>();
  check_join<16>();
  check_elements();
  check_plans();
  check_sparse_cores();
  for (int i = 0; i < 300; ++i) check_random_case();
  return 0;
}
