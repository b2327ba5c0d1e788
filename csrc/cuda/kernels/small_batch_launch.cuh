// Which of the small-batch kernels takes a product, and its launch. Instantiated once per type of x, in a file of its
// own, because there are many.
#pragma once

#include <cstdint>

#include "small_batch.cuh"
#include "small_batch_sparse_cores.cuh"

namespace nms {

struct SmallProblem {
  const uint16_t* x;  // [tokens, k], rows x_row apart
  int64_t x_row, tokens;
  const uint8_t* values;   // [rows, groups * n]
  const uint8_t* indices;  // [rows, index bytes]
  int64_t rows, k;         // > 0
  PackedFormat format;
  bool int8;  // values; else of x's type
  SmallOutput out;
  int multiprocessors;
};

// Whether units of 16 bytes do, with their codes on boundaries of their size and their inputs within a tile of x.
template <class Unit>
bool is_wide(const SmallProblem& p) {
  const int n = p.format.n, m = p.format.m;
  if (8 % n != 0 || (m & (m - 1)) != 0 || Unit::kValues / n * m * 128 > kSmallTileBytes || Unit::kValues / n * m < 8)
    return false;
  return divide_up(p.k, int64_t{m}) * n % Unit::kValues == 0 && is_aligned(p.values, kChunkBytes) &&
         is_aligned(p.indices, Unit::kCodeBytes);
}

// fn(unit)
template <DType V, class Fn>
void with_unit(const SmallProblem& p, const Fn& fn) {
  const auto wide = [&]<Codes C>() {
    using Unit = WideUnit<C, V>;
    if (!is_wide<Unit>(p)) return false;
    fn(Unit{});
    return true;
  };
  bool found = false;
  switch (p.format.index_bits) {
    case 2:
      found = wide.template operator()<Codes::kFields2>();
      break;
    case 4:
      found = wide.template operator()<Codes::kFields4>();
      break;
    case 8:
      found = wide.template operator()<Codes::kFields8>();
      break;
    default:
      if (p.format.m == 2 * p.format.n) found = wide.template operator()<Codes::kMask>();
      break;
  }
  if (!found) fn(AnyUnit<V>{});
}

// The kernel's arguments but for the plan.
template <class Body>
Body small_body(const SmallProblem& p, int unit_inputs) {
  Body body{};
  body.x = p.x;
  body.x_row = p.x_row;
  body.x_aligned = is_aligned(p.x, kChunkBytes) && p.x_row % 8 == 0;
  body.tokens = p.tokens;
  body.token_tiles = Divisor(divide_up(p.tokens, int64_t{Body::kTokens}));
  body.values = p.values;
  body.indices = p.indices;
  const int64_t groups = divide_up(p.k, int64_t{p.format.m});
  body.values_row = groups * p.format.n * Body::kElementBytes;
  body.indices_row = index_row_bytes(p.format, groups);
  body.rows = p.rows;
  body.k = p.k;
  body.units = static_cast<int>(divide_up(p.k, int64_t{unit_inputs}));
  body.out = p.out;
  return body;
}

template <DType D, DType V, int T, class Unit>
SmallBatch<D, V, T, Unit> small_body_of(const SmallProblem& p) {
  int inputs = p.format.m;
  if constexpr (Unit::kWide) inputs *= Unit::kValues / p.format.n;
  auto body = small_body<SmallBatch<D, V, T, Unit>>(p, inputs);
  body.unit_inputs = inputs;
  while (1 << body.n_log2 < p.format.n) ++body.n_log2;
  while (1 << body.m_log2 < p.format.m) ++body.m_log2;
  body.format = p.format;
  return body;
}

template <class Body>
SmallShape shape_of(const Body& body) {
  return {body.rows,
          body.units,
          body.max_tile_units(),
          Body::kWarpRows,
          Body::kMaxLanes,
          body.values_row + body.indices_row,
          Body::kTokens * body.k * 2};
}

// Whether sparse tensor cores do: 2:4, whole steps, and their loads' boundaries.
template <class Body>
bool is_sparse_core(const SmallProblem& p) {
  return p.format.n == 2 && p.format.m == 4 && p.k % Body::kStep == 0 && is_aligned(p.values, kChunkBytes) &&
         is_aligned(p.indices, kChunkBytes);
}

// fn(body). Patterns that are read element by element have no tile of 4 tokens.
template <DType D, DType V, class Fn>
void with_body(const SmallProblem& p, const Fn& fn) {
  if (p.tokens > 1 && is_sparse_core<SparseCoreBatch<D, V, 1>>(p)) {
    const int inputs = SparseCoreBatch<D, V, 1>::kStep;
    if (p.tokens <= 8)
      fn(small_body<SparseCoreBatch<D, V, 1>>(p, inputs));
    else if (p.tokens <= 16)
      fn(small_body<SparseCoreBatch<D, V, 2>>(p, inputs));
    else
      fn(small_body<SparseCoreBatch<D, V, 4>>(p, inputs));
    return;
  }
  with_unit<V>(p, [&](auto unit) {
    using Unit = decltype(unit);
    if (p.tokens == 1)
      fn(small_body_of<D, V, 1, Unit>(p));
    else if (Unit::kWide && p.tokens <= 4)
      fn(small_body_of<D, V, Unit::kWide ? 4 : 8, Unit>(p));
    else
      fn(small_body_of<D, V, 8, Unit>(p));
  });
}

template <DType D, class Fn>
void with_small_body(const SmallProblem& p, const Fn& fn) {
  if (p.int8)
    with_body<D, DType::kInt8>(p, fn);
  else
    with_body<D, D>(p, fn);
}

#if defined(__CUDACC__)

// The plan of a product: splits > 1 need a workspace of splits * tokens * rows floats.
template <DType D>
SmallPlan plan_of(const SmallProblem& p) {
  SmallPlan plan;
  with_small_body<D>(p, [&](const auto& body) { plan = plan_small_batch(shape_of(body), p.multiprocessors); });
  return plan;
}

template <DType D>
void launch_small(const SmallProblem& p, const SmallPlan& plan, float* workspace, cudaStream_t stream) {
  with_small_body<D>(p, [&](auto body) {
    body.plan = plan;
    body.partial = plan.splits > 1 ? workspace : nullptr;
    const int64_t row_tiles = divide_up(p.rows, plan.block_rows(body.kWarpRows, body.kMaxLanes));
    const dim3 grid(static_cast<unsigned>(row_tiles * body.token_tiles.value()), static_cast<unsigned>(plan.splits));
    launch_small_batch(body, grid, stream);
    if (plan.splits > 1) launch_map(SumSplits<D>{workspace, plan.splits, p.tokens, Divisor(p.rows), p.out}, stream);
  });
}

SmallPlan plan_small_bfloat16(const SmallProblem& p);
SmallPlan plan_small_float16(const SmallProblem& p);
void launch_small_bfloat16(const SmallProblem& p, const SmallPlan& plan, float* workspace, cudaStream_t stream);
void launch_small_float16(const SmallProblem& p, const SmallPlan& plan, float* workspace, cudaStream_t stream);

#endif  // defined(__CUDACC__)

}  // namespace nms
